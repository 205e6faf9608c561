"""Products of a few rows with int4 on Hopper, as in `few_rows_coded`: codes come long before they are wanted.

A program has a ring of places in an SM's memory, into which a warp has codes and inputs copied several iterations
ahead, while others multiply. Codes become numbers in the registers in which the tensor cores take them: a lane reads 16
neighbouring bytes of a row of weights, and 16 neighbours of a row of inputs for either half of those bytes, so the
order of columns is the one in which codes lie. Warps share out rows of weights, and blocks of columns.

In Gluon, for Triton decides on its own where what is loaded goes, and how far ahead. What stands at a product's end is
common to both (`endings`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.device import await_previous, counters, num_sms, pdl
from ingle.kernels.gpu.endings import ADD, GELU, PLAIN, ROTATE, SILU, finish, row_scales

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # from Triton 3.7 on, and before
_CHUNK = 128
"""Columns of a block of codes, whose halves share bytes."""
_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""

_PER_SM = 3
"""Programs that an SM runs side by side."""
_MOST_BLOCKS = 3
"""Of a program, for whose sums there are registers."""
_LEAST_UNITS = 2
_MOST_UNITS = 32
"""Iterations of a program with a part of a row, at least: its beginning and its end take longer than one; and at
most."""
_LONG = 8192
"""Columns from which on programs share out a row."""

# Of a word, that is of four columns and of those 64 further, four registers of two numbers. A code's bits alone are a
# float below the lowest exponent, so one instruction makes it as large as it should be and takes away its zero. Of a
# byte's two the upper one is the byte less the lower: multiplications and additions have twice the rate of masks.
_PAIRS = (
    "{ .reg .b32 a, b, c, d, l, h, n; mov.b32 l, LOW; mov.b32 h, HIGH; mov.b32 n, LESS; "
    "prmt.b32 a, $4, 0, 0x4140; prmt.b32 c, $4, 0, 0x4342; and.b32 b, a, 0x000f000f; and.b32 d, c, 0x000f000f; "
    "fma.rn.TYPE a, a, h, $6; fma.rn.TYPE c, c, h, $6; fma.rn.TYPE $0, b, l, $6; fma.rn.TYPE $1, b, n, a; "
    "fma.rn.TYPE $2, d, l, $6; fma.rn.TYPE $3, d, n, c; }"
)
_BF16_ASM = gl.constexpr(  # 2 ** 127, 2 ** 123
    _PAIRS.replace("TYPE", "bf16x2")
    .replace("LOW", "0x7f007f00")
    .replace("HIGH", "0x7d007d00")
    .replace("LESS", "0xfd00fd00")
)
_FP16_ASM = gl.constexpr(  # 2 ** 15, 2 ** 11
    _PAIRS.replace("TYPE", "f16x2")
    .replace("LOW", "0x78007800")
    .replace("HIGH", "0x68006800")
    .replace("LESS", "0xe800e800")
)
_BF16, _FP16 = gl.constexpr((gl.bfloat16,) * 4), gl.constexpr((gl.float16,) * 4)


@gluon.constexpr_function
def _words_layout(outs, warps, shares):
    """A lane has four words of a row of weights, and of the row eight further."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 8, 0], *([0, at, 0] for at in _powers(16 * warps, outs))]
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    of_warps = [*([0, at, 0] for at in _powers(16, 16 * warps)), *([at, 0, 0] for at in _powers(1, shares))]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [shares, outs, 16])


