"""`ingle rm`: remove models from this machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from ingle import facts
from ingle.cli.flags import parse
from ingle.errors import ConfigError, printable
from ingle.hub.inventory import held_by_name, inventory, remove
from ingle.hub.store import Store


@dataclass(frozen=True)
class Remove:
    """Remove models from this machine, also from the hubs' caches. On a terminal it asks first."""

    names: Positional[tuple[str, ...]] = ()
    """As `ingle list` shows them. org/name of a GGUF repository means all of its files that are here."""
    hub: str | None = None
    """Where org/name is from: huggingface or modelscope. Default: $INGLE_HUB, else huggingface."""
    yes: bool = False
    """Do not ask."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Remove, argv, command="rm")
    if not flags.names:
        raise ConfigError("ingle rm needs a MODEL, as `ingle list` shows it")
    here = list(inventory(Store()))
    found = {(held.name, held.path): held for name in flags.names for held in held_by_name(name, here, flags.hub)}
    for held in found.values():
        name, size = printable(held.name), f", {facts.decimal_size(held.size)}" if held.size else ""
        if not flags.yes and sys.stdin.isatty() and not _agreed(f"{name}{size}"):
            print(f"{name} stays")
            continue
        remove(held)
        print(f"removed {name}{size}")


def _agreed(what: str) -> bool:
    try:
        return input(f"Remove {what}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
