"""Products of up to 16 rows with FP8 matrices that have a scale for each row, and what stands around them in a layer.

As `few_rows_coded`, but each program has 16 rows of weights, or 8 pairs of them, and asks for codes some iterations
before they are multiplied, and for the first before the kernel before has ended. The device turns two codes into
float16 by one instruction; inputs become float16, too, divided by 64, so that none is too large for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Norm, Rotation
from ingle.kernels.gpu import codes
from ingle.kernels.gpu.device import await_previous, multiplies_fp8, pdl
from ingle.kernels.gpu.elementwise import rms_norm, rotate_and_store
from ingle.kernels.gpu.endings import ADD, GELU, PLAIN, ROTATE, SILU, finish, row_scales
from ingle.kernels.options import Activation

MAX_ROWS = 0
"""Up to 16, which the tensor cores take by eights: not before it was measured."""
_PICK = "{ .reg .b32 t; .reg .b16 l, h; .reg .pred p; setp.ne.s32 p, $5, 0; selp.b32 t, $3, $1, p; mov.b32 {l, h}, t; "
_NUMBERS: tl.constexpr = tl.constexpr(
    _PICK + "setp.ne.s32 p, $7, 0; selp.b16 l, h, l, p; cvt.rn.f16x2.e4m3x2 $0, l; }"
)  # $1 and $2 are a word of a row, $3 and $4 of another; $5 and $6 say which, $7 and $8 which half of it
_FP16: tl.constexpr = tl.constexpr("mov.b32 $0, $1;")
_BF16: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t, a, b; mov.b32 a, 0x3c803c80; mov.b32 b, 0x80008000; fma.rn.bf16x2 t, $1, a, b; "
    "shl.b32 a, t, 16; and.b32 b, t, 0xffff0000; cvt.rn.f16x2.f32 $0, b, a; }"
)  # and divided by 64


class Tiling(NamedTuple):
    num_warps: int = 4
    """Among which a program's columns are shared out, 64 of an iteration for each."""
    ahead: int = 7
    """Iterations whose codes are on their way."""


def tiling(num_rows: int, size_in: int) -> Tiling:
    return Tiling(4 if size_in <= 8192 else 8)


@triton.jit
def _load_codes(
    codes_ptr, first_out, unit: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr,
    INSIDE: tl.constexpr,
):  # fmt: skip
    """int32 [WARPS, 8, 4, 4] of eight rows: of each a lane's four words."""
    index = tl.arange(0, WARPS * 128)
    row = first_out + index // 16 % 8
    if not INSIDE:
        row = tl.minimum(row, OUT - 1)
    word = unit * (WARPS * 16) + index // 128 * 16 + index % 16
    if (unit + 1) * WARPS * 16 > WIDTH:
        word = tl.where(word < WIDTH, word, 0)  # of which the inputs are zeros
    places = codes_ptr + row.to(tl.int64) * WIDTH + word
    if (unit + 1) * WARPS * 16 > WIDTH:  # of which the compiler does not see how far neighbours are
        places = tl.max_contiguous(tl.multiple_of(places, [16]), [4])
    return tl.reshape(tl.load(places), [WARPS, 8, 4, 4])


