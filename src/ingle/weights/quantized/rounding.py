"""Floats to codes with scales, without any data to calibrate by: of each group the scale that leaves the least error.

Several scales are tried for a group, and for each of them the one that its codes would like better; where there are
zeros, those in the middle too. Sums run in float32, in C++ (`csrc/rounding.cpp`) or by PyTorch (`rounding_torch.py`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import FLOAT8
from ingle.weights.quantized.groups import MIDDLE, Bytes, Floats, Groups, Kind, half_holds
from ingle.weights.quantized.scheme import Scheme

ScaleType = Literal["F16", "BF16", "F32"]
SCALE_TYPES: tuple[ScaleType, ...] = ("F16", "BF16", "F32")
"""By safetensors' names, in the order of `IngleRounding` in operators.h."""
RATIOS: dict[Kind, tuple[float, ...]] = {
    "int4": tuple(1 - 0.04 * step for step in range(9)),
    "int8": tuple(1 - 0.02 * step for step in range(6)),
    "fp8": tuple(2 ** (step / 8) for step in range(8)),
}
"""Of a group's largest number, the shares that codes are to reach. FP8 has the same steps after each power of two."""
_CHUNK_NUMBERS = 8 << 20
"""Rounded at a time: what rounding a matrix takes beside the matrix is some times as many bytes."""


@dataclass(frozen=True)
class Loss:
    """What rounding did to some numbers."""

    error: float = 0.0
    """Sum of squared differences."""
    squares: float = 0.0
    """Sum of the squares of the numbers themselves."""

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.error + other.error, self.squares + other.squares)

    @property
    def relative(self) -> float:
        """Root of the mean squared error, to that of the numbers."""
        return (self.error / self.squares) ** 0.5 if self.squares else 0.0


@dataclass(frozen=True)
class Rounded:
    """Of rows."""

    codes: Bytes
    """[rows, columns], a byte each."""
    scales: Floats
    """[rows, groups]"""
    zeros: Bytes | None
    """[rows, groups]"""
    losses: npt.NDArray[np.float64]
    """[rows, 2]: squared error, and squares."""


RoundRows = Callable[[int, int], Rounded]
"""Some rows of a matrix, from one to before another."""


def round_matrix(
    name: str, rows: int, columns: int, scheme: Scheme, scale_type: ScaleType, round_rows: RoundRows
) -> tuple[Groups, Loss]:
    """The matrix `name` a piece at a time. Raises `ModelError` for numbers that are not finite."""
    size = scheme.group_size or columns
    per_byte = 2 if scheme.kind == "int4" else 1
    codes = np.empty((rows, columns // per_byte), np.uint8)
    scales = np.empty((rows, -(-columns // size)), np.float32)
    zeros = np.empty(scales.shape, np.uint8) if scheme.has_zeros else None
    error = squares = 0.0
    chunk = max(_CHUNK_NUMBERS // columns, 1)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        part = round_rows(start, stop)
        codes[start:stop] = part.codes[:, ::2] | part.codes[:, 1::2] << 4 if per_byte == 2 else part.codes
        scales[start:stop] = part.scales
        if zeros is not None and part.zeros is not None:
            zeros[start:stop] = part.zeros
        error, squares = error + float(part.losses[:, 0].sum()), squares + float(part.losses[:, 1].sum())
    if not np.isfinite(error):
        raise ModelError(
            f"tensor {name} has numbers that are not finite, which cannot be quantized",
            alternative="download the model's files again, or leave --quantization out",
        )
    if zeros is not None and (zeros == MIDDLE[scheme.kind]).all():
        zeros = None
    groups = Groups(
        scheme.kind, codes, scales, zeros, size, half_holds(scales), quantizes_inputs=scheme.quantizes_inputs
    )
    return groups, Loss(error, squares)


def round_natively(values: Floats, scheme: Scheme, scale_type: ScaleType) -> Rounded:
    """By the CPU's kernels, which are started: values [rows, columns]."""
    values = np.ascontiguousarray(values, np.float32)
    rows, columns = values.shape
    size = scheme.group_size or columns
    ratios = np.array(RATIOS[scheme.kind], np.float32)
    how = library.Rounding(
        ratios=ratios.ctypes.data,
        num_ratios=len(ratios),
        group_size=size,
        bits=FLOAT8 if scheme.is_float else scheme.bits,
        scale_type=SCALE_TYPES.index(scale_type),
    )
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, -(-columns // size)), np.float32)
    zeros = np.empty(scales.shape, np.uint8) if scheme.has_zeros else None
    losses = np.empty((rows, 2), np.float64)
    zeros_at = None if zeros is None else zeros.ctypes.data
    library.get().ingle_round_rows(
        ctypes.byref(how), values.ctypes.data, rows, columns, codes.ctypes.data, scales.ctypes.data, zeros_at,
        losses.ctypes.data,
    )  # fmt: skip
    return Rounded(codes, scales, zeros, losses)