@gluon.constexpr_function
def _inputs_layout(rows, warps, shares):
    """A lane has 16 neighbours of a row of inputs, and those 64 further."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, rows, 0], *([0, at, 0] for at in _powers(8, rows))]
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    of_warps = [*([0, 0, 0] for _ in _powers(1, warps)), *([at, 0, 0] for at in _powers(1, shares))]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [shares, 2 * rows, 64])


@gluon.constexpr_function
def _steps_layout(outs, held, warps):
    """A lane has four chunks of a row of weights."""
    lanes = min(outs, 32)
    of_outs = min(outs // lanes, warps)
    return gl.BlockedLayout([1, 4 if held > 2 else 1], [lanes, 32 // lanes], [of_outs, warps // of_outs], [1, 0])


@gluon.constexpr_function
def _ends_layout(warps):
    """Of rows of weights by those of inputs: neighbours of a row of outputs are stored together."""
    return gl.BlockedLayout([2, 1], [8, 4], [max(warps // 4, 1), min(warps, 4)], [0, 1])


@gluon.constexpr_function
def _powers(first, end):
    """Of two, from `first` to below `end`."""
    return [1 << bit for bit in range(first.bit_length() - 1, end.bit_length() - 1)]


@gluon.jit
def _numbers(words, zeros, SHARES: gl.constexpr, OUTS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """int32 [SHARES, OUTS, 16], and zeros [SHARES, OUTS, 1], to numbers [SHARES, OUTS, 128], in the order of `_inputs`,
    by UNIT smaller."""
    # Twice, for the assembly makes two numbers at once.
    zeros, words = gl.broadcast(zeros, words)
    zeros, words = gl.join(zeros, zeros), gl.join(words, words)
    low, high, low_after, high_after = gl.inline_asm_elementwise(
        _BF16_ASM if dtype == gl.bfloat16 else _FP16_ASM, "=r,=r,=r,=r,r,r,r,r", [words, zeros],
        dtype=_BF16 if dtype == gl.bfloat16 else _FP16, is_pure=True, pack=2,
    )  # fmt: skip
    numbers = gl.join(gl.join(low, low_after), gl.join(high, high_after))
    numbers = gl.reshape(numbers, [SHARES, OUTS, 4, 4, 2, 2, 2])  # share, row, lane, word, number, pair, half
    return gl.convert_layout(gl.reshape(gl.permute(numbers, [0, 1, 6, 3, 5, 2, 4]), [SHARES, OUTS, 128]), layout)


@gluon.jit
def _inputs(x, SHARES: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """[SHARES, 2 * ROWS, 64] to [SHARES, 128, ROWS]"""
    x = gl.reshape(x, [SHARES, 2, ROWS, 4, 4, 2, 2])  # share, half, row, lane, word, pair, number
    return gl.convert_layout(gl.reshape(gl.permute(x, [0, 1, 4, 5, 3, 6, 2]), [SHARES, 128, ROWS]), layout)


@gluon.jit
def _steps(
    scales_ptr, zeros_ptr, first_out, first_chunk, num_chunks, OUT: gl.constexpr,
    OUTS: gl.constexpr, R: gl.constexpr, APART: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    HELD: gl.constexpr, ZEROS: gl.constexpr, dtype: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """int32 [HELD, OUTS]: of chunks, the scale's 16 bits, and below them those of the zero, negative, UNIT smaller."""
    layout: gl.constexpr = _steps_layout(OUTS, HELD, gl.num_warps())
    of_tile = gl.arange(0, OUTS, layout=gl.SliceLayout(1, layout))
    outs = first_out + of_tile % R + of_tile // R * APART
    chunk = gl.arange(0, HELD, layout=gl.SliceLayout(0, layout))[None, :]
    there = (chunk < num_chunks) & (outs < OUT)[:, None]
    group = first_chunk + chunk
    if GROUP != 128:
        group = group * 128 // GROUP
    places = outs[:, None] * GROUPS + group
    scales = gl.load(scales_ptr + places, mask=there, other=0.0).to(gl.int16, bitcast=True)
    zeros = gl.full([OUTS, HELD], 8, gl.float32, layout)
    if ZEROS:
        zeros = gl.load(zeros_ptr + places, mask=there, other=0).to(gl.float32)
    zeros = (zeros / -UNIT).to(dtype).to(gl.int16, bitcast=True)
    return gl.permute(scales.to(gl.int32) << 16 | zeros.to(gl.int32) & 0xFFFF, [1, 0])


