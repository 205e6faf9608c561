"""Products of many rows with FP8 matrices of checkpoints that were made for FP8 inputs: the tensor cores take both so.

Inputs are rows that `fp8_rows` made, under a scale for each row, or for each row and 128 columns where the matrix has
scales of groups (https://arxiv.org/abs/2412.19437, 3.3), whose sums then leave the tensor cores for float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Quantized
from ingle.kernels.gpu import fp8_few
from ingle.kernels.gpu.device import await_previous, multiplies_fp8, pdl, scales_blocks
from ingle.kernels.gpu.fp8_rows import GROUP, padded, quantize
from ingle.kernels.gpu.scaled import Product, load_product

ENABLED = True
"""Whether any matrix is multiplied so; else inputs stay numbers of 16 bits, as where weights alone are quantized."""
FUSED = True
"""Whether what stands before a product makes its rows FP8, and what stands behind it applies its scales (`fp8_layer`);
else kernels of their own do both."""
MIN_ROWS = 2
"""With fewer, rows of 16 bits are multiplied, by `vector`, with what stands around them."""
_MIN_ROWS_BY_BLOCKS = 17
"""The same of matrices with scales of blocks: below it was not measured."""
BY_BLOCKS = True
"""Whether the library multiplies matrices that have a scale for each block of 128 x 128."""
FAST_INPUTS = 4096
"""Columns up to which sums stay in the tensor cores, as they do for any number of columns in vLLM's products. Of 32
numbers that are added at once, and the sum so far, what lies 13 bits below the largest of them is cut off. So
random products of 3,584 numbers change by 0.12 % (rounding to bfloat16: 0.17 %, inputs to FP8: 2.5 %), but those that
all have one sign, the worst, lose 7 %; of 18,944 numbers they would change by 0.4 %, and lose 37 %. Sums of more
columns leave the tensor cores for float32 every 128 numbers. If all did, a layer of Qwen2-7B would take 4 % longer with
256 rows, and 18 % with 4,096."""
_NARROW = 8192
"""Rows of weights below which the library's product under scales of rows has too few tiles for the device: the one
under a single scale shares out inputs too, and scales are for whatever takes it."""
_NARROW_ROWS = 1024
_BLOCK_COLUMNS = 4 * GROUP
"""The library wants rows of blocks' scales to be of 16 bytes."""


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether as many rows as x [M, ..] has, of a float type, may and should be multiplied so."""
    return (
        ENABLED
        and coded.kind == "fp8"
        and coded.quantizes_inputs
        and len(x) >= (MIN_ROWS if coded.scales.shape[1] == 1 else max(MIN_ROWS, _MIN_ROWS_BY_BLOCKS))
        and x.itemsize == 2
        and coded.num_columns % 16 == 0
        and coded.num_rows % 16 == 0
        and multiplies_fp8(x.device)
        and (coded.scales.shape[1] == 1 or _by_blocks(coded))
    )


def _by_blocks(coded: Coded) -> bool:
    whole = coded.blocks is not None and coded.num_columns % _BLOCK_COLUMNS == 0
    return BY_BLOCKS and whole and scales_blocks(coded.codes.device)


def group_of(coded: Coded) -> int:
    """Columns of an input that share a scale; 0 for all."""
    return 0 if coded.scales.shape[1] == 1 else GROUP


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias: x [M, I] of 16 bits to [M, O]."""
    return finished(product(quantize(x, group_of(coded)), coded, bias, x.dtype), x.dtype)


def product(x: Quantized, coded: Coded, bias: torch.Tensor | None, dtype: torch.dtype) -> Product:
    """x @ matrix.T + bias, on its way to `dtype`."""
    matrix = coded.codes.view(torch.float8_e4m3fn).t()
    if coded.scales.shape[1] > 1:
        assert coded.blocks is not None
        rows = padded(x)
        sums = _library(rows.values, matrix, rows.scales, coded.blocks.t(), None, fast=False)
        return Product(sums[: len(x.values)], None, None, bias)
    fast = coded.num_columns <= FAST_INPUTS
    if fp8_few.suits(len(x.values), coded):
        return Product(fp8_few.multiply(x, coded, bias, dtype, exact=not fast))
    of_outs = coded.scales.float().view(1, -1)  # which they are: no kernel
    if _scales_rows(len(x.values), coded, fast=fast):
        beside = bias if dtype == torch.bfloat16 else None  # the only type that the library adds
        sums = _library(x.values, matrix, x.scales, of_outs, beside, fast=fast)
        return Product(sums, None, None, bias if beside is None else None)
    one = _one(x.values.device)
    return Product(_library(x.values, matrix, one, one, None, fast=fast), x.scales, of_outs, bias)


def _scales_rows(num_rows: int, coded: Coded, *, fast: bool) -> bool:
    """Whether the library's product under scales of rows is the faster one."""
    wide = coded.num_rows >= _NARROW or (fast and num_rows > _NARROW_ROWS)
    return pdl(coded.codes.device) and wide


def _library(
    x: torch.Tensor,
    matrix: torch.Tensor,
    scale_x: torch.Tensor,
    scale_matrix: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    fast: bool,
) -> torch.Tensor:
    return torch._scaled_mm(
        x, matrix, scale_a=scale_x, scale_b=scale_matrix, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=fast
    )


_ones: dict[torch.device, torch.Tensor] = {}


def _one(device: torch.device) -> torch.Tensor:
    if device not in _ones:
        _ones[device] = torch.ones((), device=device)
    return _ones[device]


def finished(product: Product, dtype: torch.dtype) -> torch.Tensor:
    """With its scales and its bias: [M, O], in the place of its sums if those have the type."""
    sums, rows, _, bias = product
    if rows is None and bias is None:
        return sums.to(dtype)
    out = sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)
    early = pdl(out.device)
    _fp8_scale_kernel[(len(out), triton.cdiv(out.shape[1], 2048))](
        *product.pointers, out,
        OUT=out.shape[1], BLOCK=2048, SCALED=rows is not None, BIAS=bias is not None, PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit
def _fp8_scale_kernel(
    sums_ptr, rows_ptr, outs_ptr, bias_ptr, out_ptr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outs < OUT
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(rows_ptr + row) if SCALED else 1.0
    out = load_product(sums_ptr + row * OUT, outs_ptr, bias_ptr, scale, outs, mask, SCALED, BIAS)
    tl.store(out_ptr + row * OUT + outs, out.to(out_ptr.dtype.element_ty), mask=mask)
