"""A model's files on a host that is told what to load by another."""

from __future__ import annotations

from pathlib import Path

from ingle.errors import ModelError


def own_files(path: str, model: str, digest: str) -> Path:
    """Those at the `path` that the other host has them at, or else those of that name. `digest`: what they have to be;
    empty where it is the same host.

    Raises `ModelError` where there are none, or others.
    """
    if not digest:
        return Path(path)
    from ingle.hub.resolve import resolve_model
    from ingle.weights.digest import digest_of

    own = Path(path)
    if not own.exists():
        own = Path(resolve_model(model).path)
    if digest_of(own) != digest:
        raise ModelError(f"{own} holds another model here than {path} of the host that asks: give both the same files")
    return own
