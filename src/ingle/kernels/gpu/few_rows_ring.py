"""Products of a few rows with int4 on Hopper, as in `few_rows_coded`: codes come long before they are wanted.

A program has a ring of places in an SM's memory, into which the copy engine brings codes and inputs several iterations
ahead, without registers or instructions. Codes become numbers in the registers in which the tensor cores take them: a
lane reads 16 neighbouring bytes of a row of weights, and 16 neighbours of a row of inputs for either half of those
bytes, so the order of columns is the one in which codes lie.

In Gluon, for Triton decides on its own where what is loaded goes, and how far ahead. What stands at a product's end is
common to both (`endings`).
"""

from __future__ import annotations

import math
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
from ingle.kernels.gpu.device import await_previous, barrier, counters, num_sms, pdl
from ingle.kernels.gpu.endings import ADD, GELU, PLAIN, ROTATE, SILU, finish, row_scales

UNTRIED = False
"""Whether float16, rotation, GELU and groups of more than 128 columns, too: compiled, but not yet run."""
_CHUNK = 128
"""Columns of a block of codes, whose halves share bytes."""
_CHUNKS = 2
"""Of them, that an iteration takes."""
_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""

_LEAST_UNITS = 2
_MOST_UNITS = 32
"""Iterations of a program, at least: its beginning and its end take longer than one; and at most."""

# Of a word, that is of four columns and of those 64 further, four registers of two numbers. A code's bits alone are a
# float below the lowest exponent, so one instruction makes it as large as it should be and takes away its zero.
_PAIRS = (
    "{ .reg .b32 a, b, c, d, l, h; mov.b32 l, LOW; mov.b32 h, HIGH; "
    "prmt.b32 a, $4, 0, 0x4140; prmt.b32 c, $4, 0, 0x4342; "
    "and.b32 b, a, 0x00f000f0; and.b32 a, a, 0x000f000f; and.b32 d, c, 0x00f000f0; and.b32 c, c, 0x000f000f; "
    "fma.rn.TYPE $0, a, l, $6; fma.rn.TYPE $1, b, h, $6; "
    "fma.rn.TYPE $2, c, l, $6; fma.rn.TYPE $3, d, h, $6; }"
)
_BF16_ASM = gl.constexpr(
    _PAIRS.replace("TYPE", "bf16x2").replace("LOW", "0x7f007f00").replace("HIGH", "0x7d007d00")  # 2 ** 127, 2 ** 123
)
_FP16_ASM = gl.constexpr(
    _PAIRS.replace("TYPE", "f16x2").replace("LOW", "0x78007800").replace("HIGH", "0x68006800")  # 2 ** 15, 2 ** 11
)
_BF16, _FP16 = gl.constexpr((gl.bfloat16,) * 4), gl.constexpr((gl.float16,) * 4)


@gluon.constexpr_function
def _words_layout(outs, warps):
    """A lane has four words of a row of weights, and of the row eight further."""
    registers = [[0, 1], [0, 2], [8, 0], *([at, 0] for at in _powers(16 * warps, outs))]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[at, 0] for at in _powers(16, 16 * warps)], [], [outs, 16])


