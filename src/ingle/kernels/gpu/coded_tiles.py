"""Tiles of codes as `coded_vector` takes them: which rows they are, where their words lie, and what groups have.

A tile is some rows of weights, or pairs of them, [LINES], times the chunks of 32 columns of a program, [CHUNKS].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(tile, lines, OUT: tl.constexpr, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
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
def first_column(chunk, APART: tl.constexpr):
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
def load_tile(
    matrix, tile, there, first_chunk, last_chunk, OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr,
    EPILOGUE: tl.constexpr, HALF: tl.constexpr, COUNT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    APART: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, ZEROS: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Of a tile's rows and chunks, [LINES, CHUNKS], the words of codes, those of the upper bits behind, and the scales
    and zeros of groups; with minima, a scale and a minimum are one number.

    Behind the last chunk and the last row those are again: of the one inputs are zeros, of the other nothing is kept.
    Of a tile that is not `there` nothing is asked for.
    Places are a tile's and, the same in every tile, a line's and a chunk's: so they take an addition in a loop.
    """
    LINES: tl.constexpr = OUTS if EPILOGUE == 0 else 2 * OUTS
    codes_ptr, high_ptr, scales_ptr, zeros_ptr, factors_ptr = matrix
    WHOLE: tl.constexpr = OUT % LINES == 0
    first_out = _first_out(tile, OUTS, EPILOGUE, HALF)
    if LOW == 2:
        words = _words(
            codes_ptr, there, first_out, first_chunk, last_chunk, 2, 2, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        )
    elif LOW == 4:
        words = _words(
            codes_ptr, there, first_out, first_chunk, last_chunk, 4, 4, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        )
    else:
        words = _words(
            codes_ptr, there, first_out, first_chunk, last_chunk, 4, 8, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        ) + _words(
            codes_ptr, there, first_out, first_chunk, last_chunk, 4, 8, 4, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        )  # fmt: skip
    if HIGH == 2:
        words += _words(
            high_ptr, there, first_out, first_chunk, last_chunk, 2, 2, 0, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT
        )
    index = tl.arange(0, LINES * CHUNKS)
    further = _further(index // CHUNKS, OUT, OUTS, EPILOGUE, HALF)
    if not WHOLE:
        further = tl.minimum(further, OUT - 1 - first_out)
    chunk = tl.minimum(first_chunk + _opaque(index % CHUNKS, COMPILED), last_chunk - 1)
    if HIGH == 1:
        place = high_ptr + first_out.to(tl.int64) * COUNT + (further * COUNT + chunk)
        words += (tl.reshape(tl.load(place, mask=there, eviction_policy="evict_first"), [LINES, CHUNKS]),)
    group = first_column(chunk, APART) // GROUP
    scales = _of_groups(scales_ptr, there, first_out, further, group, GROUPS, LINES, CHUNKS)
    zeros = scales
    if ZEROS:
        zeros = _of_groups(zeros_ptr, there, first_out, further, group, GROUPS, LINES, CHUNKS)
    steps = (scales, zeros)
    if GROUP == 16:
        others = scales
        if not _by_words(scales_ptr, GROUPS):
            others = _of_groups(scales_ptr, there, first_out, further, group + 1, GROUPS, LINES, CHUNKS)
        steps += (others, others)
    if SPAN:
        steps += (_of_groups(factors_ptr, there, first_out, further, group // SPAN, GROUPS // SPAN, LINES, CHUNKS),)
    return words, steps


@triton.constexpr_function
def _by_words(ptr, groups):
    """Whether a row's numbers are loaded by words."""
    return ptr.dtype.element_ty.primitive_bitwidth < 32 and groups * ptr.dtype.element_ty.primitive_bitwidth % 32 == 0


@triton.jit
def _of_groups(
    ptr, there, first_out, further, group, GROUPS: tl.constexpr, LINES: tl.constexpr, CHUNKS: tl.constexpr
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
    return tl.reshape(_whole(tl.load(place, mask=there)), [LINES, CHUNKS])


@triton.jit
def of_word(loaded, ptr, group, GROUPS: tl.constexpr, PAIR: tl.constexpr):
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
    ptr, there, first_out, first_chunk, last_chunk, EACH: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr,
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
    words = tl.load(
        tl.max_contiguous(tl.multiple_of(place, [4 * EACH]), [EACH]), mask=there, eviction_policy="evict_first"
    )
    if EACH == 2:
        apart = tl.split(tl.reshape(words, [LINES, CHUNKS, 2]))
    else:
        even, odd = tl.split(tl.reshape(words, [LINES, CHUNKS, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        apart = (first, second, third, fourth)
    return apart


@triton.jit
def _whole(values):
    return values.to(tl.int32) if values.dtype.is_int() else values
