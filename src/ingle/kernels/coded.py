"""Matrices of codes with scales, as products on PyTorch's devices take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch

CodedKind = Literal["int2", "int3", "int4", "int5", "int6", "int8", "fp8"]
BITS = {"int2": (2, 0), "int3": (2, 1), "int4": (4, 0), "int5": (4, 1), "int6": (4, 2), "int8": (8, 0), "fp8": (8, 0)}
"""Of a code the lower bits, which are in `Coded.codes`, and those above, which are in `Coded.high`."""
MIDDLE = {"int2": 1, "int3": 4, "int4": 8, "int5": 16, "int6": 32, "int8": 128}
"""The zero of codes that have none of their own."""
_BLOCK = 128
"""Columns whose codes of 4 bits lie in neighbouring bytes, at most."""
PLANES_BLOCK = 32
"""Columns whose codes lie in neighbouring bytes, of codes that `Coded.into_planes` packs."""


@dataclass(frozen=True)
class Coded:
    """A matrix [O, I] of numbers (code - zero) * scale, with the scale and the zero of a row's group of columns."""

    kind: CodedKind
    codes: torch.Tensor
    """uint8 [O, I]: unsigned integers, or FP8's bits (E4M3); of int4 [O, I / 2], of int2 [O, I / 4].

    Byte b of int4 has in its lower half the code of column c = b // half * 2 * half + b % half, in its upper half that
    of column c + half: so a tile of bytes is two tiles of columns, without any change of places. Of int2 it has those
    of c = b // half * 4 * half + b % half, of c + half and so on. Of int5 and int6 these are the lower 4 bits, of int3
    the lower 2."""
    scales: torch.Tensor
    """[O, G], of any float type."""
    zeros: torch.Tensor | None
    """uint8 [O, G]; None for `MIDDLE`, and for FP8."""
    group_size: int
    """Group g has the columns from g * group_size on; the last may be shorter."""
    half: int
    order: torch.Tensor | None = None
    """int64 [I]: the input that each column is multiplied with; None for the same. Of the experts of a mixture, one
    below the other, [N, I]."""
    padded_from: int | None = None
    """How many inputs there are, where there are more columns: those that name an input again are zero."""
    factors: torch.Tensor | None = None
    """[O, G / n]: what the scales, and the minima, of n groups are multiplied with, where those are small integers."""
    minima: torch.Tensor | None = None
    """[O, G]: what is added to a group's numbers, whose codes have no zero then."""
    minimum_factors: torch.Tensor | None = None
    """As `factors`."""
    pairs: torch.Tensor | None = None
    """[O, G, 2]: scales and minima side by side, in place of which those are views of it."""
    factor_pairs: torch.Tensor | None = None
    """The same of the factors of both."""
    shares_bytes: bool = False
    """A byte of `scales` has the scale in its lower half, and what would be `minima` in its upper one."""
    high: torch.Tensor | None = None
    """uint8 [O, I / 8 or I / 4]: the bits of codes above those in `codes`, packed as those are: of a block of
    `PLANES_BLOCK` columns a byte has every 4th code's bit, or every 8th's two."""
    in_planes: bool = False
    """Made by `into_planes`, whose blocks have `PLANES_BLOCK` columns."""
    table: torch.Tensor | None = None
    """[16]: the number that each code of int4 stands for, where that is none less its zero."""
    is_e2m1: bool = False
    """`table` is int8, twice E2M1's numbers, and scales are powers of two up to 1 in bfloat16."""
    quantizes_inputs: bool = False
    """The model was made for inputs of FP8, too: products of many rows may take them so."""
    blocks: torch.Tensor | None = None
    """float32 [O / 128, G]: the scales of groups of 128, where those of 128 neighbouring rows are the same; of FP8 that
    quantizes inputs."""

    @classmethod
    def of(
        cls,
        kind: CodedKind,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group_size: int,
        order: torch.Tensor | None = None,
        *,
        padded_from: int | None = None,
        quantizes_inputs: bool = False,
        table: torch.Tensor | None = None,
    ) -> Coded:
        """With the codes as `ingle.weights.quantized.groups.Groups` has them: of int4, neighbours share a byte."""
        num_columns = codes.shape[1] * (2 if kind == "int4" else 1)
        half = gcd(gcd(group_size, _BLOCK), num_columns) // 2
        if kind == "int4" and half > 1:
            whole = torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1, 2, half)
            codes = (whole[:, :, 0] | whole[:, :, 1] << 4).view(len(codes), -1)
        size = min(group_size, num_columns)
        blocks = _blocks(scales, size) if kind == "fp8" and quantizes_inputs else None
        if kind == "fp8" and quantizes_inputs and scales.shape[1] == 1:
            scales = scales.float()  # as the library takes them
        columns = kind, codes, scales, zeros, size, max(half, 1), order, padded_from
        return cls(*columns, table=table, quantizes_inputs=quantizes_inputs, blocks=blocks)

    def into_planes(self) -> Coded:
        """The same of codes that are each in a byte of their own, [O, I]. Rows have to be whole blocks."""
        low, high = BITS[self.kind]
        scales, minima, pairs = _beside(self.scales, self.minima)
        factors, lows, factor_pairs = (
            (None, None, None) if self.factors is None else _beside(self.factors, self.minimum_factors)
        )
        return replace(
            self,
            codes=self.codes if low == 8 else _plane(self.codes & (1 << low) - 1, low),
            scales=scales,
            group_size=min(self.group_size, self.codes.shape[1]),
            half=PLANES_BLOCK * low // 8,
            factors=factors,
            minima=minima,
            minimum_factors=lows,
            pairs=pairs,
            factor_pairs=factor_pairs,
            high=_plane(self.codes >> low, high) if high else None,
            in_planes=True,
        )

    @classmethod
    def joined(cls, parts: Sequence[Coded]) -> Coded:
        """Matrices of one form, one below the other; the order of inputs is the first's."""

        def joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        minima, pairs = joined([part.minima for part in parts]), joined([part.pairs for part in parts])
        factors, lows = joined([part.factors for part in parts]), joined([part.minimum_factors for part in parts])
        scales, factor_pairs = [part.scales for part in parts], joined([part.factor_pairs for part in parts])
        if pairs is not None:
            minima = pairs[..., 1]
        if factor_pairs is not None:
            factors, lows = factor_pairs[..., 0], factor_pairs[..., 1]
        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat(scales) if pairs is None else pairs[..., 0],
            zeros=joined([part.zeros for part in parts]),
            factors=factors,
            minima=minima,
            minimum_factors=lows,
            pairs=pairs,
            factor_pairs=factor_pairs,
            high=joined([part.high for part in parts]),
            is_e2m1=all(part.is_e2m1 for part in parts),
            blocks=None,
        )

    @property
    def num_rows(self) -> int:
        return len(self.codes)

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1] * 8 // BITS[self.kind][0]

    @property
    def has_minima(self) -> bool:
        return self.minima is not None or self.shares_bytes

    @property
    def num_inputs(self) -> int:
        return self.num_columns if self.padded_from is None else self.padded_from

    @property
    def num_bytes(self) -> int:
        steps = self.factors, self.minima, self.minimum_factors
        held = (self.codes, self.high, self.scales, self.zeros, self.order, *steps, self.table, self.blocks)
        return sum(tensor.numel() * tensor.itemsize for tensor in held if tensor is not None)

    @property
    def span(self) -> int:
        """Groups that share a factor; 0 without factors."""
        return 0 if self.factors is None else self.scales.shape[1] // self.factors.shape[1]

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """The columns of x [.., I] as they are multiplied."""
        return x if self.order is None else x[..., self.order]

    def decoded(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Some of its rows, with the columns as they are stored: each number is computed in float32, rounded once."""
        codes = self._codes(rows)
        group = torch.arange(self.num_columns, device=codes.device) // self.group_size
        if self.kind == "fp8":
            values = codes.view(torch.float8_e4m3fn).float()
        elif self.table is not None:
            values = self.table.float()[codes.int()]
        elif self.has_minima:
            values = codes.float()
        elif self.zeros is None:
            values = codes.float() - MIDDLE[self.kind]
        else:
            values = codes.float() - self.zeros[rows][:, group]
        scales, minima = self.scales[rows], None if self.minima is None else self.minima[rows]
        if self.shares_bytes:
            scales, minima = scales & 15, scales >> 4
        values *= self._in_floats(scales, self.factors, rows)[:, group]
        if minima is not None:
            values += self._in_floats(minima, self.minimum_factors, rows)[:, group]
        return values.to(dtype)

    def _codes(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """uint8, of each column one."""
        low, high = BITS[self.kind]
        codes = _apart(self.codes[rows], low, self.half)
        return codes if self.high is None else codes | _apart(self.high[rows], high, self.half * high // low) << low

    def _in_floats(
        self, values: torch.Tensor, factors: torch.Tensor | None, rows: slice | torch.Tensor
    ) -> torch.Tensor:
        """float32 [rows, G]"""
        wide = values.float()
        return wide if factors is None else wide * factors[rows].float().repeat_interleave(self.span, 1)


def _beside(
    first: torch.Tensor, second: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Two tensors as views of one that has them side by side, and that; the first as it is where there is no other."""
    if second is None:
        return first, None, None
    both = torch.stack((first, second), -1)
    return both[..., 0], both[..., 1], both


def _blocks(scales: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """One of each 128 rows of scales, where all are like it."""
    if group_size != _BLOCK or len(scales) % _BLOCK:
        return None
    blocks = scales[::_BLOCK]
    alike = torch.equal(blocks[:, None].expand(-1, _BLOCK, -1), scales.view(len(blocks), _BLOCK, -1))
    return blocks.float().contiguous() if alike else None


def _plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of so many bits, [O, I], with those of `PLANES_BLOCK` neighbours in neighbouring bytes."""
    per_byte = 8 // bits
    fields = codes.view(len(codes), -1, per_byte, PLANES_BLOCK // per_byte)
    packed = fields[:, :, 0]
    for index in range(1, per_byte):
        packed = packed | fields[:, :, index] << bits * index
    return packed.reshape(len(codes), -1)


def _apart(packed: torch.Tensor, bits: int, half: int) -> torch.Tensor:
    """Codes of so many bits out of blocks of `half` bytes."""
    if bits == 8:
        return packed
    blocks = packed.view(len(packed), -1, half)
    fields = [blocks >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(fields, 2).view(len(packed), -1)
