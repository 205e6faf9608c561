"""`ingle show`: what a model is and whether it runs here, read from its files without loading it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ingle.cli.flags import parse
from ingle.config import EngineConfig, TextConfig
from ingle.errors import ModelError, printable
from ingle.hub.resolve import resolve_model

if TYPE_CHECKING:
    from ingle.description import Description

_MAX_CHARS = 4096
"""Of a fact: a path is no longer."""


@dataclass(frozen=True)
class Show:
    """Show what a model is and whether it runs here, read from its files without loading it."""

    model: str
    """Short name of a stored model, a Hugging Face model folder, or a .gguf file."""
    json: bool = False
    """Print all of it as one JSON object."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Show, argv, command="show")
    logging.basicConfig(format="%(message)s", level=logging.ERROR)  # what it warns of is among the findings
    print(as_json(described(flags.model)) if flags.json else as_text(described(flags.model)))


def described(name: str) -> Description:
    """Raises `ModelError` for what is no model, and for one whose configuration cannot be read."""
    from ingle.description import Finding
    from ingle.engine.describe import describe, describe_adapter

    try:
        source = resolve_model(name)
    except ModelError as error:
        adapter = describe_adapter(name, Path(name))
        if adapter is None:
            raise
        return replace(adapter, findings=(Finding(True, error.what, error.alternative),))
    return describe(source.name, source.path, EngineConfig(name), TextConfig(), source.recommended)


def as_text(model: Description) -> str:
    """A fact a line."""
    from ingle.description import rows

    facts = list(rows(model))
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name:<{width}}  {printable(value[:_MAX_CHARS])}" for name, value in facts)


def as_json(model: Description) -> str:
    import json

    return json.dumps(asdict(model), ensure_ascii=False, indent=2)
