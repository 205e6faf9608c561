"""Rows that become FP8 where they are made: behind a norm, behind an activation, or as they are.

Whoever multiplies FP8 by FP8 needs the largest number of a row, or of `GROUP` of its columns, which becomes the largest
that FP8 has. A program that has the whole row in its registers finds it at no cost, and writes half the bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.flow import Norm, Quantized
from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.elementwise import activate, norm_warps, normed
from ingle.kernels.gpu.scaled import Product, load_product
from ingle.kernels.options import Activation

GROUP = 128
"""Columns that share a scale, where a row has several (https://arxiv.org/abs/2412.19437, 3.3)."""
_CHUNK = 4096
"""Columns that a program loads at once, 8 of each thread; of longer rows twice as many."""
_LONG = 8 * _CHUNK


_ALIGNED_ROWS = 16
"""With several scales for a row the library takes multiples of so many, for a line of scales begins at 16 bytes."""


def _empty(num_rows: int, size: int, group: int, device: torch.device) -> Quantized:
    num_groups = triton.cdiv(size, group) if group else 1
    held = num_rows if num_groups == 1 else triton.cdiv(num_rows, _ALIGNED_ROWS) * _ALIGNED_ROWS
    values = torch.empty(held, size, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(num_groups, held, dtype=torch.float32, device=device)
    # The library wants rows' scales side by side, and of several the first groups' of all rows first.
    return Quantized(values[:num_rows], scales.view(num_rows, 1) if num_groups == 1 else scales.t()[:num_rows])


def padded(x: Quantized) -> Quantized:
    """Rows under several scales, with those beyond them that `_empty` made room for, which nobody has written."""
    held = x.scales.stride(1)
    return Quantized(*(each.as_strided((held, each.shape[1]), each.stride()) for each in x))


def quantize(x: torch.Tensor, group: int = 0) -> Quantized:
    """x [M, K] under a scale for each row, or for each `group` of its columns."""
    out = _empty(len(x), x.shape[1], group, x.device)
    _run(Product(x), x, out, group, activation=None)
    return out


def gated(product: Product, like: torch.Tensor, activation: Activation, group: int = 0) -> Quantized:
    """activation(gate) * up of a product [M, 2 * I] with the gate in the first half, rounded to the type of `like`."""
    out = _empty(len(product.sums), product.sums.shape[1] // 2, group, product.sums.device)
    _run(product, like, out, group, activation)
    return out


def normed_rows(residual: torch.Tensor, norm: Norm, group: int = 0) -> Quantized:
    """The norm of residual [M, E]."""
    return _norm(None, residual, norm, None, group)


def add_normed(
    product: Product, residual: torch.Tensor, norm: Norm, post_norm: Norm | None = None, group: int = 0
) -> Quantized:
    """The norm of the sum, which takes the place of residual [M, E]; with `post_norm` the product is normed first."""
    return _norm(product, residual, norm, post_norm, group)


def _norm(product: Product | None, residual: torch.Tensor, norm: Norm, post_norm: Norm | None, group: int) -> Quantized:
    num_rows, size = residual.shape
    out, early = _empty(num_rows, size, group, residual.device), pdl(residual.device)
    block = max(triton.next_power_of_2(size), group)
    given = Product(residual) if product is None else product
    _fp8_norm_kernel[(num_rows,)](
        *given.pointers, residual if post_norm is None else post_norm.weight, residual,
        norm.weight, *out, out.scales.stride(1), given.sums.stride(0), norm.eps,
        SIZE=size, BLOCK=block, GROUP=group, ADD=product is not None, SCALED=given.rows is not None,
        BIAS=given.bias is not None, POST=post_norm is not None, PDL=early,
        num_warps=norm_warps(block), launch_pdl=early,
    )  # fmt: skip
    return out


def _run(product: Product, like: torch.Tensor, out: Quantized, group: int, activation: Activation | None) -> None:
    num_rows, size = out.values.shape
    early = pdl(like.device)
    chunk = min(max(triton.next_power_of_2(size), GROUP), _CHUNK if size <= _LONG else 2 * _CHUNK)
    _fp8_rows_kernel[(num_rows,)](
        *product.pointers, like, *out, out.scales.stride(1), product.sums.stride(0),
        SIZE=size, CHUNK=chunk, CHUNKS=triton.cdiv(size, chunk), GROUP=group, GATED=activation is not None,
        GELU_TANH=activation == "gelu_tanh", SCALED=product.rows is not None, BIAS=product.bias is not None, PDL=early,
        num_warps=min(max(chunk // 256, 1), 16), launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _scale_of(largest):
    """And one over it: zeros stay zeros."""
    largest = tl.maximum(largest, 1e-20)
    return largest / 448.0, 448.0 / largest


@triton.jit
def _store_groups(
    x,
    first_column,
    row,
    scales_stride,
    values_ptr,
    scales_ptr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Of a row the columns x [BLOCK] from `first_column` on, each GROUP under a scale of its own."""
    GROUPS: tl.constexpr = BLOCK // GROUP
    blocks = tl.reshape(x, [GROUPS, GROUP])
    scales, inverse = _scale_of(tl.max(tl.abs(blocks), 1))
    codes = tl.reshape((blocks * inverse[:, None]).to(tl.float8e4nv), [BLOCK])
    columns = first_column + tl.arange(0, BLOCK)
    groups = first_column // GROUP + tl.arange(0, GROUPS)
    tl.store(values_ptr + row * SIZE + columns, codes, mask=columns < SIZE)
    tl.store(scales_ptr + groups * scales_stride + row, scales, mask=groups * GROUP < SIZE)


@triton.jit
def _fp8_norm_kernel(
    x_ptr, rows_ptr, outs_ptr, bias_ptr, post_weight_ptr, residual_ptr, weight_ptr, values_ptr, scales_ptr,
    scales_stride, x_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr,
    BIAS: tl.constexpr, POST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype: tl.constexpr = residual_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if POST:
        post_weight = tl.load(post_weight_ptr + columns, mask=mask, other=0.0)
    if PDL:
        await_previous()
    scale = tl.load(rows_ptr + row) if SCALED else 1.0
    x = load_product(x_ptr + row * x_stride, outs_ptr, bias_ptr, scale, columns, mask, SCALED, BIAS)
    if POST:
        x = normed(x.to(dtype), post_weight, eps, SIZE).to(tl.float32)
    total = x.to(dtype)
    if ADD:
        place = residual_ptr + row * SIZE + columns
        total = (x + tl.load(place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(place, total, mask=mask)
    y = normed(total, weight, eps, SIZE).to(tl.float32)
    if GROUP:
        _store_groups(y, 0, row, scales_stride, values_ptr, scales_ptr, SIZE, BLOCK, GROUP)
    else:
        scale_of, inverse = _scale_of(tl.max(tl.abs(y), 0))
        tl.store(values_ptr + row * SIZE + columns, (y * inverse).to(tl.float8e4nv), mask=mask)
        tl.store(scales_ptr + row, scale_of)


@triton.jit
def _fp8_rows_kernel(
    x_ptr, rows_ptr, outs_ptr, bias_ptr, like_ptr, values_ptr, scales_ptr, scales_stride, x_stride,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr,
    GELU_TANH: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = like_ptr.dtype.element_ty
    if PDL:
        await_previous()
    row_ptr = x_ptr + row * x_stride
    scale = tl.load(rows_ptr + row) if SCALED else 1.0
    largest = tl.zeros([CHUNK], tl.float32)  # of a thread's own columns: one exchange between threads is enough
    parts = ()
    for chunk in tl.static_range(CHUNKS):
        columns = chunk * CHUNK + tl.arange(0, CHUNK)
        mask = columns < SIZE
        y = load_product(row_ptr, outs_ptr, bias_ptr, scale, columns, mask, SCALED, BIAS)
        if GATED:
            up = load_product(row_ptr, outs_ptr, bias_ptr, scale, SIZE + columns, mask, SCALED, BIAS)
            y = activate(y, GELU_TANH).to(dtype) * up.to(dtype)
        if GROUP:
            _store_groups(
                y.to(tl.float32), chunk * CHUNK, row, scales_stride, values_ptr, scales_ptr, SIZE, CHUNK, GROUP
            )
        else:
            largest = tl.maximum(largest, tl.abs(y.to(tl.float32)))
            parts += (y.to(dtype),)
    if not GROUP:
        scale_of, inverse = _scale_of(tl.max(largest, 0))
        for chunk in tl.static_range(CHUNKS):
            columns = chunk * CHUNK + tl.arange(0, CHUNK)
            codes = (parts[chunk].to(tl.float32) * inverse).to(tl.float8e4nv)
            tl.store(values_ptr + row * SIZE + columns, codes, mask=columns < SIZE)
        tl.store(scales_ptr + row, scale_of)