@triton.jit
def _load_inputs(
    x_ptr, x_words_ptr, x_stride, first_row, num_rows, unit: tl.constexpr, part: tl.constexpr, IN: tl.constexpr,
    WARPS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Eight rows of x, the columns of two of each lane's words."""
    PER: tl.constexpr = 2 if COMPILED else 1  # numbers that are loaded as one
    RUN: tl.constexpr = 8 // PER
    index = tl.arange(0, WARPS * 32 * RUN)
    row = first_row + index // (4 * RUN) % 8
    place = (unit * WARPS + index // (32 * RUN)) * (64 // PER) + index // RUN % 4 * (16 // PER) + part * RUN
    mask = row < num_rows
    if (unit + 1) * WARPS * 64 > IN:
        mask = mask & (place < IN // PER)
    if COMPILED:
        loaded = tl.load(x_words_ptr + row * x_stride + (place + index % RUN), mask=mask, other=0)
    else:
        loaded = tl.load(x_ptr + row * x_stride + (place + index % RUN), mask=mask, other=0.0)
    return loaded


@triton.jit
def _inputs(x, dtype: tl.constexpr, WARPS: tl.constexpr, COMPILED: tl.constexpr):
    """[WARPS, 32, 8] in the order of `_numbers`' columns."""
    if COMPILED:
        words = tl.reshape(x, [WARPS, 8, 4, 2, 2])
        both = tl.join(words, words)
        if dtype == tl.bfloat16:
            numbers = tl.inline_asm_elementwise(_BF16, "=r,r,r", [both], dtype=tl.float16, is_pure=True, pack=2)
        else:
            numbers = tl.inline_asm_elementwise(_FP16, "=r,r,r", [both], dtype=tl.float16, is_pure=True, pack=2)
    else:
        numbers = tl.reshape(x, [WARPS, 8, 4, 2, 2, 2])
    # warp, row, lane, word, half of it, pair
    return tl.reshape(tl.permute(numbers, [0, 3, 2, 4, 5, 1]), [WARPS, 32, 8])


@triton.jit
def _numbers(first, other, dtype: tl.constexpr, WARPS: tl.constexpr, COMPILED: tl.constexpr):
    """int32 [WARPS, 8, 4, 2] of two blocks of eight rows to numbers [WARPS, 16, 32]."""
    second = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 2, 1])
    half = tl.reshape(tl.arange(0, 2) * 16, [1, 1, 1, 1, 2, 1, 1])
    pair = tl.reshape(tl.arange(0, 2) * 8, [1, 1, 1, 1, 1, 1, 2])
    if COMPILED:
        # A pair's dimension comes by joining, which also makes the compiler give a lane four columns in a row.
        first = tl.reshape(tl.join(first, first), [WARPS, 8, 4, 2, 1, 1, 2])
        other = tl.reshape(tl.join(other, other), [WARPS, 8, 4, 2, 1, 1, 2])
        half, pair = tl.broadcast(half, pair)
        first, second = tl.broadcast(first, second)
        first, half = tl.broadcast(first, half)
        other, first = tl.broadcast(other, first)
        second, first = tl.broadcast(second, first)
        out = tl.inline_asm_elementwise(
            _NUMBERS, "=r,r,r,r,r,r,r,r,r", [first, other, second, half], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        first = tl.reshape(first, [WARPS, 8, 4, 2, 1, 1, 1])
        other = tl.reshape(other, [WARPS, 8, 4, 2, 1, 1, 1])
        code = (tl.where(second == 1, other, first) >> (half + pair)) & 255
        out = codes.numbers(code.to(tl.uint8), 0, 2, dtype)
    # warp, row, lane, word, half, second, pair: to rows and columns
    return tl.reshape(tl.permute(out, [0, 5, 1, 3, 2, 4, 6]), [WARPS, 16, 32])


@triton.jit
def _of_rows(scales_ptr, first_out, OUT: tl.constexpr, OUTS: tl.constexpr):
    rows = first_out + tl.arange(0, OUTS)
    return tl.load(scales_ptr + rows, mask=rows < OUT, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_lanes_kernel(
    x_ptr, x_words_ptr, codes_ptr, scales_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr,
    squares_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, x_stride, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
    IN: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, EPILOGUE: tl.constexpr,
    NORMED: tl.constexpr, BIASED: tl.constexpr, SQUARED: tl.constexpr, HALF: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, SQUARES: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    PAIRED: tl.constexpr = EPILOGUE != 0 and EPILOGUE != 4
    OUTS: tl.constexpr = 8 if PAIRED else 16
    INSIDE: tl.constexpr = OUT % 16 == 0
    UNITS: tl.constexpr = (IN + 64 * WARPS - 1) // (64 * WARPS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    first_out = tile * OUTS
    if EPILOGUE == 1:
        first_out = first_out // HALF * 2 * HALF + first_out % HALF
    other_out = first_out + (HALF if EPILOGUE == 1 else OUT // 2 if PAIRED else 8)
    words = ()
    for unit in tl.static_range(AHEAD if AHEAD < UNITS else UNITS):
        words += (_load_codes(codes_ptr, first_out, unit, OUT, IN // 4, WARPS, INSIDE),)
        words += (_load_codes(codes_ptr, other_out, unit, OUT, IN // 4, WARPS, INSIDE),)
    of_first = _of_rows(scales_ptr, first_out, OUT, OUTS)
    of_other = of_first
    if PAIRED:
        of_other = _of_rows(scales_ptr, other_out, OUT, OUTS)
    if PDL:
        await_previous()
    totals = ()
    for _ in tl.static_range(N):
        totals += (tl.zeros([WARPS, 16, 8], tl.float32),)
    for unit in tl.static_range(UNITS):
        if unit + AHEAD < UNITS:
            words += (_load_codes(codes_ptr, first_out, unit + AHEAD, OUT, IN // 4, WARPS, INSIDE),)
            words += (_load_codes(codes_ptr, other_out, unit + AHEAD, OUT, IN // 4, WARPS, INSIDE),)
        firsts = tl.split(tl.permute(tl.reshape(words[2 * unit], [WARPS, 8, 4, 2, 2]), [0, 1, 2, 4, 3]))
        others = tl.split(tl.permute(tl.reshape(words[2 * unit + 1], [WARPS, 8, 4, 2, 2]), [0, 1, 2, 4, 3]))
        for part in tl.static_range(2):
            numbers = _numbers(firsts[part], others[part], dtype, WARPS, COMPILED)
            more = ()
            for n in tl.static_range(N):
                x = _load_inputs(x_ptr, x_words_ptr, x_stride, n * 8, num_rows, unit, part, IN, WARPS, COMPILED)
                more += (tl.dot(numbers, _inputs(x, dtype, WARPS, COMPILED), totals[n], input_precision="ieee"),)
            totals = more
    for n in tl.static_range(N):
        scale = tl.full([1, 8], 64.0 if COMPILED and dtype == tl.bfloat16 else 1.0, tl.float32)
        if NORMED:
            scale *= row_scales(squares_in_ptr, n * 8, num_rows, num_squares, eps, IN, 8, SQUARES)[None, :]
        first = tl.sum(totals[n], 0)
        other = first
        if PAIRED:
            first, other = tl.split(tl.permute(tl.reshape(first, [2, 8, 8]), [1, 2, 0]))
        finish(
            first * (of_first * scale), other * (of_other * scale), first_out, other_out, tile, (OUT + 15) // 16,
            n * 8, num_rows, bias_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr, squares_ptr, cos_sin_ptr, kv_ptr,
            kv_places_ptr, v_offset, page_stride, token_stride, head_stride,
            OUT, 8, OUTS, EPILOGUE, BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
        )  # fmt: skip


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether these kernels may, and should, multiply x [M, K] by such a matrix, with what is fused to that."""
    return len(x) <= MAX_ROWS and x.itemsize == 2 and multiplies_fp8(x.device) and fits(x, coded)


def fits(x: torch.Tensor, coded: Coded) -> bool:
    return (
        0 < len(x) <= 16
        and coded.kind == "fp8"
        and coded.scales.shape[1] == 1
        and coded.order is None
        and coded.num_columns % 16 == 0
        and coded.num_rows % 16 == 0
        and coded.codes.is_contiguous()
        and x.stride(1) == 1
        and x.stride(0) % 8 == 0
        and x.storage_offset() % 8 == 0
    )


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias, for x [M, K]."""
    out = x.new_empty(len(x), coded.num_rows)
    _run(x, coded, bias, None, PLAIN, out)
    return out


def add(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None, residual: torch.Tensor, norm: Norm) -> Flow:
    """residual + x @ matrix.T + bias, for x [M, K] and residual [M, E], on its way to the norm."""
    out = torch.empty_like(residual)
    if x.dtype == torch.float16:  # for which a row times the norm's weight may be too large before it is divided
        _run(x, coded, bias, None, ADD, out, residual=residual, norm=norm)
        return Flow(out, norm)
    values = torch.empty_like(residual)
    squares = torch.empty(len(x), triton.cdiv(coded.num_rows, 16), dtype=torch.float32, device=x.device)
    _run(x, coded, bias, None, ADD, out, residual=residual, norm=norm, values=values, squares=squares)
    return Flow(out, norm, values, squares)


def gated(flow: Flow, coded: Coded, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """activation(gate) * up of the normed rows times a matrix [2 * I, E], the gate in the first half: [M, I]."""
    x = _values(flow)
    out = x.new_empty(len(x), coded.num_rows // 2)
    _run(x, coded, bias, flow.squares, GELU if activation == "gelu_tanh" else SILU, out, norm=flow.norm)
    return out


def project_and_store(flow: Flow, coded: Coded, bias: torch.Tensor | None, rotation: Rotation) -> torch.Tensor:
    """The queries [M, Hq, D] of the normed rows, rotated; keys and values, of later rows, go to the cache."""
    x = _values(flow)
    if rotation.q_norm is not None or rotation.kv_scales is not None:  # which are of whole heads, that no program has
        qkv = x.new_empty(len(x), coded.num_rows)
        _run(x, coded, bias, flow.squares, PLAIN, qkv, norm=flow.norm)
        return rotate_and_store(qkv, *rotation)
    q = x.new_empty(len(x), rotation.num_heads, rotation.kv_cache.shape[-1])
    _run(x, coded, bias, flow.squares, ROTATE, q, norm=flow.norm, rotation=rotation)
    return q


def _values(flow: Flow) -> torch.Tensor:
    """A first flow has none: nothing has been added to it."""
    return rms_norm(flow.residual, flow.norm.weight, flow.norm.eps) if flow.values is None else flow.values


def _run(
    x: torch.Tensor,
    coded: Coded,
    bias: torch.Tensor | None,
    squares_in: torch.Tensor | None,
    epilogue: int,
    out: torch.Tensor,
    *,
    norm: Norm | None = None,
    residual: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    (num_rows, size_in), size_out = x.shape, coded.num_rows
    shape, early = tiling(num_rows, size_in), pdl(x.device)
    num_squares = 1 if squares_in is None else squares_in.shape[1]
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    _fp8_lanes_kernel[(triton.cdiv(size_out, 16),)](
        x, x.view(torch.int32) if x.is_cuda else x, coded.codes.view(torch.int32), coded.scales,
        _or(bias, x), _or(squares_in, x), _or(residual, x), x if norm is None else norm.weight, out, _or(values, x),
        _or(squares, x), *places,
        num_rows, x.stride(0) // (2 if x.is_cuda else 1), num_squares, 0.0 if norm is None else norm.eps,
        *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        IN=size_in, OUT=size_out, N=triton.cdiv(num_rows, 8), WARPS=shape.num_warps, EPILOGUE=epilogue,
        NORMED=squares_in is not None, BIASED=bias is not None, SQUARED=squares is not None,
        HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        SQUARES=triton.next_power_of_2(num_squares), AHEAD=shape.ahead, PDL=early, COMPILED=x.is_cuda,
        num_warps=shape.num_warps, num_stages=1, launch_pdl=early,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
