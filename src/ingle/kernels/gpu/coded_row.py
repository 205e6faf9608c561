"""Products of one row with a small matrix of 4-bit codes on Hopper, by the integers of its tensor cores.

As in `coded_vector` a row's inputs are integers of 16 bits, of 32 columns (a chunk) each under one scale, in two bytes
that are multiplied apart. Here a program makes them once, for all of its warps, and an instruction multiplies 16 rows
of codes by eight columns of inputs: those of four chunks, the upper and the lower bytes of each, zeros for the other
chunks. So a lane has the codes of a chunk of two rows as they are loaded, and gets the sums of a chunk whose scale it
has, too. A program has one tile and ends: it takes little of an SM, where the next kernel's programs come to wait.

In Gluon, for which lane has what decides. Each tensor of four dimensions has a number for each thread.
"""

# ruff: noqa: RUF005 (Triton unpacks nothing into a tuple)
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ingle.kernels.coded import MIDDLE, Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.coded_tiles import first_column
from ingle.kernels.gpu.device import await_previous, num_sms, pdl
from ingle.kernels.gpu.integers import larger
from ingle.kernels.gpu.rotation import store_rotated

_ADD, _ROTATE = 0, 1
"""As `coded_vector` has them."""
_MOST_TILES = 2
"""For each SM; of a larger matrix `coded_vector` keeps more on its way."""
_MOST_COLUMNS = 4096
_LARGEST = gl.constexpr(32512.0)
"""Of an input's integers: their upper bytes are rounded, so that the lower ones have signs, too."""
_MAGIC = gl.constexpr(12582912.0)
"""2**23 + 2**22: the bits of a float near it end in those of the whole number that is added to it."""


class Tiling(NamedTuple):
    """What a program has."""

    halves: int
    """Of 16 rows of weights each: of both halves of a head, or neighbours."""
    warps: int
    """That share the columns."""


@gluon.constexpr_function
def _load_codes_asm(offset):
    """Four words from a place on, `offset` bytes further, where they are wanted."""
    return (
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; @p ld.global.L1::evict_first.L2::cache_hint.v4.b32 {$0, $1, $2, $3}, "
        f"[$4+{offset}], $6; }}"
    )


@gluon.constexpr_function
def _load_step_asm(bits, offset):
    """A number of 32 bits or less, `offset` bytes further, as a word; zeros where it is not wanted."""
    held = max(bits, 16)
    return (
        f"{{ .reg .pred p; .reg .u{held} a; setp.ne.s32 p, $2, 0; mov.u{held} a, 0; "
        f"@p ld.global.u{bits} a, [$1+{offset}]; " + ("mov.u32 $0, a; }" if bits == 32 else "cvt.u32.u16 $0, a; }")
    )


@gluon.constexpr_function
def _products_asm():
    """Four products of 16 rows of 32 codes, two words of each of two rows, by two words of inputs."""
    text = "{ .reg .b32 m; mov.b32 m, 0x4B400000; "
    for index in range(4):
        a, b, sums = 4 + 4 * index, 20 + 2 * index, "$0,$1,$2,$3" if index else "m,m,m,m"
        text += "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {$0,$1,$2,$3}, "
        text += f"{{${a},${a + 1},${a + 2},${a + 3}}}, {{${b},${b + 1}}}, {{{sums}}}; "
    return text + "}"


@gluon.constexpr_function
def _threads(warps):
    """A number of each thread: by warp, chunk, and the two dimensions of a product's eight rows or columns."""
    return gl.BlockedLayout([1, 1, 1, 1], [1, 4, 4, 2], [warps, 1, 1, 1], [1, 3, 2, 0])


@gluon.constexpr_function
def _of_step(warps, count):
    """The same of one step, each thread with `count`."""
    return gl.BlockedLayout([1, 1, 1, 1, 1, count], [1, 1, 4, 4, 2, 1], [warps, 1, 1, 1, 1, 1], [5, 2, 4, 3, 1, 0])


