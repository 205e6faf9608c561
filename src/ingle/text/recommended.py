"""What somebody else than a model's own files says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Recommended:
    sampling: Mapping[str, float] = field(default_factory=dict)
    """For requests that set none, where the model's files recommend nothing."""
    chat_template: str | None = None
    """As `--chat-template` takes it: in place of the model's own, which it has not or which is wrong."""
    source: str = ""
    """Who says so, for people."""


NOTHING = Recommended()
