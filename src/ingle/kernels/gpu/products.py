"""Matrix products: the library's, or kernels of our own where those are faster."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ingle.kernels.gpu import vector
from ingle.kernels.gpu.device import await_previous, pdl, prefetch
from ingle.kernels.gpu.elementwise import activate, gated
from ingle.kernels.options import Activation

_MAX_ROWS = 64
"""With more, the library shares out its tiles better; with very many, its product takes less power, which decides."""
_ALIGNMENT = 8
"""Numbers of 16 bits in the 16 bytes to which a row has to be aligned."""


class Tiling(NamedTuple):
    """What a program computes: `rows` of x times `outs` rows of gate, and as many of up."""

    rows: int
    outs: int = 64
    depth: int = 128
    """Inputs that one iteration takes."""
    num_stages: int = 4
    """Iterations whose weights are on their way."""
    prefetch: int = 256
    """Inputs asked for before the kernel before has ended."""


def multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """As `ingle.kernels.reference.multiply`."""
    if x.dim() == 2 and vector.suits(x, weight):
        return vector.add(x, weight, bias, None)
    return F.linear(x, weight, bias)


def multiply_gated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """As `ingle.kernels.reference.multiply_gated`."""
    if vector.suits(x, weight):
        return vector.gated(x, None, weight, bias, activation)
    num_rows, size_in = x.shape
    if num_rows > _MAX_ROWS or not pdl(x.device) or x.itemsize != 2 or size_in % _ALIGNMENT or bias is not None:
        return gated(F.linear(x, weight, bias), activation)
    return multiply_gated_by(Tiling(rows=32 if num_rows <= 32 else 64), x, weight, activation)


def multiply_gated_by(shape: Tiling, x: torch.Tensor, weight: torch.Tensor, activation: Activation) -> torch.Tensor:
    """x [M, K] and weight [2 * I, K], the gate first, to [M, I]."""
    num_rows, size_in = x.shape
    size = len(weight) // 2
    out = torch.empty(num_rows, size, dtype=x.dtype, device=x.device)
    early = pdl(x.device)
    _gated_product_kernel[(triton.cdiv(num_rows, shape.rows), triton.cdiv(size, shape.outs))](
        TensorDescriptor.from_tensor(x, [shape.rows, shape.depth]),
        TensorDescriptor.from_tensor(weight, [shape.outs, shape.depth]),
        weight, out, num_rows,
        IN=size_in, SIZE=size, ROWS=shape.rows, OUTS=shape.outs, DEPTH=shape.depth,
        GELU_TANH=activation == "gelu_tanh", PREFETCH=shape.prefetch, PDL=early,
        num_warps=4, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit
def _gated_product_kernel(
    x_desc, weight_desc, weight_ptr, out_ptr, num_rows,
    IN: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    GELU_TANH: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights stand where the tensor cores want many rows: a tile is [OUTS, ROWS]."""
    first_row, first_out = tl.program_id(0) * ROWS, tl.program_id(1) * OUTS
    outs = first_out + tl.arange(0, OUTS)
    if PDL:
        num_bytes = tl.where(outs < SIZE, 2 * min(IN, PREFETCH), 0)
        prefetch(weight_ptr + outs.to(tl.int64) * IN, num_bytes)
        prefetch(weight_ptr + (SIZE + outs).to(tl.int64) * IN, num_bytes)
        await_previous()
    gate = tl.zeros([OUTS, ROWS], tl.float32)
    up = tl.zeros([OUTS, ROWS], tl.float32)
    for k in range(0, IN, DEPTH):
        x = tl.trans(x_desc.load([first_row, k]))
        gate = tl.dot(weight_desc.load([first_out, k]), x, gate)
        up = tl.dot(weight_desc.load([SIZE + first_out, k]), x, up)
    y = tl.trans(activate(gate, GELU_TANH) * up).to(out_ptr.dtype.element_ty)
    rows = first_row + tl.arange(0, ROWS)
    place = out_ptr + rows.to(tl.int64)[:, None] * SIZE + outs[None, :]
    tl.store(place, y, mask=(rows < num_rows)[:, None] & (outs < SIZE)[None, :])
