"""Products with matrices of codes, in plain PyTorch: what any device can, and what kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ingle.kernels.coded import Coded

_CHUNK = 1 << 22
"""Numbers that are decoded at a time: no matrix is ever whole in memory but as it is stored."""


def multiply_coded(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ matrix.T + bias [O]: [.., I] to [.., O] of the same type."""
    x, rows = coded.ordered(x), max(_CHUNK // coded.num_columns, 1)
    out = x.new_empty(*x.shape[:-1], coded.num_rows)
    for start in range(0, coded.num_rows, rows):
        part = slice(start, min(start + rows, coded.num_rows))
        out[..., part] = F.linear(x, coded.decoded(part, x.dtype), None if bias is None else bias[part])
    return out
