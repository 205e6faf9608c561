"""Products of many rows with FP8 matrices of checkpoints that were made for FP8 inputs: the tensor cores take both so.

Inputs become FP8 under a scale for each row, or, where the matrix has scales of groups, for each row and 128 columns
(https://arxiv.org/abs/2412.19437, 3.3), whose sums then leave the tensor cores, which add with few bits, for float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.gpu.device import await_previous, multiplies_fp8, pdl

MIN_ROWS = 33
"""With fewer, reading the weights takes the time, and 16-bit inputs cost none."""
BY_GROUPS = False
"""Whether matrices with scales of groups are multiplied so, by a kernel of our own: not before it was measured."""
GROUP = 128
"""Columns of an input that share a scale, where the matrix has groups."""
_AT_ONCE = 8
"""Groups that a program quantizes."""
_NARROW = 8192
"""Rows of weights below which the library's product under scales of rows has too few tiles for the device: the one
under a single scale shares out inputs too, and scales are for a kernel behind it."""
_NARROW_ROWS = 1024


class Tiling(NamedTuple):
    rows: int
    outs: int
    num_warps: int
    num_stages: int


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether x [M, I] may, and should, be multiplied so."""
    whole = coded.scales.shape[1] == 1 or (BY_GROUPS and coded.group_size % GROUP == 0)
    wanted = coded.kind == "fp8" and coded.quantizes_inputs and len(x) >= MIN_ROWS
    return wanted and whole and coded.num_columns % 16 == 0 and coded.num_rows % 16 == 0 and multiplies_fp8(x.device)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias: x [M, I] of 16 bits to [M, O]."""
    if coded.scales.shape[1] > 1:
        return multiply_by(Tiling(128, 128, 8, 3), x, coded, bias)
    values, scales = quantized(x, coded.num_columns)
    matrix = coded.codes.view(torch.float8_e4m3fn).t()
    of_outs = coded.scales.float().view(1, -1)
    by_rows = pdl(x.device) and (coded.num_rows >= _NARROW or len(x) > _NARROW_ROWS or x.dtype != torch.bfloat16)
    if by_rows:
        bias_beside = bias if x.dtype == torch.bfloat16 else None
        out = torch._scaled_mm(
            values, matrix, scale_a=scales, scale_b=of_outs, bias=bias_beside, out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )  # fmt: skip
        return out if x.dtype == torch.bfloat16 else (out if bias is None else out + bias).to(x.dtype)
    one = _one(x.device)
    out = torch._scaled_mm(values, matrix, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return _scaled(out, scales, of_outs, bias).to(x.dtype)


_ones: dict[torch.device, torch.Tensor] = {}


def _one(device: torch.device) -> torch.Tensor:
    if device not in _ones:
        _ones[device] = torch.ones((), device=device)
    return _ones[device]


def _scaled(out: torch.Tensor, scales: torch.Tensor, of_outs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """In place: out [M, O] times the scales of its rows, [M, 1], and of its columns, [1, O], and the bias."""
    early = pdl(out.device)
    _scale_kernel[(len(out), triton.cdiv(out.shape[1], 2048))](
        out, scales, of_outs, out if bias is None else bias, OUT=out.shape[1], BLOCK=2048, BIAS=bias is not None,
        PDL=early, num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit
def _scale_kernel(
    out_ptr, scales_ptr, of_outs_ptr, bias_ptr,
    OUT: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = outs < OUT
    scales = tl.load(of_outs_ptr + outs, mask=mask, other=0.0)
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    place = out_ptr + row * OUT + outs
    out = tl.load(place, mask=mask, other=0.0).to(tl.float32) * (scales * tl.load(scales_ptr + row))
    if BIAS:
        out += tl.load(bias_ptr + outs, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=mask)


def multiply_by(shape: Tiling, x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """By kernels of our own, inputs under a scale for each row and `GROUP` columns."""
    values, scales = quantized(x, GROUP)
    out = torch.empty(len(x), coded.num_rows, dtype=x.dtype, device=x.device)
    early = pdl(x.device)
    _fp8_kernel[(triton.cdiv(len(x), shape.rows), triton.cdiv(coded.num_rows, shape.outs))](
        values, scales, coded.codes.view(torch.float8_e4m3fn), coded.scales, out if bias is None else bias, out, len(x),
        IN=coded.num_columns, OUT=coded.num_rows, GROUPS=coded.scales.shape[1], STEPS=coded.scales.stride(),
        PER_GROUP=max(coded.group_size // GROUP, 1), X_GROUPS=scales.shape[1], ROWS=shape.rows, OUTS=shape.outs,
        DEPTH=GROUP, BIAS=bias is not None, PDL=early,
        num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


def quantized(x: torch.Tensor, group_size: int = GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, I] in FP8, and its scales, float32 [M, groups]."""
    num_rows, size_in = x.shape
    values = torch.empty(num_rows, size_in, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, triton.cdiv(size_in, group_size), dtype=torch.float32, device=x.device)
    early, whole = pdl(x.device), group_size >= size_in
    at_once, width = (1, triton.next_power_of_2(size_in)) if whole else (_AT_ONCE, group_size)
    _quantize_kernel[(num_rows, triton.cdiv(scales.shape[1], at_once))](
        x, values, scales, x.stride(0), IN=size_in, GROUPS=scales.shape[1], GROUP=width, AT_ONCE=at_once, PDL=early,
        num_warps=min(max(width * at_once // 1024, 4), 16), launch_pdl=early,
    )  # fmt: skip
    return values, scales


@triton.jit
def _quantize_kernel(
    x_ptr, values_ptr, scales_ptr, x_stride,
    IN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < IN, other=0.0).to(tl.float32)
    scales = tl.maximum(tl.max(tl.abs(x), 1), 1e-20) / 448.0
    values = (x / scales[:, None]).to(tl.float8e4nv)
    tl.store(values_ptr + row * IN + columns, values, mask=columns < IN)
    tl.store(scales_ptr + row * GROUPS + groups, scales, mask=groups < GROUPS)


@triton.jit
def _fp8_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, num_rows,
    IN: tl.constexpr, OUT: tl.constexpr, GROUPS: tl.constexpr, STEPS: tl.constexpr, PER_GROUP: tl.constexpr,
    X_GROUPS: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr, BIAS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile is [OUTS, ROWS]."""
    if PDL:
        await_previous()
    rows, outs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = rows < num_rows, outs < OUT
    depth = tl.arange(0, DEPTH)
    x_places = x_ptr + rows.to(tl.int64)[None, :] * IN + depth[:, None]
    code_places = codes_ptr + outs.to(tl.int64)[:, None] * IN + depth[None, :]
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for group in range((IN + DEPTH - 1) // DEPTH):
        left = IN - group * DEPTH
        codes = tl.load(code_places + group * DEPTH, mask=in_outs[:, None] & (depth < left)[None, :], other=0.0)
        x = tl.load(x_places + group * DEPTH, mask=in_rows[None, :] & (depth < left)[:, None], other=0.0)
        scales = tl.load(x_scales_ptr + rows * X_GROUPS + group, mask=in_rows, other=0.0)[None, :]
        if GROUPS > 1:
            of_codes = scales_ptr + outs * STEPS[0] + group // PER_GROUP * STEPS[1]
            scales = scales * tl.load(of_codes, mask=in_outs, other=0.0).to(tl.float32)[:, None]
        total += tl.dot(codes, x) * scales
    if GROUPS == 1:
        total *= tl.load(scales_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        total += tl.load(bias_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
    place = out_ptr + rows.to(tl.int64)[None, :] * OUT + outs[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=in_rows[None, :] & in_outs[:, None])
