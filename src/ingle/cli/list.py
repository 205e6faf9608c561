"""`ingle list`: the models in the local store."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import parse
from ingle.errors import ModelError
from ingle.hub.catalog import CATALOG
from ingle.hub.store import Store


@dataclass(frozen=True)
class List:
    """List the models in the local store, $INGLE_HOME or ~/.cache/ingle."""


def main(argv: Sequence[str]) -> None:
    parse(List, argv, command="list")
    store = Store()
    rows = [("NAME", "SIZE", "FORMAT", "PULLED")]
    for name in store.names():
        try:
            manifest = store.get(name).manifest
        except ModelError as error:
            print("ingle:", error, file=sys.stderr)
            rows.append((name, "-", "damaged", "-"))
            continue
        pulled = manifest.pulled_at.astimezone().strftime("%Y-%m-%d %H:%M")
        rows.append((name, f"{manifest.size / 1e6:.1f} MB", manifest.file.rpartition(".")[2].upper(), pulled))
    if len(rows) == 1:
        names = ", ".join(entry.name for entry in CATALOG)
        print(f"no models in {store.root} yet: `ingle pull NAME` fetches one of {names}")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