@gluon.jit
def _bytes(b0, b1, b2, b3, PICKS: gl.constexpr):
    """Of four words one byte each, as a word."""
    return gl.inline_asm_elementwise(
        PICKS, "=r,r,r,r,r", [b0, b1, b2, b3], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def _pick_asm(byte):
    picks = f"0x{byte + 4}{byte}{byte + 4}{byte}"
    return f"{{ .reg .b32 a, b; prmt.b32 a, $1, $2, {picks}; prmt.b32 b, $3, $4, {picks}; prmt.b32 $0, a, b, 0x5410; }}"


@gluon.jit
def _sum_of_bytes(words):
    return gl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, 0x01010101, 0;", "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def _columns(first, PASS: gl.constexpr, APART: gl.constexpr, layout: gl.constexpr):
    """Chunks [PASS, 1, 1] from `first` on, and of each its columns [PASS, 4, 8], eight of a thread."""
    chunk = first + gl.arange(0, PASS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    part = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    column = first_column(chunk, APART) + (part // 2 * APART + part % 2 * 8)
    return chunk, gl.max_contiguous(gl.multiple_of(column + within, [1, 1, 8]), [1, 1, 8])


@gluon.jit
def _as_integers(y, PASS: gl.constexpr, layout: gl.constexpr):
    """Of inputs [PASS, 4, 8] words [PASS, 2, 8] of four upper bytes, and of four lower ones; and of chunks [PASS] what
    one stands for, and their sums."""
    largest = gl.reduce(gl.reduce(gl.abs(y), 2, larger), 1, larger)
    # A chunk of zeros stays one; one with an infinity or a NaN becomes NaN by its scale, whatever its integers.
    scale = gl.where(largest < float("inf"), largest * (1 / _LARGEST), float("nan"))
    per_unit = gl.where(largest > 0, _LARGEST / largest, 0.0)
    bits = (y * per_unit[:, None, None] + _MAGIC).to(gl.int32, bitcast=True)
    even, odd = gl.split(gl.reshape(bits, [PASS, 4, 2, 2, 2]))
    b0, b2 = gl.split(even)
    b1, b3 = gl.split(odd)
    lower = _bytes(b0, b1, b2, b3, _pick_asm(0))
    upper = _bytes(b0 + 128, b1 + 128, b2 + 128, b3 + 128, _pick_asm(1))
    sums = gl.convert_layout(gl.sum(_sum_of_bytes(upper) * 256 + _sum_of_bytes(lower), 2), gl.SliceLayout(2, layout))
    words = gl.reshape(gl.permute(gl.join(upper, lower), [0, 3, 1, 2]), [PASS, 2, 8])
    return words, scale, gl.sum(sums, 1).to(gl.float32)


@gluon.jit
def _inputs(words_held, STEP: gl.constexpr, WARPS: gl.constexpr):
    """Of a step the eight words of each thread."""
    words = words_held.slice(STEP, 1, 1).load(_of_step(WARPS, 8))
    even, odd = gl.split(gl.reshape(words, [WARPS, 4, 1, 2, 2, 2, 2]))
    e0, e1 = gl.split(even)
    o0, o1 = gl.split(odd)
    w0, w4 = gl.split(e0)
    w2, w6 = gl.split(e1)
    w1, w5 = gl.split(o0)
    w3, w7 = gl.split(o1)
    apart = (w0, w1, w2, w3, w4, w5, w6, w7)
    found = ()
    for index in gl.static_range(8):
        found = found + (gl.convert_layout(apart[index], _threads(WARPS)),)
    return found


@gluon.jit
def _of_chunks(held, STEP: gl.constexpr, WARPS: gl.constexpr):
    number = held.slice(STEP, 1, 1).load(_of_step(WARPS, 1))
    return gl.convert_layout(gl.reshape(number, [WARPS, 4, 1, 1]), _threads(WARPS))


@gluon.jit
def _load_codes(ptr, there, policy, OFFSET: gl.constexpr):
    return gl.inline_asm_elementwise(
        _load_codes_asm(OFFSET), "=r,=r,=r,=r,l,r,l", [ptr, there, policy], dtype=(gl.int32,) * 4, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def _load_step(ptr, there, DISTANCE: gl.constexpr):
    """The bits of a number DISTANCE further."""
    BITS: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    return gl.inline_asm_elementwise(
        _load_step_asm(BITS, DISTANCE * BITS // 8), "=r,l,r", [ptr, there], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def _ask(
    matrix, row, chunk, there, policy, DOWN: gl.constexpr, FURTHER: gl.constexpr, COUNT: gl.constexpr,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, SPAN: gl.constexpr, ZEROS: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """Of a row DOWN below `row` and a chunk FURTHER than `chunk` the words of codes, and what the chunk's group has."""
    codes_ptr, scales_ptr, zeros_ptr, factors_ptr = matrix
    words = _load_codes(
        codes_ptr + (row.to(gl.int64) * COUNT + chunk) * 4, there, policy, 16 * (DOWN * COUNT + FURTHER)
    )
    AWAY: gl.constexpr = DOWN * GROUPS + (FURTHER * 32 // GROUP if GROUPS > 1 else 0)
    group = row * GROUPS + first_column(chunk, APART) // GROUP
    steps = (_load_step(scales_ptr + group, there, AWAY),)
    if ZEROS:
        steps = steps + (_load_step(zeros_ptr + group, there, AWAY),)
    if SPAN:
        SPANS: gl.constexpr = GROUPS // SPAN
        factor = row * SPANS + (chunk + FURTHER) * SPANS // COUNT
        steps = steps + (_load_step(factors_ptr + factor, there, DOWN * SPANS),)
    return words, steps


@gluon.jit
def _products(first, other, inputs):
    """Of two rows' words of codes the sums with their chunk's inputs: floats."""
    args = ()
    for index in gl.static_range(4):
        for row in gl.static_range(4):
            word = (first, other)[row % 2][(2 * index + row // 2) % 4]
            args = args + ((word >> (index // 2 * 4)) & 0x0F0F0F0F,)
    high, low, other_high, other_low = gl.inline_asm_elementwise(
        _products_asm(), "=&r,=&r,=&r,=&r" + ",r" * 24, args + inputs, dtype=(gl.int32,) * 4, is_pure=True, pack=1
    )  # fmt: skip
    return _joined(high, low), _joined(other_high, other_low)


@gluon.jit
def _joined(high, low):
    """Of sums in the bits of floats."""
    return (high.to(gl.float32, bitcast=True) - _MAGIC) * 256 + (low.to(gl.float32, bitcast=True) - _MAGIC)


@gluon.jit
def _small(values):
    """Floats of integers of less than 22 bits."""
    return (values + 0x4B400000).to(gl.float32, bitcast=True) - _MAGIC


@gluon.jit
def _in_float(bits, dtype: gl.constexpr):
    """The number of these bits, the lowest of a word."""
    if dtype.primitive_bitwidth == 16:
        bits = bits.to(gl.int16)
    return bits.to(dtype, bitcast=True).to(gl.float32)


@gluon.jit
def _scaled(
    product, steps, unit, given, MIDDLE: gl.constexpr, ZEROS: gl.constexpr, SPAN: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """What a chunk adds to a row's sum."""
    if SPAN:
        pair, factors = steps[0], steps[1]
        factor, minimum_factor = _in_float(factors, gl.float16), _in_float(factors >> 16, gl.float16)
        scale, minimum = _small(pair & 255), _small(pair >> 8)
        return (factor * scale * product + minimum_factor * minimum * given) * unit
    if ZEROS:
        product -= _small(steps[1]) * given
    else:
        product -= MIDDLE * given
    return _in_float(steps[0], dtype) * unit * product


@gluon.jit
def _sums(
    asked, words_held, units_held, sums_held, own, HALVES: gl.constexpr, WARPS: gl.constexpr, STEPS: gl.constexpr,
    MIDDLE: gl.constexpr, ZEROS: gl.constexpr, SPAN: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Of each two rows of a lane's, in turn, the sums over its chunks."""
    totals = (gl.zeros([WARPS, 4, 4, 2], gl.float32, _threads(WARPS)),) * (2 * HALVES)
    for step in gl.static_range(STEPS):
        inputs = _inputs(words_held, step, WARPS)
        masked = ()
        for index in gl.static_range(8):
            masked = masked + (inputs[index] & own,)
        unit, given = _of_chunks(units_held, step, WARPS), _of_chunks(sums_held, step, WARPS)
        more = ()
        for half in gl.static_range(HALVES):
            words, steps = asked[step][2 * half]
            other_words, other_steps = asked[step][2 * half + 1]
            product, other_product = _products(words, other_words, masked)
            more = more + (
                totals[2 * half] + _scaled(product, steps, unit, given, MIDDLE, ZEROS, SPAN, dtype),
                totals[2 * half + 1] + _scaled(other_product, other_steps, unit, given, MIDDLE, ZEROS, SPAN, dtype),
            )
        totals = more
    return totals


@gluon.jit
def _coded_row_kernel(
    x_ptr, norm_ptr, matrix, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    eps, v_offset, page_stride, token_stride, head_stride,
    IN: gl.constexpr, OUT: gl.constexpr, HALVES: gl.constexpr, WARPS: gl.constexpr, STEPS: gl.constexpr,
    APART: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr, SPAN: gl.constexpr, MIDDLE: gl.constexpr,
    ZEROS: gl.constexpr, EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    HALF: gl.constexpr, FIRST_HEAD: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    PAGE_SIZE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warp has 4 * STEPS chunks of a tile's rows, a lane those of two rows of each half."""
    R: gl.constexpr = 16 if EPILOGUE == 1 else 16 * HALVES
    FAR: gl.constexpr = HALF if EPILOGUE == 1 else 16
    COUNT: gl.constexpr = IN // 32
    PASS: gl.constexpr = 8 * WARPS  # chunks that become integers at once
    PASSES: gl.constexpr = STEPS // 2
    inputs_layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [8, 4, 1], [WARPS, 1, 1], [2, 1, 0])
    of_outs: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    tile = gl.program_id(0)
    first_out = tile * R
    if EPILOGUE == 1:
        first_out = first_out // HALF * 2 * HALF + first_out % HALF
    none = gl.full([WARPS, 4, 4, 2], 0, gl.int32, _threads(WARPS))
    thread = gl.inline_asm_elementwise(
        "mov.u32 $0, %tid.x;", "=r,r", [none], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip
    policy = gl.inline_asm_elementwise(
        "createpolicy.fractional.L2::evict_first.b64 $0, 1.0;", "=l,r", [none], dtype=gl.int64, is_pure=True, pack=1
    )  # fmt: skip
    lane = thread % 32
    chunk = thread // 32 * (4 * STEPS) + lane % 4
    row = first_out + lane // 4
    # Whose column of inputs is one of the lane's own chunk.
    own = gl.where(lane // 8 == lane % 4, -1, 0)
    asked = ()
    for step in gl.static_range(STEPS):
        there = (chunk + 4 * step < COUNT).to(gl.int32)
        of_step = ()
        for index in gl.static_range(2 * HALVES):
            at = row + index // 2 * FAR
            of_step = of_step + (
                _ask(
                    matrix, at, chunk, there, policy, index % 2 * 8, 4 * step, COUNT, GROUP, GROUPS, SPAN, ZEROS, APART
                ),
            )
        asked = asked + (of_step,)
    norms = ()
    for index in gl.static_range(PASSES if NORMED else 0):
        chunks, columns = _columns(index * PASS, PASS, APART, inputs_layout)
        norms = norms + (gl.load(norm_ptr + columns, mask=chunks < COUNT, other=0.0),)
    # What sums end in was there before the kernel before this one began.
    block = gl.arange(0, R, layout=of_outs)
    added = gl.zeros([R], gl.float32, of_outs)
    other_added = added
    if BIAS:
        added += gl.load(bias_ptr + first_out + block).to(gl.float32)
        if EPILOGUE == 1:
            other_added += gl.load(bias_ptr + (first_out + FAR) + block).to(gl.float32)
    if RESIDUAL:
        added += gl.load(residual_ptr + first_out + block).to(gl.float32)
    if EPILOGUE == 1:
        angle = cos_sin_ptr + first_out % HALF + block
        rotation = gl.load(angle), gl.load(angle + HALF), gl.load(kv_places_ptr + block * 0)
    if PDL:
        await_previous()
    words_held = gl.allocate_shared_memory(gl.int32, [PASSES, PASS, 2, 8], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    units_held = gl.allocate_shared_memory(gl.float32, [PASSES, PASS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    sums_held = gl.allocate_shared_memory(gl.float32, [PASSES, PASS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    squared = gl.zeros([PASS, 4], gl.float32, gl.SliceLayout(2, inputs_layout))
    for index in gl.static_range(PASSES):
        chunks, columns = _columns(index * PASS, PASS, APART, inputs_layout)
        x = gl.load(x_ptr + columns, mask=chunks < COUNT, other=0.0).to(gl.float32)
        if NORMED:
            squared += gl.sum(x * x, 2)
            x *= norms[index].to(gl.float32)
        words, units, sums = _as_integers(x, PASS, inputs_layout)
        words_held.index(index).store(words)
        units_held.index(index).store(units)
        sums_held.index(index).store(sums)
    order: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0])
    words_held = words_held._reinterpret(gl.int32, [WARPS, STEPS, 4, 1, 2, 8], order)
    units_held = units_held._reinterpret(gl.float32, [WARPS, STEPS, 4, 1, 1, 1], order)
    sums_held = sums_held._reinterpret(gl.float32, [WARPS, STEPS, 4, 1, 1, 1], order)
    totals = _sums(
        asked, words_held, units_held, sums_held, own, HALVES, WARPS, STEPS, MIDDLE, ZEROS, SPAN,
        matrix[1].dtype.element_ty,
    )  # fmt: skip
    if HALVES == 2:
        parts = gl.sum(gl.join(gl.join(totals[0], totals[1]), gl.join(totals[2], totals[3])), 1)
        parts = gl.permute(parts, [3, 1, 2, 4, 0])
    else:
        parts = gl.permute(gl.sum(gl.join(totals[0], totals[1]), 1), [3, 1, 2, 0])
    parts_held = gl.allocate_shared_memory(
        gl.float32, [16, HALVES, WARPS], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )  # fmt: skip
    parts_held.store(gl.reshape(parts, [16, HALVES, WARPS]))
    total = gl.sum(
        parts_held.load(gl.BlockedLayout([1, HALVES, WARPS], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])), 2
    )  # fmt: skip
    if NORMED:
        total *= gl.rsqrt(gl.sum(gl.sum(squared, 1), 0) / IN + eps)
    if EPILOGUE == 1:
        first, other = gl.split(total)
        first, other = gl.convert_layout(first, of_outs) + added, gl.convert_layout(other, of_outs) + other_added
        store_rotated(
            first, other, FIRST_HEAD + tile * R // HALF, block * 0, tile * R % HALF + block, block >= 0,
            out_ptr, x_ptr, x_ptr, x_ptr, kv_ptr, x_ptr, 0.0, v_offset, page_stride, token_stride, head_stride, kv_ptr,
            HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0, rotation,
        )  # fmt: skip
    else:
        total = gl.convert_layout(gl.reshape(gl.permute(total, [1, 0]), [R]), of_outs) + added
        gl.store(out_ptr + first_out + block, total.to(out_ptr.dtype.element_ty))


def tiling(x: torch.Tensor, coded: Coded, epilogue: int, rotation: Rotation | None) -> Tiling | None:
    """For x [M, K] times such a matrix; None where another kernel suits them."""
    if epilogue not in (_ADD, _ROTATE) or not fits(x, coded):
        return None
    pairs = epilogue == _ROTATE
    if pairs and (rotation is None or rotation.kv_cache.shape[-1] % 32 or coded.factors is not None):
        return None  # heads in Q4_K are no faster
    if coded.num_rows // (32 if pairs else 16) > _MOST_TILES * num_sms(x.device):
        return None
    return Tiling(2, 8) if pairs else Tiling(1, 4)


def fits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether this kernel may multiply x by it: one row, and codes of int4, or of Q4_K."""
    if len(x) != 1 or x.itemsize != 2 or coded.kind != "int4" or coded.table is not None or coded.shares_bytes:
        return False
    if coded.num_columns % 128 or coded.num_columns > _MOST_COLUMNS or coded.num_rows % 32:
        return False
    if coded.factors is None:
        size, whole = coded.group_size, coded.scales.shape[1] == 1
        return coded.minima is None and coded.half == 64 and coded.scales.itemsize == 2 and (whole or size == 128)
    in_pairs = coded.pairs is not None and coded.pairs.itemsize == 1 and coded.factor_pairs is not None
    return in_pairs and coded.group_size == 32 and coded.span == 8


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
    first_head: int = 0,
) -> None:
    early, words = pdl(x.device), coded.codes.view(torch.int32)
    matrix = (
        words,
        coded.scales if coded.pairs is None else coded.pairs.view(torch.int16),
        coded.codes if coded.zeros is None else coded.zeros,
        words if coded.factor_pairs is None else coded.factor_pairs.view(torch.int32),
    )
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    steps = triton.next_power_of_2(triton.cdiv(coded.num_columns, 128 * shape.warps))
    _coded_row_kernel[(coded.num_rows // (16 * shape.halves),)](
        x, x if norm is None else norm.weight, matrix, x if bias is None else bias, x if residual is None else residual,
        out, *places, 0.0 if norm is None else norm.eps,
        *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        IN=coded.num_columns, OUT=coded.num_rows, HALVES=shape.halves, WARPS=shape.warps, STEPS=max(steps, 2),
        APART=coded.half, GROUP=coded.group_size, GROUPS=coded.scales.shape[1], SPAN=coded.span,
        MIDDLE=MIDDLE[coded.kind], ZEROS=coded.zeros is not None, EPILOGUE=epilogue, NORMED=norm is not None,
        BIAS=bias is not None, RESIDUAL=residual is not None,
        HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2, FIRST_HEAD=first_head,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2], PDL=early,
        num_warps=shape.warps, maxnreg=128, launch_pdl=early,
    )  # fmt: skip
