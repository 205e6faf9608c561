"""Products whose scales, and bias, whoever takes them applies."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Product(NamedTuple):
    """What the tensor cores made of FP8 and FP8."""

    sums: torch.Tensor
    """bfloat16 [M, O]"""
    rows: torch.Tensor | None = None
    """float32 [M, 1], scales; None where they, and `outs`, are applied."""
    outs: torch.Tensor | None = None
    """float32 [1, O]"""
    bias: torch.Tensor | None = None
    """[O]; None where it is added, or there is none."""

    @property
    def pointers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """All of it; what there is not is not read."""
        rows, outs, bias = (self.sums if part is None else part for part in self[1:])
        return self.sums, rows, outs, bias


@triton.jit
def load_product(x_ptr, outs_ptr, bias_ptr, scale, columns, mask, SCALED: tl.constexpr, BIAS: tl.constexpr):
    """float32, of a row of a `Product`, whose scale is `scale`."""
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        x *= scale * tl.load(outs_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return x
