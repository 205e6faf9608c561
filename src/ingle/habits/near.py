"""Which flag may a mistyped one have been meant to be?"""

from __future__ import annotations

from collections.abc import Mapping

_LONG_WORD = 4
"""A slip is looked for in words of so many letters: of shorter ones, another is as near as any (--top-k, --top-p)."""


def nearest(typed: str, candidates: Mapping[str, str]) -> str | None:
    """The name of the one candidate that differs from `typed` by a slip of the finger or by how its words are joined.

    `candidates` holds what to call each. Of several that would do, the one with the fewest slips, if there is only one.
    """
    found = {candidates[name]: slips for name in candidates if (slips := _slips(typed, name)) is not None}
    least = [name for name, slips in found.items() if slips == min(found.values())]
    return least[0] if len(least) == 1 and least[0] != typed else None


def _slips(typed: str, name: str) -> int | None:
    """How many letters are wrong; None if too many are."""
    if typed == name:
        return None
    if _joined(typed) == _joined(name):
        return 0
    theirs, ours = typed.strip("-").split("-"), name.strip("-").split("-")
    if len(theirs) != len(ours):
        return None
    total = 0
    for one, other in zip(theirs, ours, strict=True):
        if one == other:
            continue
        slips, length = distance(one, other), max(len(one), len(other))
        means_another = one[:1] != other[:1] or any(map(str.isdigit, one + other))  # ubatch and batch, 4bit and 8bit
        if means_another or length < _LONG_WORD or slips > (1 if length < 2 * _LONG_WORD else 2):
            return None
        total += slips
    return total if total <= 2 else None


def _joined(name: str) -> str:
    return name.replace("-", "").lower()


def distance(one: str, other: str) -> int:
    """Letters to insert, leave out, replace or swap with their neighbour (optimal string alignment)."""
    before_last: list[int] = []
    last = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        row = [i]
        for j, b in enumerate(other, 1):
            best = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (a != b))
            if i > 1 and j > 1 and (a, one[i - 2]) == (other[j - 2], b):
                best = min(best, before_last[j - 2] + 1)
            row.append(best)
        before_last, last = last, row
    return last[-1]
