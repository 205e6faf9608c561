"""Matrices of codes with scales, as products on PyTorch's devices take them."""

from __future__ import annotations

from dataclasses import dataclass
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

    @classmethod
    def of(
        cls,
        kind: CodedKind,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group_size: int,
        order: torch.Tensor | None = None,
    ) -> Coded:
        """With the codes as `ingle.weights.quantized.groups.Groups` has them: of int4, neighbours share a byte."""
        num_columns = codes.shape[1] * (2 if kind == "int4" else 1)
        half = gcd(gcd(group_size, _BLOCK), num_columns) // 2
        if kind == "int4" and half > 1:
            whole = torch.stack((codes & 15, codes >> 4), -1).view(len(codes), -1, 2, half)
            codes = (whole[:, :, 0] | whole[:, :, 1] << 4).view(len(codes), -1)
        return cls(kind, codes, scales, zeros, min(group_size, num_columns), max(half, 1), order)

    @property
    def num_rows(self) -> int:
        return len(self.codes)

    @property
    def num_columns(self) -> int:
        return self.codes.shape[1] * (2 if self.kind == "int4" else 1)

    @property
    def num_bytes(self) -> int:
        held = (self.codes, self.scales, self.zeros, self.order)
        return sum(tensor.numel() * tensor.itemsize for tensor in held if tensor is not None)

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
        elif self.zeros is None:
            values = codes.float() - MIDDLE[self.kind]
        else:
            values = codes.float() - self.zeros[rows][:, group]
        return (values * self.scales[rows].float()[:, group]).to(dtype)
