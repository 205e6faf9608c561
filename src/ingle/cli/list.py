"""`ingle list`: the models on this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ingle import facts
from ingle.cli.flags import parse
from ingle.cli.table import print_table
from ingle.errors import printable
from ingle.hub.inventory import Held, inventory
from ingle.hub.store import Store


@dataclass(frozen=True)
class List:
    """List the models on this machine, by the names that ingle serves them by.

    Also those that it or other tools have put into the caches of Hugging Face and ModelScope.
    """

    json: bool = False
    """Print a JSON array of objects; sizes in bytes, times in seconds since 1970, null where nobody knows."""


def main(argv: Sequence[str]) -> None:
    flags = parse(List, argv, command="list")
    found = list(inventory(Store()))
    if flags.json:
        print(json.dumps([_as_dict(held) for held in found], ensure_ascii=False, indent=1))
        return
    for held in found:
        if held.trouble:
            print("ingle:", printable(held.trouble), file=sys.stderr)
    if not found:
        print("no models here yet: `ingle pull NAME` fetches one; `ingle catalog` lists short names")
        return
    rows = [
        (held.name, facts.decimal_size(held.size) if held.size else "-", held.format, _when(held.used_s))
        for held in found
    ]
    if any(held.short_name for held in found):
        named = [(*row, held.short_name) for row, held in zip(rows, found, strict=True)]
        print_table(("NAME", "SIZE", "FORMAT", "LAST USED", "SHORT NAME"), named, right={1})
        return
    print_table(("NAME", "SIZE", "FORMAT", "LAST USED"), rows, right={1})


def _when(moment_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment_s)) if moment_s else "-"


def _as_dict(held: Held) -> dict[str, object]:
    return {
        "name": held.name,
        "short_name": held.short_name or None,
        "size": held.size,
        "format": held.format,
        "last_used": round(held.used_s) or None,
        "place": held.place,
        "path": str(held.path),
        "trouble": held.trouble or None,
    }
