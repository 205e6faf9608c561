"""A model on this machine's disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ModelSource:
    name: str
    """The short name, the name on a hub, or the path as the user gave it."""
    path: Path
    kind: Literal["folder", "gguf"]
    """A Hugging Face model folder with its config.json, or one .gguf file."""
