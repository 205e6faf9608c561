"""Matrices of codes with scales, in the one form that all layouts of checkpoints are read into."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ingle.weights.quantized.tables import TABLES, Table

Kind = Literal["int4", "int8", "fp8"]
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

MIDDLE = {"int4": 8, "int8": 128}
"""The zero of codes that have none of their own."""
_T = TypeVar("_T", bound=np.generic)
_Indices = npt.NDArray[np.intp]
_SIZES = (128, 64, 32, 16)
_SCALE_BYTES = 3
"""About, of a scale and what may belong to it."""


@dataclass(frozen=True)
class Groups:
    """A matrix whose numbers are (code - zero) * scale, scale and zero being those of a row's group of columns.

    With a table they are table[code] * scale.

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
    """How many inputs there are, where that is not the number of columns: those that name an input again are zero, and
    so are inputs that none names."""
    quantizes_inputs: bool = False
    """As `Scheme` has it."""
    unit: float = 1.0
    """What all numbers are multiplied with, where scales are small floats."""
    table: Table | None = None
    """What codes of int4 stand for, a key of `TABLES`; None for integers. There are no zeros with one."""

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
        """Of these rows (outputs) alone, without a copy."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=self.scales[start:stop], zeros=zeros)

    def columns(self, start: int, stop: int) -> Groups:
        """Of the inputs from `start` to `stop` alone, to be multiplied with those alone; `start` is the result's first.

        Where they begin amid a group, the result's groups are smaller. Of columns sorted by group (act-order) each
        group has some of these inputs: its columns are filled up with zeros to whole groups of one size, and the
        result's `order` says which of these inputs each column is multiplied with.
        Raises `ValueError` for codes that share a byte with others.
        """
        if not 0 <= start < stop <= self.num_inputs:
            raise ValueError(f"inputs {start} to {stop} are no range of {self.num_inputs}")
        if self.order is not None:
            return _of_sorted(self, self.order, start, stop)
        per_byte = 2 if self.kind == "int4" else 1
        if start % per_byte or stop % per_byte:
            raise ValueError(f"columns {start} to {stop} cut a byte of two codes")
        size = math.gcd(self.group_size, start)
        of_group = np.arange(start, stop, size) // self.group_size
        return replace(
            self,
            codes=self.codes[:, start // per_byte : stop // per_byte],
            scales=self.scales[:, of_group],
            zeros=None if self.zeros is None else self.zeros[:, of_group],
            group_size=size,
        )

    def widened(self, num_inputs: int) -> Groups:
        """With more inputs behind, whose numbers are zero."""
        lacking = num_inputs - self.num_inputs
        if lacking == 0:
            return self
        if self.order is not None:
            return replace(self, padded_from=num_inputs)
        num_groups = -(-num_inputs // self.group_size) - self.scales.shape[1]
        zeros = None if self.zeros is None else _beside(self.zeros, num_groups)
        # Those in what was the last group have its scale: their codes are its zero.
        last = None if self.zeros is None else self.zeros[:, -1:]
        code = np.full((self.num_rows, 1), self._zero, np.uint8) if last is None else last
        if self.kind == "int4":
            code, lacking = code | code << np.uint8(4), lacking // 2
        codes = np.concatenate((self.codes, np.repeat(code, lacking, axis=1)), axis=1)
        return replace(self, codes=codes, scales=_beside(self.scales, num_groups), zeros=zeros)

    @property
    def _zero(self) -> int:
        """The code that stands for zero where there are no zeros."""
        return TABLES[self.table].index(0.0) if self.table else MIDDLE.get(self.kind, 0)

    def decoded(self) -> Floats:
        """[rows, inputs], the numbers that it stands for, by input."""
        values = self._values().reshape(self.num_rows, -1)
        group = np.arange(self.num_columns) // self.group_size
        if self.table is not None:
            values = np.array(TABLES[self.table], np.float32)[values.astype(np.uint8)]
        elif self.kind != "fp8":
            zeros = np.float32(MIDDLE[self.kind]) if self.zeros is None else self.zeros[:, group].astype(np.float32)
            values -= zeros
        values *= self.scales[:, group] * np.float32(self.unit)
        if self.order is None:
            return values
        by_input = np.zeros((len(values), self.num_inputs), np.float32)
        by_input[:, self.order[::-1]] = values[:, ::-1]  # of columns with one input the first remains
        return by_input

    def _values(self) -> Floats:
        if self.kind == "fp8":
            return E4M3[self.codes]
        if self.kind == "int8":
            return self.codes.astype(np.float32)
        return np.stack((self.codes & 15, self.codes >> 4), -1).astype(np.float32)


def half_holds(scales: Floats) -> bool:
    """Whether float16 holds all of them exactly, as it does most of bfloat16."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.array_equal(scales.astype(np.float16).astype(np.float32), scales))


