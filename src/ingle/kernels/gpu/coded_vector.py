"""Products of one or two rows with matrices of codes on the CUDA cores, with what stands around them in a layer.

As in `vector` programs are small and many, and ask for their first weights before the kernel before has ended. What
limits them is not only the memory but how many instructions a weight takes. So a row's inputs become integers: of 32
columns each 16 bits of the largest, as many as a float of 32 bits would keep of their sum, and four products of bytes
are one instruction (`dp4a`), once with the upper bytes of four inputs and once with the lower. A thread has 32 columns
(a chunk) of several rows of weights, whose scale and minimum it takes into account once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import BITS, MIDDLE, Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.device import await_previous, barrier, counters, multiplies_bfloat16, num_sms, pdl, prefetch
from ingle.kernels.gpu.elementwise import activate, rotate_and_store
from ingle.kernels.gpu.rotation import store_rotated
from ingle.kernels.options import Activation

MAX_ROWS = 2
CHUNK = 32
"""Columns that a thread has of a row."""
_ADD, _ROTATE, _SILU, _GELU = 0, 1, 2, 3
"""What becomes of a product: see `add`, `project_and_store`, `gated`."""


class Tiling(NamedTuple):
    """How a product is shared out."""

    outs: int
    """Rows of weights, or pairs of them, of a tile: from both halves of a head, or from gate and up."""
    chunks: int
    """Of columns, that a program has."""
    num_splits: int
    """Programs that share a tile's columns; of `add` alone."""
    num_programs: int
    """For each of them."""
    num_warps: int
    num_stages: int = 2
    """Tiles whose weights are on their way to an SM's memory, and one; 0: the next one's are on their way to registers,
    where loads are not copies."""


