"""Matrices of codes with scales, as products on PyTorch's devices take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Literal

import torch

CodedKind = Literal["int4", "int8", "fp8"]
MIDDLE = {"int4": 8, "int8": 128}
"""The zero of codes that have none of their own."""
_BLOCK = 128
"""Columns whose codes of 4 bits lie in neighbouring bytes, at most."""


@dataclass(frozen=True)
class Coded:
    """A matrix [O, I] of numbers (code - zero) * scale, with the scale and the zero of a row's group of columns."""

    kind: CodedKind
    codes: torch.Tensor
    """uint8 [O, I]: unsigned integers, or FP8's bits (E4M3); of int4 [O, I / 2].

    Byte b of int4 has in its lower half the code of column c = b // half * 2 * half + b % half, in its upper half that
    of column c + half: so a tile of bytes is two tiles of columns, without any change of places."""
    scales: torch.Tensor
    """[O, G], of any float type."""
    zeros: torch.Tensor | None
    """uint8 [O, G]; None for `MIDDLE`, and for FP8."""
    group_size: int
    """Group g has the columns from g * group_size on; the last may be shorter."""
    half: int
    order: torch.Tensor | None = None
    """int64 [I]: the input that each column is multiplied with; None for the same."""
    padded_from: int | None = None
    """How many inputs there are, where there are more columns: those that name an input again are zero."""
    factors: torch.Tensor | None = None
    """[O, G / n]: what the scales, and the minima, of n groups are multiplied with, where those are small integers."""
    minima: torch.Tensor | None = None
    """[O, G]: what is added to a group's numbers, whose codes have no zero then."""
    minimum_factors: torch.Tensor | None = None
    """As `factors`."""
    table: torch.Tensor | None = None
    """[16]: the number that each code of int4 stands for, where that is none less its zero."""
    quantizes_inputs: bool = False
    """The model was made for inputs of FP8, too: products of many rows may take them so."""

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
        **steps: torch.Tensor | None,
    ) -> Coded:
        """With the codes as `ingle.weights.quantized.groups.Groups` has them: of int4, neighbours share a byte."""
        num_columns = codes.shape[1] * (2 if kind == "int4" else 1)
        half = gcd(gcd(group_size, _BLOCK), num_columns) // 2
        if kind == "int4" and half > 1:
            whole = torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1, 2, half)
            codes = (whole[:, :, 0] | whole[:, :, 1] << 4).view(len(codes), -1)
        size = min(group_size, num_columns)
        half, inputs = max(half, 1), padded_from
        return cls(kind, codes, scales, zeros, size, half, order, inputs, quantizes_inputs=quantizes_inputs, **steps)

    @classmethod
    def joined(cls, parts: Sequence[Coded]) -> Coded:
        """Matrices of one form, one below the other; the order of inputs is the first's."""

        def joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
            there = [tensor for tensor in tensors if tensor is not None]
            return torch.cat(there) if there else None

        return replace(
            parts[0],
            codes=torch.cat([part.codes for part in parts]),
            scales=torch.cat([part.scales for part in parts]),
            zeros=joined([part.zeros for part in parts]),
            factors=joined([part.factors for part in parts]),
            minima=joined([part.minima for part in parts]),
            minimum_factors=joined([part.minimum_factors for part in parts]),
        )

    @property
    def num_rows(self) -> int:
        return len(self.codes)

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def num_inputs(self) -> int:
        return self.num_columns if self.padded_from is None else self.padded_from

    @property
    def num_bytes(self) -> int:
        steps = self.factors, self.minima, self.minimum_factors
        held = (self.codes, self.scales, self.zeros, self.order, *steps, self.table)
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
        codes = self.codes[rows]
        if self.kind == "int4":
            blocks = codes.view(len(codes), -1, self.half)
            codes = torch.stack((blocks & 15, blocks >> 4), 2).view(len(codes), -1)
        group = torch.arange(self.num_columns, device=codes.device) // self.group_size
        if self.kind == "fp8":
            values = codes.view(torch.float8_e4m3fn).float()
        elif self.table is not None:
            values = self.table.float()[codes.int()]
        elif self.minima is not None:
            values = codes.float()
        elif self.zeros is None:
            values = codes.float() - MIDDLE[self.kind]
        else:
            values = codes.float() - self.zeros[rows][:, group]
        values *= self._in_floats(self.scales, self.factors, rows)[:, group]
        if self.minima is not None:
            values += self._in_floats(self.minima, self.minimum_factors, rows)[:, group]
        return values.to(dtype)

    def _in_floats(
        self, values: torch.Tensor, factors: torch.Tensor | None, rows: slice | torch.Tensor
    ) -> torch.Tensor:
        """float32 [rows, G]"""
        wide = values[rows].float()
        return wide if factors is None else wide * factors[rows].float().repeat_interleave(self.span, 1)