@gluon.constexpr_function
def _inputs_layout(rows, warps):
    """A lane has 16 neighbours of a row of inputs, and those 64 further."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 64], *([at, 0] for at in _powers(8, rows))]
    lanes = [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in _powers(1, warps)], [], [rows, 128])


@gluon.constexpr_function
def _powers(first, end):
    """Of two, from `first` to below `end`."""
    return [1 << bit for bit in range(first.bit_length() - 1, end.bit_length() - 1)]


@gluon.jit
def _numbers(words, zeros, OUTS: gl.constexpr, dtype: gl.constexpr, layout: gl.constexpr):
    """int32 [OUTS, 16], and zeros [OUTS, 1], to numbers [OUTS, 128], in the order of `_inputs`, by UNIT smaller."""
    # Twice, for the assembly makes two numbers at once.
    zeros, words = gl.broadcast(zeros, words)
    zeros, words = gl.join(zeros, zeros), gl.join(words, words)
    low, high, low_after, high_after = gl.inline_asm_elementwise(
        _BF16_ASM if dtype == gl.bfloat16 else _FP16_ASM, "=r,=r,=r,=r,r,r,r,r", [words, zeros],
        dtype=_BF16 if dtype == gl.bfloat16 else _FP16, is_pure=True, pack=2,
    )  # fmt: skip
    numbers = gl.join(gl.join(low, low_after), gl.join(high, high_after))
    numbers = gl.reshape(numbers, [OUTS, 4, 4, 2, 2, 2])  # row, lane, word, number, pair, half
    return gl.convert_layout(gl.reshape(gl.permute(numbers, [0, 5, 2, 4, 1, 3]), [OUTS, 128]), layout)


@gluon.jit
def _inputs(x, ROWS: gl.constexpr, layout: gl.constexpr):
    """[ROWS, 128] to [128, ROWS]"""
    x = gl.reshape(x, [ROWS, 2, 4, 4, 2, 2])  # row, half, lane, word, pair, number
    return gl.convert_layout(gl.reshape(gl.permute(x, [1, 3, 4, 2, 5, 0]), [128, ROWS]), layout)


@gluon.jit
def _steps(
    scales_ptr, zeros_ptr, first_out, first_group,
    OUTS: gl.constexpr, R: gl.constexpr, APART: gl.constexpr, GROUPS: gl.constexpr, HELD: gl.constexpr,
    ZEROS: gl.constexpr, dtype: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """int32 [HELD, OUTS]: of groups, the scale's 16 bits, and below them those of the zero, negative, UNIT smaller."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4 if HELD > 2 else 1], [32, 1], [gl.num_warps(), 1], [1, 0])
    of_tile = gl.arange(0, OUTS, layout=gl.SliceLayout(1, layout))
    outs = first_out + of_tile % R + of_tile // R * APART
    group = first_group + gl.arange(0, HELD, layout=gl.SliceLayout(0, layout))[None, :]
    places = outs[:, None] * GROUPS + group
    scales = gl.load(scales_ptr + places, mask=group < GROUPS, other=0.0).to(gl.int16, bitcast=True)
    zeros = gl.full([OUTS, HELD], 8, gl.float32, layout)
    if ZEROS:
        zeros = gl.load(zeros_ptr + places, mask=group < GROUPS, other=0).to(gl.float32)
    zeros = (zeros / -UNIT).to(dtype).to(gl.int16, bitcast=True)
    return gl.permute(scales.to(gl.int32) << 16 | zeros.to(gl.int32) & 0xFFFF, [1, 0])


