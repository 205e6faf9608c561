"""`ingle help flags`: what the flags of other tools are here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from ingle.habits.flags import IDLE, REFUSED, SAME
from ingle.habits.turned import by_meaning

_WIDTH = 100


def table() -> str:
    """All of them, by what becomes of them."""
    same = [(f"{ours}", theirs) for ours, theirs in SAME.items()]
    parts = [
        ("The same by another name:", same),
        ("Otherwise here:", by_meaning()),
        ("Accepted, with a notice that it changes nothing:", [(why, names) for names, why in IDLE]),
        ("Refused, unless the value asks for nothing:", [(why, names) for names, _, why in REFUSED]),
    ]
    shown = [f"{title}\n{_rows(rows)}" for title, rows in parts]
    return "Flags of other tools, in a command that loads a model.\n\n" + "\n\n".join(shown)


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{_wrapped(meaning, 2)}\n{_wrapped(_plain(names), 6)}" for meaning, names in rows)


def _plain(names: str) -> str:
    return " ".join(name.rstrip("=?#+") for name in names.split())


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False
    )
