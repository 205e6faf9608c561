"""`ingle rm`: remove a model from the local store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import parse
from ingle.hub.catalog import find_entry
from ingle.hub.store import Store


@dataclass(frozen=True)
class Remove:
    """Remove a model from the local store. On a terminal it asks first."""

    name: str
    """Short name, as `ingle list` shows it."""
    yes: bool = False
    """Do not ask."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Remove, argv, command="rm")
    entry = find_entry(flags.name)
    name = entry.name if entry is not None else flags.name
    store = Store()
    if not flags.yes and sys.stdin.isatty() and name in store.names() and not _agreed(name):
        print("nothing was removed")
        return
    store.remove(name)
    print(f"removed {name}")


def _agreed(name: str) -> bool:
    try:
        return input(f"Remove {name}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