@gluon.jit(do_not_specialize=["num_rows"])
def _few_rows_ring_kernel(
    codes_desc, x_desc, scales_ptr, zeros_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr,
    squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, SHARES: gl.constexpr,
    OUTS: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, APART: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, SPLITS: gl.constexpr, EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr,
    SQUARED: gl.constexpr, SQUARES: gl.constexpr, HALF: gl.constexpr, NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    HELD: gl.constexpr, ZEROS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A tile has BLOCKS of OUTS rows of weights: neighbours, or those of two HALVES that are APART. A unit is CHUNKS
    of 128 columns, of which STAGES are in the ring; SHARES of the warps take its chunks in turn."""
    UNITS: gl.constexpr = IN // (128 * CHUNKS)
    tile, split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    first_unit = UNITS * split // SPLITS
    num_units = UNITS * (split + 1) // SPLITS - first_unit
    share = (tile, split, first_unit, num_units)
    codes = gl.allocate_shared_memory(gl.int32, [STAGES * BLOCKS, CHUNKS, OUTS, 16], gl.NVMMASharedLayout(64, 32, 3))
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, CHUNKS, 2 * ROWS, 64], gl.NVMMASharedLayout(128, 16, 3))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (
            codes, xs, full, free, share, scales_ptr, zeros_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr,
            out_ptr, values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
            num_rows, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
            IN, OUT, ROWS, WARPS, SHARES, OUTS, BLOCKS, HALVES, APART, CHUNKS, STAGES, SPLITS, EPILOGUE, NORMED,
            BIASED, SQUARED, SQUARES, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, GROUP, GROUPS, HELD, ZEROS, PDL,
        )),
        (_bring, (
            codes_desc, x_desc, codes, xs, full, free, share,
            ROWS, OUTS // HALVES, BLOCKS, HALVES, CHUNKS, STAGES, HALF, EPILOGUE, PDL,
        )),
    ], [1], [24])  # fmt: skip


@gluon.jit
def _bring(
    codes_desc, x_desc, codes, xs, full, free, share,
    ROWS: gl.constexpr, R: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, HALF: gl.constexpr, EPILOGUE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Has codes and inputs copied where there is room; the first codes before the kernel before has ended."""
    tile, _, first_unit, num_units = share
    for stage in gl.static_range(STAGES):
        there = stage < num_units
        _copy_codes(
            codes_desc, codes, full, stage, tile, first_unit + stage, there,
            ROWS, R, BLOCKS, HALVES, CHUNKS, HALF, EPILOGUE,
        )  # fmt: skip
    if PDL:
        await_previous()
    for stage in gl.static_range(STAGES):
        _copy_inputs(x_desc, xs, full, stage, first_unit + stage, stage < num_units, CHUNKS, ROWS)
    stage, phase = 0, 0
    for index in range(STAGES, num_units):
        mbarrier.wait(free.index(stage), phase)
        _copy_codes(
            codes_desc, codes, full, stage, tile, first_unit + index, True,
            ROWS, R, BLOCKS, HALVES, CHUNKS, HALF, EPILOGUE,
        )  # fmt: skip
        _copy_inputs(x_desc, xs, full, stage, first_unit + index, True, CHUNKS, ROWS)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)


