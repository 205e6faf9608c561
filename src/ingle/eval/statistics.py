"""How sure a share of right answers is, and a difference between two models on the same cases."""

from __future__ import annotations

import math
from dataclasses import dataclass

_Z = 1.959964
"""Of a 95 % interval."""


def wilson(num_right: int, num: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few cases and for shares near 0 and 1."""
    if num == 0:
        return 0.0, 1.0
    share, z2 = num_right / num, _Z * _Z
    middle = (share + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z / (1 + z2 / num) * math.sqrt(share * (1 - share) / num + z2 / (4 * num * num))
    return max(0.0, middle - half), min(1.0, middle + half)


_EXACT = 1000
"""Changed cases up to which every split is counted."""


@dataclass(frozen=True)
class Paired:
    """Two models on the cases that both answered."""

    num: int
    only_first: int
    """Cases that the first alone had right."""
    only_second: int

    @property
    def difference(self) -> float:
        """Of the second's share over the first's."""
        return (self.only_second - self.only_first) / self.num if self.num else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the difference, by the normal approximation for pairs with half a case more on either side (Agresti
        and Min 2005)."""
        num, first, second = self.num + 2, self.only_first + 0.5, self.only_second + 0.5
        middle = (second - first) / num
        half = _Z * math.sqrt(first + second - (second - first) ** 2 / num) / num
        return max(-1.0, middle - half), min(1.0, middle + half)

    @property
    def p(self) -> float:
        """How likely so uneven a split of the changed cases is by chance alone: McNemar's exact test, two-sided."""
        changed, fewer = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if changed == 0:
            return 1.0
        if changed > _EXACT:  # where the normal distribution, with a correction for steps, is as good
            return math.erfc(max(0.0, changed - 2 * fewer - 1) / math.sqrt(2 * changed))
        tail = sum(math.comb(changed, k) for k in range(fewer + 1))
        return min(1.0, float(2 * tail / (1 << changed)))

    @property
    def is_more_than_noise(self) -> bool:
        return self.p < 0.05