@gluon.jit(do_not_specialize=["num_rows"])
def _few_rows_ring_kernel(
    codes_desc, x_desc, scales_ptr, zeros_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr,
    squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, OUTS: gl.constexpr,
    HALVES: gl.constexpr, APART: gl.constexpr, CHUNKS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr, SQUARED: gl.constexpr, SQUARES: gl.constexpr,
    HALF: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, HELD: gl.constexpr, ZEROS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A tile has OUTS rows of weights: neighbours, or those of two HALVES that are APART. A unit is CHUNKS
    blocks of 128 columns, of which STAGES are in the ring."""
    R: gl.constexpr = OUTS // HALVES
    UNITS: gl.constexpr = IN // (128 * CHUNKS)
    BYTES: gl.constexpr = (OUTS * 64 + ROWS * 256) * CHUNKS
    dtype: gl.constexpr = x_desc.dtype
    UNIT: gl.constexpr = 64.0 if dtype == gl.bfloat16 else 512.0
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    numbers_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    inputs_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    words_layout: gl.constexpr = _words_layout(OUTS, WARPS)
    of_outs: gl.constexpr = gl.SliceLayout(1, layout)

    tile, split = gl.program_id(0) // SPLITS, gl.program_id(0) % SPLITS
    first_unit = UNITS * split // SPLITS
    num_units = UNITS * (split + 1) // SPLITS - first_unit
    first_out = tile * R
    if EPILOGUE == 1:
        first_out = first_out // HALF * 2 * HALF + first_out % HALF
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, CHUNKS * OUTS, 16], gl.NVMMASharedLayout(64, 32, 2))
    xs = gl.allocate_shared_memory(dtype, [STAGES, ROWS, 128 * CHUNKS], x_desc.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        there = stage < num_units
        mbarrier.expect(arrived.index(stage), BYTES, pred=there)
        place = codes.index(stage)._reinterpret(gl.int32, [CHUNKS, HALVES, R, 16], codes_desc.layout)
        at = [(first_unit + stage) * CHUNKS, 0, first_out, 0]
        tma.async_copy_global_to_shared(codes_desc, at, arrived.index(stage), place, pred=there)
    first_group = first_unit * (128 * CHUNKS) // GROUP
    held = _steps(scales_ptr, zeros_ptr, first_out, first_group, OUTS, R, APART, GROUPS, HELD, ZEROS, dtype, UNIT)
    steps = gl.allocate_shared_memory(gl.int32, [HELD, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    steps.store(held)
    steps = steps._reinterpret(gl.int32, [HELD, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if PDL:
        await_previous()
    for stage in gl.static_range(STAGES):
        at = [0, (first_unit + stage) * (128 * CHUNKS)]
        tma.async_copy_global_to_shared(x_desc, at, arrived.index(stage), xs.index(stage), pred=stage < num_units)

    if NORMED:
        of_squares: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_squares))[:, None]
        piece = gl.arange(0, SQUARES, layout=gl.SliceLayout(0, of_squares))[None, :]
        scale_of_rows = row_scales(squares_in_ptr, row, piece, num_rows, num_squares, eps, IN)
        scale_of_rows = gl.convert_layout(scale_of_rows, gl.SliceLayout(0, layout))[None, :]

    total = gl.zeros([OUTS, ROWS], gl.float32, layout)
    stage, phase = 0, 0
    for index in range(num_units):
        mbarrier.wait(arrived.index(stage), phase)
        for chunk in gl.static_range(CHUNKS):
            x = xs.index(stage).slice(chunk * 128, 128, dim=1).load(_inputs_layout(ROWS, WARPS))
            words = codes.index(stage).slice(chunk * OUTS, OUTS, dim=0).load(words_layout)
            group = ((first_unit + index) * CHUNKS + chunk) * 128 // GROUP - first_group
            step = steps.index(group).load(gl.SliceLayout(1, words_layout))
            zeros = ((step << 16) | (step & 0xFFFF))[:, None]
            numbers = _numbers(words, zeros, OUTS, dtype, numbers_layout)
            scale = gl.convert_layout(step, gl.SliceLayout(1, layout)) >> 16
            scale = scale.to(gl.int16).to(scales_ptr.dtype.element_ty, bitcast=True).to(gl.float32) * UNIT
            part = mma_v2(numbers, _inputs(x, ROWS, inputs_layout), gl.zeros([OUTS, ROWS], gl.float32, layout))
            total += part * scale[:, None]
        # What was read makes room.
        later = index + STAGES
        there = later < num_units
        mbarrier.expect(arrived.index(stage), BYTES, pred=there)
        place = codes.index(stage)._reinterpret(gl.int32, [CHUNKS, HALVES, R, 16], codes_desc.layout)
        at = [(first_unit + later) * CHUNKS, 0, first_out, 0]
        tma.async_copy_global_to_shared(codes_desc, at, arrived.index(stage), place, pred=there)
        at = [0, (first_unit + later) * (128 * CHUNKS)]
        tma.async_copy_global_to_shared(x_desc, at, arrived.index(stage), xs.index(stage), pred=there)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)

    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    done = True
    if SPLITS > 1:
        of_tile = gl.arange(0, OUTS, layout=of_outs)
        left = parts_ptr + tile.to(gl.int64) * (SPLITS * OUTS * ROWS) + of_tile[:, None] * ROWS + rows
        gl.store(left + split * (OUTS * ROWS), total)
        barrier(True)  # the whole program's stores come before its arrival
        done = gl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if done:
            gl.store(arrived_ptr + tile, 0)
            total = _joined(left, SPLITS, OUTS * ROWS)
    if done:
        if NORMED:
            total *= scale_of_rows
        first, other = total, total
        if HALVES == 2:
            first, other = gl.split(gl.permute(gl.reshape(total, [2, R, ROWS]), [1, 2, 0]))
            first, other = gl.convert_layout(first, layout), gl.convert_layout(other, layout)
        finish(
            first, other, first_out, first_out + APART, tile, OUT // OUTS,
            gl.arange(0, R, layout=of_outs)[:, None], rows, num_rows, bias_ptr, residual_ptr, norm_ptr,
            out_ptr, values_ptr, squares_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
            v_offset, page_stride, token_stride, head_stride,
            OUT, R, EPILOGUE, BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
        )  # fmt: skip


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
    """Rows of weights that a program has, of both halves where there are such."""
    num_splits: int
    """Programs that share a tile's inputs."""
    num_stages: int
    """Iterations whose codes are in the ring."""
    num_warps: int

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
            [_CHUNKS, halves, self.outs // halves, 16],
            gl.NVMMASharedLayout(64, 32, 4),
        )
        inputs = TensorDescriptor.from_tensor(x, [rows, _CHUNK * _CHUNKS], gl.NVMMASharedLayout(128, 16, 2))
        num_tiles, num_splits, parts = size_out // self.outs, self.num_splits, x
        if num_splits > 1:
            parts = x.new_empty(num_tiles * num_splits * self.outs * rows, dtype=torch.float32)
        columns, groups = _CHUNK * _CHUNKS, coded.scales.shape[1]
        most = triton.cdiv(size_in // columns, num_splits) * columns  # that a program has, from any unit on
        most = (coded.group_size - math.gcd(coded.group_size, columns) + most - 1) // coded.group_size + 1
        held = triton.next_power_of_2(min(most, groups))
        early, num_squares = pdl(device), 1 if squares_in is None else squares_in.shape[1]
        places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
        _few_rows_ring_kernel[(num_tiles * num_splits,)](
            codes, inputs, coded.scales, _or(coded.zeros, coded.codes), _or(bias, x), _or(squares_in, x),
            _or(residual, x), x if norm is None else norm.weight, out, _or(values, x), _or(squares, x), parts,
            counters(device), *places,
            num_rows, num_squares, 0.0 if norm is None else norm.eps,
            *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
            IN=size_in, OUT=size_out, ROWS=rows, WARPS=self.num_warps, OUTS=self.outs, HALVES=halves, APART=apart,
            CHUNKS=_CHUNKS, STAGES=self.num_stages, SPLITS=num_splits, EPILOGUE=epilogue,
            NORMED=squares_in is not None, BIASED=bias is not None, SQUARED=squares is not None,
            SQUARES=triton.next_power_of_2(num_squares), HALF=half,
            NUM_HEADS=0 if rotation is None else rotation.num_heads,
            NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
            PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
            GROUP=coded.group_size, GROUPS=groups, HELD=held, ZEROS=coded.zeros is not None, PDL=early,
            num_warps=self.num_warps, launch_pdl=early,
        )  # fmt: skip


def tiling(x: torch.Tensor, coded: Coded, epilogue: int, half: int = 1) -> Tiling | None:
    """For a product that ends so, of heads with such halves; None where this kernel does not fit. Three programs for
    each SM, with as many iterations as their beginning and their end are worth, and as their scales have room."""
    gated = epilogue in (SILU, GELU)
    outs, num_units = 128 if gated else 64, coded.num_columns // (_CHUNK * _CHUNKS)
    if not _fits(x, coded) or coded.num_rows % outs or (epilogue == ROTATE and half % 32):
        return None
    if not UNTRIED and (epilogue in (ROTATE, GELU) or coded.group_size != _CHUNK or x.dtype != torch.bfloat16):
        return None
    num_splits = min(3 * num_sms(x.device) // (coded.num_rows // outs), num_units // _LEAST_UNITS)
    num_splits = max(num_splits, triton.cdiv(num_units, _MOST_UNITS))
    # A warp has rows of both halves.
    return Tiling(outs, num_splits, num_stages=2 if gated else 3, num_warps=2 if epilogue == ROTATE else 4)


def _fits(x: torch.Tensor, coded: Coded) -> bool:
    held = (coded.scales,) if coded.zeros is None else (coded.scales, coded.zeros)
    return (
        coded.table is None
        and not coded.in_planes
        and coded.factors is None
        and not coded.has_minima
        and 2 * coded.half == _CHUNK
        and coded.num_columns % (_CHUNK * _CHUNKS) == 0
        and (coded.group_size % _CHUNK == 0 or coded.scales.shape[1] == 1)
        and coded.scales.itemsize == 2
        and all(each.is_contiguous() for each in (coded.codes, *held))
        and coded.codes.data_ptr() % _ALIGNMENT == 0
        and x.data_ptr() % _ALIGNMENT == 0
        and x.stride(0) * x.itemsize % _ALIGNMENT == 0
    )


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