@triton.jit(do_not_specialize=["num_programs"])
def _coded_vector_kernel(
    x_ptr, norm_ptr, matrix, table_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    parts_ptr, arrived_ptr, num_programs, out_stride, eps, v_offset, page_stride, token_stride, head_stride,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr,
    PAIR: tl.constexpr, TABLE: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HALF: tl.constexpr, FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """A program has the columns of its split, as integers, and multiplies one tile of weights after the other by them:
    tiles `num_programs` from each other."""
    ADD: tl.constexpr = EPILOGUE == 0
    LINES: tl.constexpr = OUTS if ADD else 2 * OUTS
    NUM_TILES: tl.constexpr = (OUT + LINES - 1) // LINES
    COUNT: tl.constexpr = IN // 32
    PER_SPLIT: tl.constexpr = (COUNT + SPLITS - 1) // SPLITS
    split = tl.program_id(0) % SPLITS
    program = tl.program_id(0) // SPLITS
    first_chunk, last_chunk = split * PER_SPLIT, tl.minimum((split + 1) * PER_SPLIT, COUNT)
    chunk = first_chunk + tl.arange(0, CHUNKS)
    in_chunks = chunk < last_chunk
    column = _column(chunk, APART)
    group = column // GROUP
    table = _table(table_ptr, TABLE, COMPILED)
    if STAGES == 0:
        loaded = _load(
            matrix, program, first_chunk, last_chunk, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT, LOW, HIGH, APART, GROUP,
            GROUPS, SPAN, ZEROS, COMPILED,
        )  # fmt: skip
    if PDL:
        if STAGES > 0 and LOW >= 4:
            for index in tl.static_range(STAGES - 1):
                outs = _outs(program + index * num_programs, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF)
                places = matrix[0] + (outs.to(tl.int64) * COUNT + first_chunk) * LOW
                num_bytes = tl.maximum(last_chunk - first_chunk, 0) * (4 * LOW)
                prefetch(places, tl.where(outs < OUT, num_bytes, 0))
        await_previous()
    inputs = ()
    scales = ()
    for row in tl.static_range(ROWS):
        given, squared = _inputs(x_ptr + row * IN, norm_ptr, column, in_chunks, CHUNKS, APART, NORMED, COMPILED)
        inputs += (given,)
        scales += (tl.rsqrt(tl.sum(squared, 0) / IN + eps) if NORMED else 1.0,)
    if STAGES > 0:
        for tile in tl.range(program, NUM_TILES, num_programs, num_stages=STAGES):
            words, steps = _load(
                matrix, tile, first_chunk, last_chunk, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT, LOW, HIGH, APART,
                GROUP, GROUPS, SPAN, ZEROS, COMPILED,
            )  # fmt: skip
            _multiply_tile(
                words, steps, tile, split, inputs, scales, table, table_ptr, matrix, group, bias_ptr, residual_ptr,
                out_ptr, cos_sin_ptr, x_ptr, kv_ptr, kv_places_ptr, parts_ptr, out_stride, eps, v_offset, page_stride,
                token_stride, head_stride, ROWS, OUT, OUTS, SPLITS, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS,
                MINIMA, PAIR, TABLE, EPILOGUE, BIAS, RESIDUAL, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                COMPILED,
            )  # fmt: skip
    else:
        for tile in range(program, NUM_TILES, num_programs):
            words, steps = loaded
            # The next weights are on their way while these are multiplied.
            loaded = _load(
                matrix, tile + num_programs, first_chunk, last_chunk, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT, LOW,
                HIGH, APART, GROUP, GROUPS, SPAN, ZEROS, COMPILED,
            )  # fmt: skip
            _multiply_tile(
                words, steps, tile, split, inputs, scales, table, table_ptr, matrix, group, bias_ptr, residual_ptr,
                out_ptr, cos_sin_ptr, x_ptr, kv_ptr, kv_places_ptr, parts_ptr, out_stride, eps, v_offset, page_stride,
                token_stride, head_stride, ROWS, OUT, OUTS, SPLITS, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS,
                MINIMA, PAIR, TABLE, EPILOGUE, BIAS, RESIDUAL, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                COMPILED,
            )  # fmt: skip
    if SPLITS > 1:
        barrier(COMPILED)  # the whole program's stores come before its arrival
        if tl.atomic_add(arrived_ptr + program, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + program, 0)
            for tile in range(program, NUM_TILES, num_programs):
                outs = _outs(tile, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF)
                for row in tl.static_range(ROWS):
                    total = tl.zeros([LINES], tl.float32)
                    for index in tl.static_range(SPLITS):
                        place = parts_ptr + (index * ROWS + row) * OUT + outs
                        total += tl.load(place, mask=outs < OUT, other=0.0, cache_modifier=".cg")
                    _finish(
                        total, tile, row, outs, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, x_ptr, kv_ptr,
                        kv_places_ptr, out_stride, eps, v_offset, page_stride, token_stride, head_stride, OUT, OUTS,
                        EPILOGUE, BIAS, RESIDUAL, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                    )  # fmt: skip


@triton.jit
def _multiply_tile(
    words, steps, tile, split, inputs, scales, table, table_ptr, matrix, group, bias_ptr, residual_ptr, out_ptr,
    cos_sin_ptr, x_ptr, kv_ptr, kv_places_ptr, parts_ptr, out_stride, eps, v_offset, page_stride, token_stride,
    head_stride, ROWS: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, SPLITS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, MINIMA: tl.constexpr, PAIR: tl.constexpr, TABLE: tl.constexpr, EPILOGUE: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr, FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """What `_load` gives of a tile, times each row's inputs."""
    LINES: tl.constexpr = OUTS if EPILOGUE == 0 else 2 * OUTS
    outs = _outs(tile, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF)
    quads = _quads(words, table, table_ptr, LOW, HIGH, TABLE, COMPILED)
    taken = ()
    for part in tl.static_range(2 if GROUP == 16 else 1):
        taken += (_of_word(steps[2 * part], matrix[2], group + part, GROUPS, PAIR),)
        taken += (_of_word(steps[2 * part + 1], matrix[3], group + part, GROUPS, 0) if ZEROS else taken[2 * part],)
    if SPAN:
        factors = steps[4 if GROUP == 16 else 2]
        taken += (_of_word(factors, matrix[4], group // SPAN, GROUPS // SPAN, 0),)
    steps = taken
    for row in tl.static_range(ROWS):
        product = _product(quads, steps, inputs[row], GROUP, MIDDLE, ZEROS, MINIMA, PAIR, SPAN, TABLE, COMPILED)
        total = tl.sum(product, 1) * scales[row]
        if SPLITS > 1:
            tl.store(parts_ptr + (split * ROWS + row) * OUT + outs, total, mask=outs < OUT)
        else:
            _finish(
                total, tile, row, outs, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, x_ptr, kv_ptr, kv_places_ptr,
                out_stride, eps, v_offset, page_stride, token_stride, head_stride, OUT, OUTS, EPILOGUE, BIAS,
                RESIDUAL, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
            )  # fmt: skip


@triton.jit
def _finish(
    total, tile, row, outs, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, x_ptr, kv_ptr, kv_places_ptr, out_stride,
    eps, v_offset, page_stride, token_stride, head_stride, OUT: tl.constexpr, OUTS: tl.constexpr,
    EPILOGUE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr, FIRST_HEAD: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """What becomes of the sums of a tile's rows."""
    dtype = out_ptr.dtype.element_ty
    if BIAS:
        total += tl.load(bias_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32)
    if EPILOGUE == 0:
        if RESIDUAL:
            total += tl.load(residual_ptr + row * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * out_stride + outs, total.to(dtype), mask=outs < OUT)
    else:
        first, other = tl.split(tl.trans(tl.reshape(total, [2, OUTS])))
        block = tl.arange(0, OUTS)
        if EPILOGUE == 1:
            store_rotated(
                first[:, None], other[:, None], FIRST_HEAD + tile * OUTS // HALF, tl.full([1, 1], row, tl.int32),
                (tile * OUTS % HALF + block)[:, None], tl.full([1, 1], True, tl.int1),
                out_ptr, cos_sin_ptr, x_ptr, x_ptr, kv_ptr, kv_places_ptr,
                eps, v_offset, page_stride, token_stride, head_stride, kv_ptr,
                HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0,
            )  # fmt: skip
        else:
            place = tile * OUTS + block
            out = activate(first, EPILOGUE == 3) * other
            tl.store(out_ptr + row * out_stride + place, out.to(dtype), mask=place < OUT // 2)


@triton.jit
def _outs(tile, lines, OUT: tl.constexpr, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
    """Which rows of weights a tile's lines are; those that there are not have places beyond the last."""
    outs = _first_out(tile, OUTS, EPILOGUE, HALF) + _further(lines, OUT, OUTS, EPILOGUE, HALF)
    if EPILOGUE >= 2:
        outs = tl.where(tile * OUTS + lines % OUTS < OUT // 2, outs, OUT)
    return outs


@triton.jit
def _first_out(tile, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
    return tile * OUTS // HALF * 2 * HALF + tile * OUTS % HALF if EPILOGUE == 1 else tile * OUTS


@triton.jit
def _further(lines, OUT: tl.constexpr, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
    """By how much a tile's lines are further than its first, in any tile."""
    return lines if EPILOGUE == 0 else lines % OUTS + lines // OUTS * (HALF if EPILOGUE == 1 else OUT // 2)


@triton.jit
def _column(chunk, APART: tl.constexpr):
    """A chunk's first."""
    column = chunk * 32
    if APART != 16:
        column = chunk * 16 // APART * (2 * APART) + chunk * 16 % APART
    return column


@triton.jit
def _opaque(numbers, COMPILED: tl.constexpr):
    """The same numbers, of which the compiler does not know that they follow each other: it would give neighbours to
    one thread, and pass what it loads by shared memory to those that have them."""
    if COMPILED:
        numbers = tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [numbers], dtype=tl.int32, is_pure=True, pack=1)
    return numbers


@triton.jit
def _load(
    matrix, tile, first_chunk, last_chunk, OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr,
    EPILOGUE: tl.constexpr, HALF: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    APART: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, ZEROS: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows and chunks, [LINES, CHUNKS], the words of codes, those of the upper bits behind, and the scales
    and zeros of groups; with minima, a scale and a minimum are one number.

    Behind the last chunk is the last again, of which inputs are zeros; the last tile has its first rows again. Places
    are a tile's and, the same in every tile, a line's and a chunk's: so they take an addition in a loop.
    """
    LINES: tl.constexpr = OUTS if EPILOGUE == 0 else 2 * OUTS
    codes_ptr, high_ptr, scales_ptr, zeros_ptr, factors_ptr = matrix
    TILES: tl.constexpr = (OUT + LINES - 1) // LINES
    WHOLE: tl.constexpr = OUT % LINES == 0
    first_out = _first_out(tl.minimum(tile, TILES - 1), OUTS, EPILOGUE, HALF)
    if LOW == 2:
        words = _words(codes_ptr, first_out, first_chunk, last_chunk, 2, 2, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT)
    elif LOW == 4:
        words = _words(codes_ptr, first_out, first_chunk, last_chunk, 4, 4, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT)
    else:
        words = _words(
            codes_ptr, first_out, first_chunk, last_chunk, 4, 8, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        ) + _words(
            codes_ptr, first_out, first_chunk, last_chunk, 4, 8, 4, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        )  # fmt: skip
    if HIGH == 2:
        words += _words(high_ptr, first_out, first_chunk, last_chunk, 2, 2, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT)
    index = tl.arange(0, LINES * CHUNKS)
    further = _further(index // CHUNKS, OUT, OUTS, EPILOGUE, HALF)
    if not WHOLE:
        further = tl.minimum(further, OUT - 1 - first_out)
    chunk = tl.minimum(first_chunk + _opaque(index % CHUNKS, COMPILED), last_chunk - 1)
    if HIGH == 1:
        place = high_ptr + first_out.to(tl.int64) * COUNT + (further * COUNT + chunk)
        words += (tl.reshape(tl.load(place, eviction_policy="evict_first"), [LINES, CHUNKS]),)
    group = _column(chunk, APART) // GROUP
    scales = _of_groups(scales_ptr, first_out, further, group, GROUPS, LINES, CHUNKS)
    zeros = scales
    if ZEROS:
        zeros = _of_groups(zeros_ptr, first_out, further, group, GROUPS, LINES, CHUNKS)
    steps = (scales, zeros)
    if GROUP == 16:
        others = scales
        if not _by_words(scales_ptr, GROUPS):
            others = _of_groups(scales_ptr, first_out, further, group + 1, GROUPS, LINES, CHUNKS)
        steps += (others, others)
    if SPAN:
        steps += (_of_groups(factors_ptr, first_out, further, group // SPAN, GROUPS // SPAN, LINES, CHUNKS),)
    return words, steps


@triton.constexpr_function
def _by_words(ptr, groups):
    """Whether a row's numbers are loaded by words: fewer bytes a lane are not copied while others are multiplied."""
    return ptr.dtype.element_ty.primitive_bitwidth < 32 and groups * ptr.dtype.element_ty.primitive_bitwidth % 32 == 0


@triton.jit
def _of_groups(
    ptr, first_out, further, group, GROUPS: tl.constexpr, LINES: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """[LINES, CHUNKS]: what rows have for groups, or the words of 32 bits with that; see `_of_word`."""
    if _by_words(ptr, GROUPS):
        BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
        WIDTH: tl.constexpr = GROUPS * BITS // 32
        place = ptr.to(tl.pointer_type(tl.int32)) + first_out.to(tl.int64) * WIDTH + (
            further * WIDTH + group * BITS // 32
        )  # fmt: skip
    else:
        place = ptr + first_out.to(tl.int64) * GROUPS + (further * GROUPS + group)
    # Integers of 32 bits are what threads carry from one iteration to the next without packing them.
    return tl.reshape(_whole(tl.load(place)), [LINES, CHUNKS])


@triton.jit
def _of_word(loaded, ptr, group, GROUPS: tl.constexpr, PAIR: tl.constexpr):
    """The numbers that `_of_groups` loaded for groups [CHUNKS]; of PAIR bits, those and what is above them."""
    if _by_words(ptr, GROUPS):
        BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
        shift = (group * BITS % 32)[None, :]
        if ptr.dtype.element_ty.is_int():
            if PAIR > 0:
                loaded = loaded >> shift
            elif ptr.dtype.element_ty.is_int_signed():
                loaded = (loaded << (32 - BITS - shift)) >> (32 - BITS)
            else:
                loaded = (loaded >> shift) & ((1 << BITS) - 1)
        else:
            loaded = (loaded >> shift).to(tl.int16).to(ptr.dtype.element_ty, bitcast=True)
    return loaded


@triton.jit
def _words(
    ptr, first_out, first_chunk, last_chunk, EACH: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr,
    OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """EACH neighbours of the STEP words of each chunk, from the FIRST on, apart: two or four of [LINES, CHUNKS].

    In one dimension, which any version of Triton lays out alike: a warp's lanes have neighbouring chunks of a row.
    """
    LINES: tl.constexpr = OUTS if EPILOGUE == 0 else 2 * OUTS
    index = tl.arange(0, LINES * CHUNKS * EACH)
    further = _further(index // (EACH * CHUNKS), OUT, OUTS, EPILOGUE, HALF)
    if OUT % LINES:
        further = tl.minimum(further, OUT - 1 - first_out)
    chunk = tl.minimum(first_chunk + index // EACH % CHUNKS, last_chunk - 1)
    place = ptr + first_out.to(tl.int64) * (COUNT * STEP) + ((further * COUNT + chunk) * STEP + (FIRST + index % EACH))
    # As many neighbours: a lane should have one chunk's.
    words = tl.load(tl.max_contiguous(tl.multiple_of(place, [4 * EACH]), [EACH]), eviction_policy="evict_first")
    if EACH == 2:
        apart = tl.split(tl.reshape(words, [LINES, CHUNKS, 2]))
    else:
        even, odd = tl.split(tl.reshape(words, [LINES, CHUNKS, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        apart = (first, second, third, fourth)
    return apart


@triton.jit
def _inputs(
    x_ptr, norm_ptr, column, mask, CHUNKS: tl.constexpr, APART: tl.constexpr, NORMED: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """A row's inputs of chunks as integers: the upper bytes of each four, the lower ones; what one stands for, the sums
    of the integers of both halves; and apart from that, the sum of the inputs' squares."""
    within = tl.arange(0, 4)[None, :]
    fours = ()
    largest = tl.zeros([CHUNKS], tl.float32)
    squared = tl.zeros([CHUNKS], tl.float32)
    for index in tl.static_range(8):
        at = (column + (index // 4 * APART + index % 4 * 4))[:, None] + within
        x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
        if NORMED:
            squared += tl.sum(x * x, 1)
            x *= tl.load(norm_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        fours += (x,)
    # A chunk of zeros stays one; one with an infinity or a NaN becomes NaN by its scale, whatever its integers.
    scale = tl.where(largest < float("inf"), largest * (1 / 32767), float("nan"))
    per_unit = tl.where(largest > 0, 32767 / largest, 0.0)[:, None]
    uppers = ()
    lowers = ()
    for index in tl.static_range(8):
        bits = (fours[index] * per_unit + 12582912.0).to(tl.int32, bitcast=True)  # 2**23 + 2**22 + the rounded number
        upper, lower = _bytes(bits, CHUNKS, COMPILED)
        uppers += (upper,)
        lowers += (lower,)
    first_sum = _sum_of(uppers[0:4], lowers[0:4], COMPILED)
    second_sum = _sum_of(uppers[4:8], lowers[4:8], COMPILED)
    return (uppers, lowers, scale, first_sum, second_sum), squared


@triton.jit
def _bytes(bits, CHUNKS: tl.constexpr, COMPILED: tl.constexpr):
    """Of each four integers of 16 bits [CHUNKS, 4] a word of their upper bytes and one of their lower."""
    even, odd = tl.split(tl.reshape(bits, [CHUNKS, 2, 2]))
    b0, b2 = tl.split(even)
    b1, b3 = tl.split(odd)
    if COMPILED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            prmt.b32 a, $2, $3, 0x5140;
            prmt.b32 b, $4, $5, 0x5140;
            prmt.b32 $0, a, b, 0x7632;
            prmt.b32 $1, a, b, 0x5410;
            }""",
            "=r,=r,r,r,r,r", [b0, b1, b2, b3], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    lower = (b0 & 255) | ((b1 & 255) << 8) | ((b2 & 255) << 16) | (b3 << 24)
    upper = ((b0 >> 8) & 255) | (b1 & 0xFF00) | ((b2 & 0xFF00) << 8) | ((b3 & 0xFF00) << 16)
    return upper, lower


@triton.jit
def _sum_of(uppers, lowers, COMPILED: tl.constexpr):
    """Of integers of 16 bits, whose bytes are in words; a float."""
    total = uppers[0] & 0
    ones = total + 0x01010101
    for index in tl.static_range(4):
        total = _dp4a(ones, uppers[index], total, False, True, COMPILED)
    total *= 256
    for index in tl.static_range(4):
        total = _dp4a(ones, lowers[index], total, False, False, COMPILED)
    return total.to(tl.float32)


@triton.jit
def _table(table_ptr, TABLE: tl.constexpr, COMPILED: tl.constexpr):
    """Its 16 bytes as words."""
    if TABLE and COMPILED:
        words = table_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    return 0, 0, 0, 0


@triton.jit
def _quads(words, table, table_ptr, LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, COMPILED: tl.constexpr):
    """The 32 codes of a chunk, or the numbers that they stand for, as words of four neighbours' bytes."""
    quads = ()
    if LOW == 8:
        quads = words
    elif LOW == 4:
        for half in tl.static_range(2):
            for index in tl.static_range(4):
                quads += ((words[index] >> (4 * half)) & 0x0F0F0F0F,)
    else:
        for index in tl.static_range(8):
            quads += ((words[index % 2] >> (index // 2 * 2)) & 0x03030303,)
    if HIGH:
        whole = ()
        for index in tl.static_range(8):
            if HIGH == 1:
                bits = (words[4 if LOW == 4 else 2] >> index) & 0x01010101
            else:
                bits = (words[4 + index % 2] >> (index // 2 * 2)) & 0x03030303
            whole += (quads[index] | (bits << LOW),)
        quads = whole
    if TABLE:
        found = ()
        for index in tl.static_range(8):
            found += (_look_up(quads[index], table, table_ptr, COMPILED),)
        quads = found
    return quads


@triton.jit
def _look_up(codes, table, table_ptr, COMPILED: tl.constexpr):
    """The bytes of a table that four bytes of codes stand for."""
    if COMPILED:
        # A selector has four bits for each byte: three that choose of eight bytes, and one that is left out.
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 picks, upper, a, b;
            shr.u32 a, $1, 4;
            or.b32 a, a, $1;
            prmt.b32 picks, a, 0, 0x4420;
            and.b32 upper, picks, 0x8888;
            and.b32 picks, picks, 0x7777;
            prmt.b32 a, $2, $3, picks;
            prmt.b32 b, $4, $5, picks;
            shr.u32 upper, upper, 1;
            or.b32 upper, upper, 0x3210;
            prmt.b32 $0, a, b, upper;
            }""",
            "=r,r,r,r,r,r", [codes, table[0], table[1], table[2], table[3]], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    found = codes & 0
    for byte in tl.static_range(4):
        found |= (tl.load(table_ptr + ((codes >> (8 * byte)) & 15)).to(tl.int32) & 255) << (8 * byte)
    return found


@triton.jit
def _product(
    quads, steps, inputs, GROUP: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr,
    PAIR: tl.constexpr, SPAN: tl.constexpr, SIGNED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """float32 [LINES, CHUNKS], of each chunk of a row the sum of its weights times inputs."""
    high, low, unit, first_sum, second_sum = inputs
    PARTS: tl.constexpr = 2 if GROUP == 16 else 1
    total = tl.zeros(quads[0].shape, tl.float32)
    at_minima = tl.zeros(quads[0].shape, tl.float32)
    for part in tl.static_range(PARTS):
        # Sums stay below 2**22, so that they are floats of 2**23 + 2**22 and themselves: conversions take longer.
        by_high = tl.full(quads[0].shape, 0x4B400000, tl.int32)
        by_low = tl.full(quads[0].shape, 0x4B400000, tl.int32)
        for index in tl.static_range(8 // PARTS * part, 8 // PARTS * (part + 1)):
            by_high = _dp4a(quads[index], high[index][None, :], by_high, SIGNED, True, COMPILED)
            by_low = _dp4a(quads[index], low[index][None, :], by_low, SIGNED, False, COMPILED)
        upper = by_high.to(tl.float32, bitcast=True) - 12582912.0
        product = upper * 256.0 + (by_low.to(tl.float32, bitcast=True) - 12582912.0)
        given = first_sum + second_sum if PARTS == 1 else (second_sum if part else first_sum)
        scale, minimum = _both(steps[2 * part], PAIR)
        if ZEROS:
            product -= _small(steps[2 * part + 1]) * given[None, :]
        elif MIDDLE:
            product -= MIDDLE * given[None, :]
        total += scale * product
        if MINIMA:
            at_minima += minimum * given[None, :]
    if SPAN:
        factor, minimum_factor = _both(steps[2 * PARTS], 16 if MINIMA else 0)
        total *= factor
        if MINIMA:
            at_minima *= minimum_factor
    return (total + at_minima) * unit[None, :]


@triton.jit
def _both(values, PAIR: tl.constexpr):
    """Floats: a scale and a minimum out of PAIR bits each, integers or float16; or a scale."""
    if PAIR == 16:
        low, high = (values & 0xFFFF).to(tl.int16), (values >> 16).to(tl.int16)
        first, second = (
            low.to(tl.float16, bitcast=True).to(tl.float32),
            high.to(tl.float16, bitcast=True).to(tl.float32),
        )
    elif PAIR:
        first, second = _small(values & ((1 << PAIR) - 1)), _small((values >> PAIR) & ((1 << PAIR) - 1))
    else:
        first, second = _small(values), 0.0
    return first, second


@triton.jit
def _whole(values):
    return values.to(tl.int32) if values.dtype.is_int() else values


@triton.jit
def _small(values):
    """Floats; integers of less than 23 bits become some by their bits."""
    if values.dtype.is_int():
        return (values + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    return values.to(tl.float32)


@triton.jit
def _dp4a(a, b, total, A_SIGNED: tl.constexpr, B_SIGNED: tl.constexpr, COMPILED: tl.constexpr):
    """total and the sum of the products of four bytes each."""
    if COMPILED:
        if A_SIGNED and B_SIGNED:
            return _asm_dp4a("dp4a.s32.s32 $0, $1, $2, $3;", a, b, total)
        if A_SIGNED:
            return _asm_dp4a("dp4a.s32.u32 $0, $1, $2, $3;", a, b, total)
        if B_SIGNED:
            return _asm_dp4a("dp4a.u32.s32 $0, $1, $2, $3;", a, b, total)
        return _asm_dp4a("dp4a.u32.u32 $0, $1, $2, $3;", a, b, total)
    for byte in tl.static_range(4):
        # Shifted up and down again, a byte keeps its sign.
        left = (a << (24 - 8 * byte)) >> 24 if A_SIGNED else (a >> (8 * byte)) & 255
        right = (b << (24 - 8 * byte)) >> 24 if B_SIGNED else (b >> (8 * byte)) & 255
        total += left * right
    return total


@triton.jit
def _asm_dp4a(TEXT: tl.constexpr, a, b, total):
    return tl.inline_asm_elementwise(TEXT, "=r,r,r,r", [a, b, total], dtype=tl.int32, is_pure=True, pack=1)


def fits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether these kernels may, and should, multiply x [M, K], its columns in the matrix's order, by it."""
    apart, size, columns = _apart(coded), coded.group_size, coded.num_columns
    in_groups = size % CHUNK == 0 or (size == 16 and apart == 16) or coded.scales.shape[1] == 1
    in_pairs = coded.minima is None or coded.pairs is not None
    of_bytes = coded.kind != "fp8" and (coded.table is None or coded.table.dtype == torch.int8)
    by_chunks = columns % CHUNK == 0 and apart % 16 == 0 and in_groups and in_pairs and of_bytes
    return 0 < len(x) <= MAX_ROWS and x.itemsize == 2 and x.is_contiguous() and by_chunks


def suits(x: torch.Tensor, parts: Sequence[Coded]) -> bool:
    """Whether they should for all parts of a matrix."""
    return all(part.order is None and fits(x, part) for part in parts)


def _apart(coded: Coded) -> int:
    """Columns between the two halves of a chunk."""
    return coded.half if coded.kind == "int4" else 16


def tiling(coded: Coded, num_sms: int, num_rows: int, *, paired: bool, whole: bool) -> Tiling:
    """A thread has two chunks; rows beyond 8,192 columns are split, unless a norm is that of `whole` ones.

    The more registers a tile takes, the fewer rows it has; there are as many programs as an SM runs at once: by the
    compiled code (`tests/kernels/compile_lanes.py`), 8 of two warps, or 6 of two rows and of five bits.
    """
    count = coded.num_columns // CHUNK
    num_splits = 1 if whole or count <= 256 else triton.cdiv(count, 128)
    chunks = triton.next_power_of_2(triton.cdiv(count, num_splits))
    num_warps = min(max(chunks // 64, 1), 16)
    bits = sum(BITS[coded.kind])
    lines, warps_a_sm = 4 if bits <= 5 and num_rows == 1 else 2, 16 if bits != 5 and num_rows == 1 else 12
    num_tiles = triton.cdiv(coded.num_rows, lines)
    # All programs have as many tiles, or one less.
    at_once = max(num_sms * warps_a_sm // num_warps // num_splits, 1)
    num_programs = triton.cdiv(num_tiles, triton.cdiv(num_tiles, at_once))
    return Tiling(lines // 2 if paired else lines, chunks, num_splits, num_programs, num_warps)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ coded.T + bias, for x [M, K] with its columns in the matrix's order."""
    out = x.new_empty(len(x), coded.num_rows)
    _run(x, None, coded, bias, _ADD, out)
    return out


def add(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """residual + x @ coded.T + bias, for x [M, K] and residual [M, E]."""
    out = torch.empty_like(residual)
    _run(x, None, coded, bias, _ADD, out, residual=residual)
    return out


def gated(
    x: torch.Tensor, norm: Norm | None, coded: Coded, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """activation(gate) * up for x [M, E], or its norm, times coded [2 * I, E], the gate in the first half: [M, I]."""
    out = x.new_empty(len(x), coded.num_rows // 2)
    _run(x, norm, coded, bias, _GELU if activation == "gelu_tanh" else _SILU, out)
    return out


def project_and_store(
    x: torch.Tensor, norm: Norm | None, parts: Sequence[Coded], bias: torch.Tensor | None, rotation: Rotation
) -> torch.Tensor:
    """The queries [M, Hq, D] of x, or its norm, rotated; keys and values, of the later rows, go to the cache.

    The parts of the matrix, one below the other, are whole heads.
    """
    head_dim = rotation.kv_cache.shape[-1]
    of_heads = rotation.q_norm is not None or rotation.kv_scales is not None
    q = x.new_empty(len(x), rotation.num_heads, head_dim)
    qkv = x.new_empty(len(x), sum(part.num_rows for part in parts)) if of_heads else q
    first = 0
    for part in parts:
        rows = slice(first, first + part.num_rows)
        own = None if bias is None else bias[rows]
        if of_heads:  # a norm is that of a whole head, which no program has
            _run(x, norm, part, own, _ADD, qkv[:, rows])
        else:
            _run(x, norm, part, own, _ROTATE, q, rotation=rotation, first_head=first // head_dim)
        first = rows.stop
    return rotate_and_store(qkv, *rotation) if of_heads else q


def _run(
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
    alone = epilogue != _ADD
    shape = tiling(coded, num_sms(x.device), len(x), paired=alone, whole=alone or norm is not None)
    if not multiplies_bfloat16(x.device):  # nor copies, that is
        shape = shape._replace(num_stages=0)
    run_by(shape, x, norm, coded, bias, epilogue, out, residual=residual, rotation=rotation, first_head=first_head)


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
    early = pdl(x.device)
    low, high = BITS[coded.kind]
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    parts = x
    if shape.num_splits > 1:
        parts = torch.empty(shape.num_splits * len(x) * coded.num_rows, dtype=torch.float32, device=x.device)
    _coded_vector_kernel[(shape.num_programs * shape.num_splits,)](
        x, x if norm is None else norm.weight, _pointers(coded), coded.codes if coded.table is None else coded.table,
        x if bias is None else bias, x if residual is None else residual, out, *places,
        parts, counters(x.device), shape.num_programs, out.stride(0), 0.0 if norm is None else norm.eps,
        *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        ROWS=len(x), IN=coded.num_columns, OUT=coded.num_rows, OUTS=shape.outs,
        CHUNKS=shape.chunks, SPLITS=shape.num_splits, LOW=low, HIGH=high, APART=_apart(coded), GROUP=coded.group_size,
        GROUPS=coded.scales.shape[1], SPAN=coded.span,
        MIDDLE=0 if coded.has_minima or coded.table is not None else MIDDLE[coded.kind],
        ZEROS=coded.zeros is not None, MINIMA=coded.has_minima, PAIR=_bits_of_pairs(coded),
        TABLE=coded.table is not None, EPILOGUE=epilogue, NORMED=norm is not None, BIAS=bias is not None,
        RESIDUAL=residual is not None, HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2,
        FIRST_HEAD=first_head, NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        STAGES=shape.num_stages, PDL=early, COMPILED=x.is_cuda, num_warps=shape.num_warps, launch_pdl=early,
    )  # fmt: skip


def _bits_of_pairs(coded: Coded) -> int:
    """Of a scale or a minimum, which are parts of one number; 0 without minima."""
    return 4 if coded.shares_bytes else 0 if coded.pairs is None else 8 * coded.pairs.itemsize


def _pointers(coded: Coded) -> tuple[torch.Tensor, ...]:
    """What `_load` is given of a matrix, codes by words; what it does not have is not read."""
    words = coded.codes.view(torch.int32)
    high = words if coded.high is None else coded.high.view(torch.int32)
    scales, factors = coded.scales, words if coded.factors is None else coded.factors
    if coded.pairs is not None:
        scales = coded.pairs.view(torch.int16 if coded.pairs.itemsize == 1 else torch.int32)
    if coded.factor_pairs is not None:
        factors = coded.factor_pairs.view(torch.int32)
    return words, high, scales, coded.codes if coded.zeros is None else coded.zeros, factors
