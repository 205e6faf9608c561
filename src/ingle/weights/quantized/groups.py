"""Matrices of codes with scales, in the one form that all layouts of checkpoints are read into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Kind = Literal["int4", "int8", "fp8"]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MIDDLE = {"int4": 8, "int8": 128}
"""The zero of codes that have none of their own."""


@dataclass(frozen=True)
class Groups:
    """A matrix whose numbers are (code - zero) * scale, scale and zero being those of a row's group of columns.

    Group g has the columns from g * group_size on; the last may be shorter.
    """

    kind: Kind
    codes: Bytes
    """[rows, columns], unsigned integers or FP8's bits (E4M3); of int4 [rows, columns / 2], the first in a low half."""
    scales: Floats
    """[rows, groups]"""
    zeros: Bytes | None
    """[rows, groups]; None for `MIDDLE`, and for FP8."""
    group_size: int
    half_scales: bool = False
    """float16 holds all scales exactly."""
    order: npt.NDArray[np.int32] | None = None
    """[columns]: the input that each column is multiplied with, where they are sorted by group; None for the same."""
    padded_from: int | None = None
    """How many inputs there are, where there are more columns: those that name an input again are zero."""
    quantizes_inputs: bool = False
    """As `Scheme` has it."""

    @property
    def num_rows(self) -> int:
        return int(self.codes.shape[0])

    @property
    def num_columns(self) -> int:
        return int(self.codes.shape[1]) * (2 if self.kind == "int4" else 1)

    @property
    def num_inputs(self) -> int:
        return self.num_columns if self.padded_from is None else self.padded_from

    def rows(self, start: int, stop: int) -> Groups:
        """Of these rows (outputs) alone, without a copy. `ingle.weights.quantized.cut` has the same of columns."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def decoded(self) -> Floats:
        """[rows, inputs], the numbers that it stands for, by input."""
        values = self._values().reshape(self.num_rows, -1)
        group = np.arange(self.num_columns) // self.group_size
        if self.kind != "fp8":
            zeros = np.float32(MIDDLE[self.kind]) if self.zeros is None else self.zeros[:, group].astype(np.float32)
            values -= zeros
        values *= self.scales[:, group]
        if self.order is None:
            return values
        by_input = np.empty((len(values), self.num_inputs), np.float32)
        by_input[:, self.order[::-1]] = values[:, ::-1]  # of columns with one input the first remains
        return by_input

    def _values(self) -> Floats:
        if self.kind == "fp8":
            return E4M3[self.codes]
        if self.kind == "int8":
            return self.codes.astype(np.float32)
        return np.stack((self.codes & 15, self.codes >> 4), -1).astype(np.float32)


def _e4m3() -> Floats:
    """What each byte stands for: https://arxiv.org/abs/2209.05433, without infinities."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    magnitude[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3()
