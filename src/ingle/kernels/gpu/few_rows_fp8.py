"""Products of one or two rows of 16 bits with FP8 matrices on Hopper, whose tensor cores take FP8 as it is.

A number of a row is the sum of two of FP8 under scales of 128 columns: together they have its eight bits. As columns of
a product both are multiplied by weights that take no instruction: a warp has them copied into a ring in an SM's memory,
from before the kernel before has ended, while others make the rows' numbers. So that one row fills the eight columns of
a product, the 64 rows of a tile are fewer rows of weights, each in several parts side by side.

Programs are small and many, with a tile each: an SM runs some side by side, and the next kernel's come as they end. In
Gluon, for Triton decides on its own how far ahead it loads.
"""

# ruff: noqa: RUF005 (Triton unpacks nothing into a tuple)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.elementwise import activate
from ingle.kernels.gpu.rotation import load_rotation, store_rotated

MAX_ROWS = 2
_MOST_NUMBERS = 10240
"""Of all rows, of which every program makes FP8: the time of more shows, and registers hold no more."""
_LEAST_ROWS = 8192
"""Of weights. With fewer `vector` is as fast with one row, and so is FP8 by FP8 with two."""
_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""
_ADD, _ROTATE, _SILU, _GELU = 0, 1, 2, 3
"""What becomes of a product."""
_CHUNK = gl.constexpr(128)
"""Columns under one scale, and bytes of a row that are copied at once."""
_LINES = gl.constexpr(64)
"""Rows of a tile."""
_BLOCK = gl.constexpr(16)
"""Chunks that become FP8 at once."""
_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # from Triton 3.7 on, and before


class Tiling(NamedTuple):
    """What a program computes."""

    parts: int
    """Of a row of weights, side by side in its tile."""
    num_stages: int = 4
    """Chunks of a tile that the ring holds, each of 8 KiB."""
    at_once: int = 2
    """Chunks whose products are begun before the first of them is waited for."""
    registers: int = 64
    """Of a thread when a program starts; then the warp that asks gives up what it does not need."""


@gluon.jit
def _places(block, IN: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of a block of rows' chunks, those of all rows side by side: row, column, and whether it is one."""
    index = block * _BLOCK + gl.arange(0, _BLOCK, gl.SliceLayout(1, LAYOUT))[:, None]
    column = index // ROWS * _CHUNK + gl.arange(0, _CHUNK, gl.SliceLayout(0, LAYOUT))[None, :]
    return index % ROWS, column, column < IN


@gluon.jit
def _load_blocks(
    ptr, stride, num_rows, IN: gl.constexpr, ROWS: gl.constexpr, BLOCKS: gl.constexpr, LAYOUT: gl.constexpr
):
    found = ()
    for block in gl.static_range(BLOCKS):
        row, column, there = _places(block, IN, ROWS, LAYOUT)
        found = found + (gl.load(ptr + row * stride + column, mask=there & (row < num_rows), other=0.0),)
    return found


@gluon.jit
def _keep(x, block, xs, scales):
    """A block of chunks [BLOCK, CHUNK] in two numbers of FP8 each, and what these are to be multiplied by."""
    exponent = gl.max(gl.abs(x), 1).to(gl.int32, bitcast=True) >> 23
    exponent = gl.minimum(gl.maximum(exponent, 16), 248)
    inverse = ((261 - exponent) << 23).to(gl.float32, bitcast=True)  # the largest becomes 128 to 256
    scale = ((exponent - 7) << 23).to(gl.float32, bitcast=True)
    x = x * inverse[:, None]
    # Rounded here: what the assembler of CUDA 12.8 makes of a conversion to FP8 and back is wrong.
    high = ((x.to(gl.int32, bitcast=True) + 0x80000) & -0x100000).to(gl.float32, bitcast=True)
    high, low = high.to(gl.float8e4nv), (x - high).to(gl.float8e4nv)
    both = gl.reshape(gl.permute(gl.join(high, low), [0, 2, 1]), [2 * _BLOCK, _CHUNK])
    xs.index(block).store(both)
    scales.index(block).store(gl.reshape(gl.join(scale, scale), [2 * _BLOCK]))


@gluon.jit
def _produce(
    codes_desc, codes, full, empty, first_out,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, B: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    stage, phase = 0, 1
    for chunk in range(CHUNKS):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), _LINES * _CHUNK)
        place = codes.index(stage)._reinterpret(gl.float8e4nv, [PARTS, HALVES, B, _CHUNK], codes_desc.layout)
        tma.async_copy_global_to_shared(codes_desc, [chunk * PARTS, 0, first_out, 0], full.index(stage), place)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase = phase ^ 1