def _e4m3() -> Floats:
    """What each byte stands for: https://arxiv.org/abs/2209.05433, without infinities."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, bits & 7
    magnitude = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    magnitude[bits & 127 == 127] = np.nan
    return np.where(bits & 128, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3()


def _beside(values: npt.NDArray[_T], count: int) -> npt.NDArray[_T]:
    """With columns of zeros behind."""
    return np.concatenate((values, np.zeros((len(values), count), values.dtype)), axis=1)


def _of_sorted(groups: Groups, order: npt.NDArray[np.int32], start: int, stop: int) -> Groups:
    columns = np.flatnonzero((order >= start) & (order < stop))
    if groups.padded_from is not None:  # those that fill up are left out
        columns = np.sort(columns[np.unique(order[columns], return_index=True)[1]])
    counts = np.bincount(columns // groups.group_size, minlength=groups.scales.shape[1])
    size = _best_size(counts, groups)
    repeats = -(-counts // size)  # groups of the result that each group becomes
    of_group = np.repeat(np.arange(len(counts)), repeats)
    places = _places(counts, size)
    codes = _codes_at(groups, columns, places, of_group.repeat(size))
    firsts = np.maximum.accumulate(np.where(places >= 0, places, 0))  # what fills up names an input that was named
    return replace(
        groups,
        codes=codes,
        scales=groups.scales[:, of_group],
        zeros=None if groups.zeros is None else groups.zeros[:, of_group],
        group_size=size,
        order=(order[columns] - np.int32(start))[firsts],
        padded_from=stop - start,
    )


def _best_size(counts: _Indices, groups: Groups) -> int:
    """That which takes the least memory."""
    per_column = 0.5 if groups.kind == "int4" else 1.0

    def num_bytes(size: int) -> float:
        return float((-(-counts // size)).sum()) * (size * per_column + _SCALE_BYTES)

    return min((size for size in _SIZES if size <= max(groups.group_size, _SIZES[-1])), key=num_bytes)


def _places(counts: _Indices, size: int) -> _Indices:
    """Of each column of the result: which of the chosen ones it is, -1 for one that fills up."""
    widths = -(-counts // size) * size
    places = np.full(widths.sum(), -1)
    starts = np.cumsum(widths) - widths
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places[np.repeat(starts, counts) + within] = np.arange(counts.sum())
    return places


def _codes_at(groups: Groups, columns: _Indices, places: _Indices, of_group: _Indices) -> Bytes:
    """Those of the chosen columns at their places, and zeros' codes at the others, packed as `Groups` has them."""
    of_column = columns[np.maximum(places, 0)]
    if groups.kind == "int4":
        shifts = (of_column % 2 * 4).astype(np.uint8)
        codes = groups.codes[:, of_column // 2] >> shifts & np.uint8(15)
    else:
        codes = groups.codes[:, of_column]
    filling = np.flatnonzero(places < 0)
    codes[:, filling] = groups._zero if groups.zeros is None else groups.zeros[:, of_group[filling]]
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4) if groups.kind == "int4" else codes