@gluon.jit
def _copy_codes(
    desc, codes, full, stage, tile, unit, there,
    ROWS: gl.constexpr, R: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, CHUNKS: gl.constexpr,
    HALF: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """Of a unit, whose inputs are to come, too."""
    mbarrier.expect(full.index(stage), (BLOCKS * HALVES * R * 64 + ROWS * 256) * CHUNKS, pred=there)
    for block in gl.static_range(BLOCKS):
        place = codes.index(stage * BLOCKS + block)._reinterpret(gl.int32, [CHUNKS, HALVES, R, 16], desc.layout)
        at = [unit * CHUNKS, 0, _first_out(tile * BLOCKS + block, R, HALF, EPILOGUE), 0]
        tma.async_copy_global_to_shared(desc, at, full.index(stage), place, pred=there)


@gluon.jit
def _copy_inputs(desc, xs, full, stage, unit, there, CHUNKS: gl.constexpr, ROWS: gl.constexpr):
    place = xs.index(stage)._reinterpret(desc.dtype, [CHUNKS, 2, ROWS, 64], desc.layout)
    tma.async_copy_global_to_shared(desc, [unit * CHUNKS, 0, 0, 0], full.index(stage), place, pred=there)


@gluon.jit
def _multiply(
    codes, xs, full, free, share, scales_ptr, zeros_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr,
    values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, SHARES: gl.constexpr,
    OUTS: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, APART: gl.constexpr, CHUNKS: gl.constexpr,
    STAGES: gl.constexpr, SPLITS: gl.constexpr, EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr,
    SQUARED: gl.constexpr, SQUARES: gl.constexpr, HALF: gl.constexpr, NUM_HEADS: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    HELD: gl.constexpr, ZEROS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    tile, split, first_unit, num_units = share
    R: gl.constexpr = OUTS // HALVES
    dtype: gl.constexpr = xs.dtype
    UNIT: gl.constexpr = 64.0 if dtype == gl.bfloat16 else 512.0
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [SHARES, WARPS // SHARES, 1], [1, 16, 8])
    numbers_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    inputs_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    words_layout: gl.constexpr = _words_layout(OUTS, WARPS // SHARES, SHARES)
    loaded_layout: gl.constexpr = _inputs_layout(ROWS, WARPS // SHARES, SHARES)
    ends_layout: gl.constexpr = _ends_layout(WARPS)
    of_outs: gl.constexpr = gl.SliceLayout(1, ends_layout)

    steps = gl.allocate_shared_memory(gl.int32, [BLOCKS, HELD, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    for block in gl.static_range(BLOCKS):
        first_out = _first_out(tile * BLOCKS + block, R, HALF, EPILOGUE)
        held = _steps(
            scales_ptr, zeros_ptr, first_out, first_unit * CHUNKS, num_units * CHUNKS, OUT, OUTS, R, APART, GROUP,
            GROUPS, HELD, ZEROS, dtype, UNIT,
        )  # fmt: skip
        steps.index(block).store(held)
    steps = steps._reinterpret(
        gl.int32, [BLOCKS * (HELD // CHUNKS), CHUNKS, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    if PDL:
        await_previous()
    if NORMED:
        of_squares: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_squares))[:, None]
        piece = gl.arange(0, SQUARES, layout=gl.SliceLayout(0, of_squares))[None, :]
        scale_of_rows = row_scales(squares_in_ptr, row, piece, num_rows, num_squares, eps, IN)
        scale_of_rows = gl.convert_layout(scale_of_rows, gl.SliceLayout(0, ends_layout))[None, :]

    totals = ()
    for _ in gl.static_range(BLOCKS):
        totals += (gl.zeros([SHARES, OUTS, ROWS], gl.float32, layout),)
    stage, phase = 0, 0
    for index in range(num_units):
        mbarrier.wait(full.index(stage), phase)
        for turn in gl.static_range(CHUNKS // SHARES):
            loaded = xs.index(stage).slice(turn * SHARES, SHARES).load(loaded_layout)
            x = _inputs(loaded, SHARES, ROWS, inputs_layout)
            sums = ()
            for block in gl.static_range(BLOCKS):
                words = codes.index(stage * BLOCKS + block).slice(turn * SHARES, SHARES).load(words_layout)
                step = steps.index(block * (HELD // CHUNKS) + index).slice(turn * SHARES, SHARES)
                step = step.load(gl.SliceLayout(2, words_layout))
                zeros = gl.expand_dims((step << 16) | (step & 0xFFFF), 2)
                numbers = _numbers(words, zeros, SHARES, OUTS, dtype, numbers_layout)
                scale = gl.convert_layout(step, gl.SliceLayout(2, layout)) >> 16
                scale = scale.to(gl.int16).to(scales_ptr.dtype.element_ty, bitcast=True).to(gl.float32) * UNIT
                part = mma_v2(numbers, x, gl.zeros([SHARES, OUTS, ROWS], gl.float32, layout))
                sums += (totals[block] + part * gl.expand_dims(scale, 2),)
            totals = sums
        mbarrier.arrive(free.index(stage), count=1)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)

    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, ends_layout))[None, :]
    of_block = gl.arange(0, R, layout=of_outs)[:, None]
    # The ring is done.
    left = codes._reinterpret(gl.float32, [BLOCKS * SHARES, OUTS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    of_shares = codes._reinterpret(
        gl.float32, [BLOCKS, SHARES, OUTS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 2, 0])
    )
    for block in gl.static_range(BLOCKS):
        of_shares.index(block).store(totals[block])
    sums = ()
    for part in gl.static_range(BLOCKS * HALVES):
        total = gl.zeros([R, ROWS], gl.float32, ends_layout)
        for share in gl.static_range(SHARES):
            place = left.index(part // HALVES * SHARES + share).slice(part % HALVES * R, R)
            total += place.load(ends_layout)
        if NORMED:
            total *= scale_of_rows
        sums += (total,)
    done = True
    if SPLITS > 1:
        SIZE: gl.constexpr = R * ROWS
        PARTS: gl.constexpr = BLOCKS * HALVES
        place = parts_ptr + tile.to(gl.int64) * (SPLITS * PARTS * SIZE) + rows * R + of_block
        for part in gl.static_range(PARTS):
            gl.store(place + (split * PARTS + part) * SIZE, sums[part])
        _barrier()  # the whole program's stores come before its arrival
        done = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if done:
            gl.store(arrived_ptr + tile, 0)
            joined = ()
            for part in gl.static_range(PARTS):
                joined += (_joined(place + part * SIZE, SPLITS, PARTS * SIZE),)
            sums = joined
    if done:
        for block in gl.static_range(BLOCKS):
            first_out = _first_out(tile * BLOCKS + block, R, HALF, EPILOGUE)
            finish(
                sums[block * HALVES], sums[block * HALVES + HALVES - 1], first_out, first_out + APART,
                tile * BLOCKS + block, OUT // OUTS, of_block, rows, num_rows, bias_ptr, residual_ptr, norm_ptr,
                out_ptr, values_ptr, squares_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
                v_offset, page_stride, token_stride, head_stride,
                OUT, R, EPILOGUE, BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
            )  # fmt: skip


@gluon.jit
def _first_out(block, R: gl.constexpr, HALF: gl.constexpr, EPILOGUE: gl.constexpr):
    """The first row of a block, one half's where it has those of two."""
    out = block * R
    if EPILOGUE == 1:
        out = out // HALF * 2 * HALF + out % HALF
    return out


@gluon.jit
def _joined(place, SPLITS: gl.constexpr, SIZE: gl.constexpr):
    """The sum of what all programs of a tile left, in order, all asked for at once."""
    left = (gl.load(place, cache_modifier=".cg"),)
    for index in gl.static_range(1, SPLITS):
        left += (gl.load(place + index * SIZE, cache_modifier=".cg"),)
    total = left[0]
    for index in gl.static_range(1, SPLITS):
        total += left[index]
    return total


class Tiling(NamedTuple):
    """How a product is shared out."""

    outs: int
    """Rows of weights of a block, of both halves where there are such."""
    num_blocks: int
    """That a program has."""
    num_splits: int
    """Programs that share a tile's inputs."""
    num_stages: int
    """Iterations whose codes are in the ring."""
    num_chunks: int
    """Of 128 columns, that an iteration takes."""
    num_warps: int
    """That multiply."""
    num_shares: int
    """Among which an iteration's chunks are shared out, each of some of the warps."""
    registers: int
    """Of a thread when a program starts: then the warp that copies gives up what it does not need."""

    def run(
        self,
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
        device, (num_rows, size_in), size_out = x.device, x.shape, coded.num_rows
        rows, width = 8 if num_rows <= 8 else 16, coded.codes.shape[1] // 4
        half = 1 if rotation is None else rotation.kv_cache.shape[-1] // 2
        halves = 1 if epilogue in (ADD, PLAIN) else 2
        apart = half if epilogue == ROTATE else size_out // 2 if halves == 2 else 0
        codes = TensorDescriptor(
            coded.codes.view(torch.int32),
            [width // 16, halves, size_out - apart, 16],
            [16, max(apart, 1) * width, width, 1],
            [self.num_chunks, halves, self.outs // halves, 16],
            gl.NVMMASharedLayout(64, 32, 4),
        )
        inputs = TensorDescriptor(
            x,
            [size_in // _CHUNK, 2, num_rows, _CHUNK // 2],
            [_CHUNK, _CHUNK // 2, x.stride(0), 1],
            [self.num_chunks, 2, rows, _CHUNK // 2],
            gl.NVMMASharedLayout(128, 16, 4),
        )
        num_tiles, num_splits, parts = triton.cdiv(size_out, self.outs * self.num_blocks), self.num_splits, x
        if num_splits > 1:
            size = num_tiles * num_splits * self.num_blocks * self.outs * rows
            parts = x.new_empty(size, dtype=torch.float32)
        num_units = triton.cdiv(size_in // (_CHUNK * self.num_chunks), num_splits)
        held, groups = triton.next_power_of_2(num_units) * self.num_chunks, coded.scales.shape[1]
        early, num_squares = pdl(device), 1 if squares_in is None else squares_in.shape[1]
        places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
        _few_rows_ring_kernel[(num_tiles * num_splits,)](
            codes, inputs, coded.scales, _or(coded.zeros, coded.codes), _or(bias, x), _or(squares_in, x),
            _or(residual, x), x if norm is None else norm.weight, out, _or(values, x), _or(squares, x), parts,
            counters(device), *places,
            num_rows, num_squares, 0.0 if norm is None else norm.eps,
            *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
            IN=size_in, OUT=size_out, ROWS=rows, WARPS=self.num_warps, SHARES=self.num_shares, OUTS=self.outs,
            BLOCKS=self.num_blocks, HALVES=halves, APART=apart, CHUNKS=self.num_chunks, STAGES=self.num_stages,
            SPLITS=num_splits, EPILOGUE=epilogue, NORMED=squares_in is not None, BIASED=bias is not None,
            SQUARED=squares is not None, SQUARES=triton.next_power_of_2(num_squares), HALF=half,
            NUM_HEADS=0 if rotation is None else rotation.num_heads,
            NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
            PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
            GROUP=coded.group_size, GROUPS=groups, HELD=held, ZEROS=coded.zeros is not None, PDL=early,
            num_warps=self.num_warps, maxnreg=self.registers, launch_pdl=early,
        )  # fmt: skip


def tiling(x: torch.Tensor, coded: Coded, epilogue: int, half: int = 1) -> Tiling | None:
    """For a product that ends so, of heads with such halves; None where this kernel does not fit."""
    if not _fits(x, coded) or (epilogue == ROTATE and half % 16):
        return None
    num_blocks, chunks, sms = coded.num_rows // 32, coded.num_columns // _CHUNK, num_sms(x.device)
    if epilogue in (SILU, GELU):
        # As many blocks as let all programs run at once.
        num_blocks = min(triton.cdiv(num_blocks, _PER_SM * sms), _MOST_BLOCKS)
        return Tiling(32, num_blocks, 1, num_stages=2, num_chunks=2, num_warps=4, num_shares=2, registers=80)
    if sms < 2 * num_blocks <= 4 * sms and chunks % 4 == 0 and coded.num_columns <= _LONG:
        # Behind attention, which has other things to wait for than memory, all codes come before.
        num_stages = 7 if epilogue == ADD and num_blocks <= sms else 4
        return Tiling(32, 1, 1, num_stages, num_chunks=4, num_warps=8, num_shares=4, registers=80)
    if coded.num_rows % 64 or (epilogue == ROTATE and half % 32):
        return None
    num_splits = min(_PER_SM * sms // (coded.num_rows // 64), chunks // (2 * _LEAST_UNITS))
    num_splits = max(num_splits, triton.cdiv(chunks // 2, _MOST_UNITS))
    return Tiling(64, 1, num_splits, num_stages=3, num_chunks=2, num_warps=4, num_shares=2, registers=80)


def _fits(x: torch.Tensor, coded: Coded) -> bool:
    held = (coded.scales,) if coded.zeros is None else (coded.scales, coded.zeros)
    return (
        coded.table is None
        and not coded.in_planes
        and coded.factors is None
        and not coded.has_minima
        and 2 * coded.half == _CHUNK
        and coded.num_rows % 32 == 0
        and coded.num_columns % (2 * _CHUNK) == 0
        and (coded.group_size % _CHUNK == 0 or coded.scales.shape[1] == 1)
        and coded.scales.itemsize == 2
        and all(each.is_contiguous() for each in (coded.codes, *held))
        and coded.codes.data_ptr() % _ALIGNMENT == 0
        and x.data_ptr() % _ALIGNMENT == 0
        and x.stride(0) * x.itemsize % _ALIGNMENT == 0
    )


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