@gluon.jit
def _load_ends(
    first_out, scales_ptr, bias_ptr, residual_ptr, cos_sin_ptr, kv_places_ptr, num_rows, block, rows,
    OUT: gl.constexpr, HALVES: gl.constexpr, APART: gl.constexpr, HALF: gl.constexpr, EPILOGUE: gl.constexpr,
    BIASED: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """What sums of a tile are multiplied by, and what is added to them; and what `store_rotated` takes."""
    factors, added = (), ()
    outs = first_out + block
    for half in gl.static_range(HALVES):
        mask = outs < OUT - (HALVES - 1 - half) * APART
        factors = factors + (gl.load(scales_ptr + outs, mask=mask, other=0.0).to(gl.float32),)
        more = gl.zeros_like(factors[half])
        if BIASED:
            more = gl.load(bias_ptr + outs, mask=mask, other=0.0).to(gl.float32)
        if RESIDUAL:
            there = mask & (rows < num_rows)
            more = more + gl.load(residual_ptr + rows * OUT + outs, mask=there, other=0.0).to(gl.float32)
        added = added + (more,)
        outs += APART
    rotation = 0
    if EPILOGUE == 1:
        rotation = load_rotation(rows, first_out % HALF + block, rows < num_rows, cos_sin_ptr, kv_places_ptr, HALF)
    return factors, added, rotation


@gluon.jit
def _keep_rows(
    xs, scales, x_ptr, norm_ptr, num_rows, eps, IN: gl.constexpr, ROWS: gl.constexpr, BLOCKS: gl.constexpr,
    NORMED: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """All rows, in the form in which products take them, once the kernel before has left them. Gives what each row's
    sums are to be multiplied by."""
    xs = xs._reinterpret(gl.float8e4nv, [BLOCKS, 2 * _BLOCK, _CHUNK], gl.NVMMASharedLayout(128, 8, 2))
    scales = scales._reinterpret(gl.float32, [BLOCKS, 2 * _BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    norms = ()
    if NORMED:
        norms = _load_blocks(norm_ptr, 0, num_rows, IN, ROWS, BLOCKS, LAYOUT)
    gdc_wait()
    gdc_launch_dependents()
    given = _load_blocks(x_ptr, IN, num_rows, IN, ROWS, BLOCKS, LAYOUT)
    squares = gl.zeros([_BLOCK], gl.float32, gl.SliceLayout(1, LAYOUT))
    for block in gl.static_range(BLOCKS):
        x = given[block].to(gl.float32)
        if NORMED:
            squares += gl.sum(x * x, 1)
            x = x * norms[block].to(gl.float32)
        _keep(x, block, xs, scales)
    fence_async_shared()
    _barrier()
    row_scales = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(0, LAYOUT))
    if NORMED:
        squares = gl.sum(gl.reshape(squares, [_BLOCK // ROWS, ROWS]), 0)
        row_scales = gl.convert_layout(gl.rsqrt(squares / IN + eps), gl.SliceLayout(0, LAYOUT))
    return row_scales


@gluon.jit
def _finish(
    total, ends, row_scales, tile, block, rows, num_rows, x_ptr, out_ptr, kv_ptr, v_offset, page_stride, token_stride,
    head_stride, OUT: gl.constexpr, ROWS: gl.constexpr, B: gl.constexpr, HALVES: gl.constexpr, PARTS: gl.constexpr,
    EPILOGUE: gl.constexpr, HALF: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    PAGE_SIZE: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What becomes of a tile's sums, of which those of a part of weights with the same part of rows count."""
    R: gl.constexpr = B * HALVES
    factors, added, rotation = ends
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    total = gl.sum(gl.reshape(total, [PARTS, R, PARTS, ROWS, 2]), 4)
    total = gl.sum(gl.sum(total, 2), 0)
    place = tile * B + block
    if HALVES == 1:
        total = gl.convert_layout(total, LAYOUT) * (factors[0] * row_scales) + added[0]
        gl.store(out_ptr + rows * OUT + place, total.to(dtype), mask=(place < OUT) & (rows < num_rows))
    else:
        pairs: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [4, 1, 1], [2, 1, 0])
        total = gl.permute(gl.reshape(total, [2, B, ROWS]), [1, 2, 0])
        first, other = gl.split(gl.convert_layout(total, pairs))
        first = gl.convert_layout(first, LAYOUT) * (factors[0] * row_scales) + added[0]
        other = gl.convert_layout(other, LAYOUT) * (factors[1] * row_scales) + added[1]
        if EPILOGUE == 1:
            store_rotated(
                first, other, tile * B // HALF, rows, tile * B % HALF + block, rows < num_rows,
                out_ptr, x_ptr, x_ptr, x_ptr, kv_ptr, x_ptr,
                0.0, v_offset, page_stride, token_stride, head_stride, kv_ptr,
                HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0, rotation,
            )  # fmt: skip
        else:
            out = activate(first, EPILOGUE == 3) * other
            mask = (place < OUT // 2) & (rows < num_rows)
            gl.store(out_ptr + rows * (OUT // 2) + place, out.to(dtype), mask=mask)


@gluon.jit
def _add_chunks(
    total, stage, phase, chunk, codes, xs, scales, full, empty, AT_ONCE: gl.constexpr, STAGES: gl.constexpr,
    COLUMNS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """The sums with products of some chunks, and the stage after theirs."""
    products, factors, stages = (), (), ()
    for each in gl.static_range(AT_ONCE):
        mbarrier.wait(full.index(stage), phase)
        inputs, zeros = xs.index(chunk + each).permute((1, 0)), gl.zeros([_LINES, COLUMNS], gl.float32, MMA)
        products = products + (warpgroup_mma(codes.index(stage), inputs, zeros, use_acc=False, is_async=True),)
        factors = factors + (scales.index(chunk + each).load(gl.SliceLayout(0, MMA)),)
        stages = stages + (stage,)
        stage += 1
        phase = gl.where(stage == STAGES, phase ^ 1, phase)
        stage = gl.where(stage == STAGES, 0, stage)
    products = (warpgroup_mma_wait(0, deps=products),) if AT_ONCE == 1 else warpgroup_mma_wait(0, deps=products)
    for each in gl.static_range(AT_ONCE):
        mbarrier.arrive(empty.index(stages[each]), count=1)
    for each in gl.static_range(AT_ONCE):
        total += products[each] * factors[each][None, :]
    return total, stage, phase


@gluon.jit
def _consume(
    codes, xs, scales, full, empty, x_ptr, norm_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr,
    kv_places_ptr, num_rows, eps, v_offset, page_stride, token_stride, head_stride, tile, first_out,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr,
    AT_ONCE: gl.constexpr, B: gl.constexpr, HALVES: gl.constexpr, APART: gl.constexpr, PARTS: gl.constexpr,
    EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr, RESIDUAL: gl.constexpr, HALF: gl.constexpr,
    NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    COLUMNS: gl.constexpr = 2 * ROWS * PARTS
    BLOCKS: gl.constexpr = (CHUNKS * ROWS * PARTS + _BLOCK - 1) // _BLOCK
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    INPUTS: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    END: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [4, 1], [1, 0])
    block = gl.arange(0, B, gl.SliceLayout(1, END))[:, None]
    rows = gl.arange(0, ROWS, gl.SliceLayout(0, END))[None, :]
    ends = _load_ends(
        first_out, scales_ptr, bias_ptr, residual_ptr, cos_sin_ptr, kv_places_ptr, num_rows, block, rows,
        OUT, HALVES, APART, HALF, EPILOGUE, BIASED, RESIDUAL,
    )  # fmt: skip
    row_scales = _keep_rows(xs, scales, x_ptr, norm_ptr, num_rows, eps, IN, ROWS, BLOCKS, NORMED, INPUTS)
    row_scales = gl.convert_layout(row_scales, gl.SliceLayout(0, END))[None, :]
    total = gl.zeros([_LINES, COLUMNS], gl.float32, MMA)
    stage, phase = 0, 0
    for step in range(CHUNKS // AT_ONCE):
        total, stage, phase = _add_chunks(
            total, stage, phase, step * AT_ONCE, codes, xs, scales, full, empty, AT_ONCE, STAGES, COLUMNS, MMA
        )  # fmt: skip
    if CHUNKS % AT_ONCE:
        total, stage, phase = _add_chunks(
            total, stage, phase, CHUNKS // AT_ONCE * AT_ONCE, codes, xs, scales, full, empty,
            CHUNKS % AT_ONCE, STAGES, COLUMNS, MMA,
        )  # fmt: skip
    line = gl.arange(0, _LINES, gl.SliceLayout(1, MMA))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, MMA))[None, :]
    own = line // (B * HALVES) == column // (2 * ROWS)
    _finish(
        gl.where(own, total, 0.0), ends, row_scales, tile, block, rows, num_rows, x_ptr, out_ptr, kv_ptr,
        v_offset, page_stride, token_stride, head_stride,
        OUT, ROWS, B, HALVES, PARTS, EPILOGUE, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, END,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows"])
def _few_rows_fp8_kernel(
    codes_desc, x_ptr, norm_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, eps, v_offset, page_stride, token_stride, head_stride,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, HALVES: gl.constexpr,
    APART: gl.constexpr, STAGES: gl.constexpr, AT_ONCE: gl.constexpr, EPILOGUE: gl.constexpr, NORMED: gl.constexpr,
    BIASED: gl.constexpr, RESIDUAL: gl.constexpr, HALF: gl.constexpr, NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr,
):  # fmt: skip
    """A tile is [LINES, COLUMNS]: PARTS of rows of weights, neighbours or of two HALVES that are APART, by two parts of
    the numbers of rows."""
    COLUMNS: gl.constexpr = 2 * ROWS * PARTS
    B: gl.constexpr = _LINES // (PARTS * HALVES)
    CHUNKS: gl.constexpr = (IN // _CHUNK + PARTS - 1) // PARTS
    HELD: gl.constexpr = (CHUNKS * ROWS * PARTS + _BLOCK - 1) // _BLOCK * _BLOCK // (ROWS * PARTS)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    tile = gl.program_id(0)
    first_out = tile * B
    if EPILOGUE == 1:
        first_out = first_out // HALF * 2 * HALF + first_out % HALF
    codes = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, _LINES, _CHUNK], TILE)
    xs = gl.allocate_shared_memory(gl.float8e4nv, [HELD, COLUMNS, _CHUNK], TILE)
    scales = gl.allocate_shared_memory(gl.float32, [HELD, COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_consume, (
            codes, xs, scales, full, empty, x_ptr, norm_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr,
            kv_ptr, kv_places_ptr, num_rows, eps, v_offset, page_stride, token_stride, head_stride, tile, first_out,
            IN, OUT, ROWS, CHUNKS, STAGES, AT_ONCE, B, HALVES, APART, PARTS, EPILOGUE, NORMED, BIASED, RESIDUAL, HALF,
            NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
        )),
        (_produce, (codes_desc, codes, full, empty, first_out, CHUNKS, STAGES, B, HALVES, PARTS)),
    ], [1], [24])  # fmt: skip


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether these kernels may, and should, multiply x [M, K] by such a matrix, on a device with warpgroups."""
    return (
        0 < len(x) <= MAX_ROWS
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and coded.kind == "fp8"
        and coded.scales.shape[1] == 1
        and coded.num_columns % _CHUNK.value == 0
        and coded.codes.is_contiguous()
        and coded.codes.data_ptr() % _ALIGNMENT == 0
        and len(x) * coded.num_columns <= _MOST_NUMBERS
        and coded.num_rows >= _LEAST_ROWS
    )


def tiling(num_rows: int) -> Tiling:
    """Of which an SM runs four."""
    return Tiling(parts=4 // num_rows)


def run(
    x: torch.Tensor,
    norm: Norm | None,
    coded: Coded,
    bias: torch.Tensor | None,
    epilogue: int,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    """As `vector._run`."""
    run_by(tiling(len(x)), x, norm, coded, bias, epilogue, out, residual=residual, rotation=rotation)


def run_by(
    shape: Tiling,
    x: torch.Tensor,
    norm: Norm | None,
    coded: Coded,
    bias: torch.Tensor | None,
    epilogue: int,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    (num_rows, size_in), size_out, parts = x.shape, coded.num_rows, shape.parts
    half = 1 if rotation is None else rotation.kv_cache.shape[-1] // 2
    halves = 1 if epilogue == _ADD else 2
    apart = half if epilogue == _ROTATE else size_out // 2 if halves == 2 else 0
    lines = _LINES.value // parts
    codes = TensorDescriptor(
        coded.codes.view(torch.float8_e4m3fn),
        [size_in // _CHUNK.value, halves, size_out - apart, _CHUNK.value],
        [_CHUNK.value, max(apart, 1) * size_in, size_in, 1],
        [parts, halves, lines // halves, _CHUNK.value],
        gl.NVMMASharedLayout(128, 8, 4),
    )
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    _few_rows_fp8_kernel[(triton.cdiv(size_out, lines),)](
        codes, x, x if norm is None else norm.weight, coded.scales, x if bias is None else bias,
        x if residual is None else residual, out, *places,
        num_rows, 0.0 if norm is None else norm.eps,
        *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        IN=size_in, OUT=size_out, ROWS=triton.next_power_of_2(num_rows), PARTS=parts, HALVES=halves, APART=apart,
        STAGES=shape.num_stages, AT_ONCE=shape.at_once, EPILOGUE=epilogue, NORMED=norm is not None,
        BIASED=bias is not None, RESIDUAL=residual is not None, HALF=half,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        num_warps=4, launch_pdl=True, maxnreg=shape.registers,
    )  # fmt: skip
