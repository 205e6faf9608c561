"""The hubs, and what each looks like from here."""

from __future__ import annotations

from collections.abc import Callable

from ingle.hub.listing import Origin
from ingle.hub.names import RepoRef


def origin_of(ref: RepoRef, on_wait: Callable[[str], None] = lambda text: None) -> Origin:
    """The hub of a reference. Raises `HubError` where the user wants no network."""
    if ref.hub == "modelscope":
        from ingle.hub.origins.modelscope import ModelScope

        return ModelScope(ref.endpoint, on_wait)
    from ingle.hub.origins.huggingface import HuggingFace

    return HuggingFace(ref.endpoint, on_wait)
