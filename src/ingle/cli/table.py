"""Columns for people."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ingle.errors import printable


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Each column as wide as it needs; those whose numbers are in `right` end where the others begin."""
    cells = [head, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        columns = zip(row, widths, strict=True)
        padded = [cell.rjust(width) if at in right else cell.ljust(width) for at, (cell, width) in enumerate(columns)]
        print("  ".join(padded).rstrip())
