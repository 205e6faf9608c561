"""Chat templates that come with the package, for models whose files bring none. Whoever wants one names it."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent / "templates"


def shipped_templates() -> dict[str, Path]:
    """Their files, by name."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.jinja"))}


def shipped_template(name: str) -> str | None:
    """The template of that name; None where there is none. A name is looked up in a list and never becomes a path."""
    file = shipped_templates().get(name)
    return None if file is None else file.read_text(encoding="utf-8")
