"""What codes of 4 bits stand for where they are no integers: each method's table."""

from __future__ import annotations

from typing import Literal

Table = Literal["nf4", "fp4", "mxfp4", "nvfp4"]

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _with_signs(magnitudes: tuple[float, ...]) -> tuple[float, ...]:
    return (*magnitudes, *(-each for each in magnitudes))


TABLES: dict[Table, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": _with_signs(_FP4),
    "mxfp4": _with_signs(_E2M1),
    "nvfp4": _with_signs(_E2M1),
}
"""NF4: https://arxiv.org/abs/2305.14314, appendix E. FP4 is bitsandbytes' own, in parts of its largest number; that of
the other two E2M1 of the OCP's microscaling formats."""
