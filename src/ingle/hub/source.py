"""A model on this machine's disk, and what of it may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ingle.text.recommended import NOTHING, Recommended


@dataclass(frozen=True)
class ModelSource:
    name: str
    """The short name, the name on a hub, or the path as the user gave it."""
    path: Path
    kind: Literal["folder", "gguf"]
    """A Hugging Face model folder with its config.json, or one .gguf file."""
    recommended: Recommended = NOTHING
    """What the catalog says of it."""


@dataclass(frozen=True)
class Wanted:
    """What to take of a repository in place of what ingle needs of it: shell patterns over paths."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
