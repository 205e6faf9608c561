"""Products of a few rows with GGUF's larger blocks on Hopper, as in `few_rows_ring`: Q4_K, Q5_K and Q6_K.

Scales come through the ring, too, and are taken in where codes become numbers: one instruction multiplies a code's bits
with its group's scale and adds the minimum, or takes the zero away. Both are rounded to bfloat16 before; what the
scale's rounding does to the middle code is taken out of the minimum. So the tensor cores' sums run over all columns.

A lane has 32 neighbouring bytes of a row's 128: two blocks of 32 columns, with all that belongs to those.
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

from ingle.kernels.coded import BITS, Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.device import await_previous, barrier, counters, num_sms, pdl
from ingle.kernels.gpu.endings import ADD, GELU, PLAIN, ROTATE, SILU, finish, row_scales

_UNIT = 256
"""Columns that an iteration takes, and that a factor is of."""
_ALIGNMENT = 16
"""Bytes to which the copy engine wants rows aligned."""
_LEAST_UNITS = 2
_MOST_UNITS = 32
"""Iterations of a program, at least: its beginning and its end take longer than one; and at most."""
_WHOLE = 0.9
"""Of all programs, that have to share tiles evenly, so that the others are not worth it."""

_BELOW = gl.constexpr(2.0**-30)
"""Numbers are by so much smaller, for a code's bits alone are a float below the lowest exponent, 2 ** 133 too small."""
_SCALED = gl.constexpr(2.0**103)

# Of two bytes of $3, the group's steps, and their factors, in pairs: the scale, of codes in a byte's upper half where
# those are not moved, and the minimum, with MIDDLE times what rounding has taken from the scale.
_WITH_MINIMA = (
    "{ .reg .b32 a; .reg .f32 s, m, t; "
    "prmt.b32 a, $3, 0x4b000000, FIRST; mov.b32 s, a; sub.rn.f32 s, s, 0f4B000000; mul.rn.f32 s, s, $4; "
    "cvt.rn.bf16x2.f32 $0, s, s; shl.b32 a, $0, 16; mov.b32 t, a; sub.rn.f32 t, s, t; "
    "prmt.b32 a, $3, 0x4b000000, SECOND; mov.b32 m, a; sub.rn.f32 m, m, 0f4B000000; mul.rn.f32 m, m, $5; "
    "fma.rn.f32 m, t, MIDDLE, m; cvt.rn.bf16x2.f32 $2, m, m; "
    "mov.b32 a, UPPER; mul.rn.bf16x2 $1, $0, a; }"
)
# The same of two groups with signs: $0 and $1 scales, $2 and $3 what takes the zero, 32, away.
_SIGNED = (
    "{ .reg .b32 a, p; .reg .f32 s; xor.b32 p, $4, 0x80808080; "
    "prmt.b32 a, p, 0x4b000000, FIRST; mov.b32 s, a; sub.rn.f32 s, s, 0f4B000080; mul.rn.f32 s, s, $5; "
    "cvt.rn.bf16x2.f32 $0, s, s; "
    "prmt.b32 a, p, 0x4b000000, SECOND; mov.b32 s, a; sub.rn.f32 s, s, 0f4B000080; mul.rn.f32 s, s, $5; "
    "cvt.rn.bf16x2.f32 $1, s, s; "
    "mov.b32 a, 0x80208020; mul.rn.bf16x2 $2, $0, a; mul.rn.bf16x2 $3, $1, a; }"
)


def _of_either(text: str) -> tuple[str, str]:
    """For the first and the second block of a lane."""
    return tuple(text.replace("FIRST", first).replace("SECOND", second)  # type: ignore[return-value]
                 for first, second in (("0x7440", "0x7441"), ("0x7442", "0x7443")))  # fmt: skip


_STEPS = gl.constexpr((
    *_of_either(_WITH_MINIMA.replace("MIDDLE", "0f00080000").replace("UPPER", "0x3d803d80")),  # 8 * 2 ** -133, 2 ** -4
    *_of_either(_WITH_MINIMA.replace("MIDDLE", "0f00100000").replace("UPPER", "0x3f803f80")),  # 16 * 2 ** -133, 1
    *_of_either(_SIGNED),
))  # fmt: skip
"""By a code's upper bits, and the block."""

# Of a word, that is of four columns and of the block's 16 further, four registers of two numbers: the lower halves'
# first and second pair, then the upper ones'.
_NUMBERS = gl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $4, 0, 0x4140; prmt.b32 c, $4, 0, 0x4342; "
    "and.b32 b, a, 0x00f000f0; and.b32 a, a, 0x000f000f; and.b32 d, c, 0x00f000f0; and.b32 c, c, 0x000f000f; "
    "fma.rn.bf16x2 $0, a, $6, $10; fma.rn.bf16x2 $1, c, $6, $10; "
    "fma.rn.bf16x2 $2, b, $8, $10; fma.rn.bf16x2 $3, d, $8, $10; }"
)
# The same of two words $8 and $10 with $12, their upper bits; of the lower halves $14 scales and $18 is added, of the
# upper ones $16 and $20.
_LOWER = (
    "MOVE_LOWER and.b32 t, t, MASK; lop3.b32 u, WORD, 0x0f0f0f0f, t, 0xea; prmt.b32 t, u, 0, 0x4140; "
    "prmt.b32 u, u, 0, 0x4342; fma.rn.bf16x2 OUT0, t, $14, $18; fma.rn.bf16x2 OUT1, u, $14, $18; "
)
_UPPER = (
    "MOVE_UPPER and.b32 t, t, MASK; shr.b32 u, WORD, 4; lop3.b32 u, u, 0x0f0f0f0f, t, 0xea; "
    "prmt.b32 t, u, 0, 0x4140; prmt.b32 u, u, 0, 0x4342; "
    "fma.rn.bf16x2 OUT2, t, $16, $20; fma.rn.bf16x2 OUT3, u, $16, $20; "
)


def _two(mask: str, *moves: tuple[str, str]) -> str:
    """Of each word, how its columns' upper bits, of the lower halves and of the upper ones, are moved."""
    text = "{ .reg .b32 t, u; "
    for index, (lower, upper) in enumerate(moves):
        part = (_LOWER + _UPPER).replace("MOVE_LOWER", f"{lower};").replace("MOVE_UPPER", f"{upper};")
        part = part.replace("MASK", mask).replace("WORD", f"${8 + 2 * index}")
        for out in range(4):
            part = part.replace(f"OUT{out}", f"${4 * index + out}")
        text += part
    return text + "}"


_MOVES = ("shl.b32 t, $12, 4", "mov.b32 t, $12"), ("shl.b32 t, $12, 2", "shr.b32 t, $12, 2")
_TWO_WORDS_OF_SIX = gl.constexpr(_two("0x30303030", *_MOVES))
_TWO_WORDS_OF_FIVE = gl.constexpr(_two("0x10101010", *_MOVES))
_TWO_OTHERS_OF_FIVE = gl.constexpr(
    _two("0x10101010", ("shl.b32 t, $12, 3", "shr.b32 t, $12, 1"), ("shl.b32 t, $12, 1", "shr.b32 t, $12, 3"))
)
_FOUR, _EIGHT = gl.constexpr((gl.bfloat16,) * 4), gl.constexpr((gl.bfloat16,) * 8)
_THREE_WORDS, _FOUR_WORDS = gl.constexpr((gl.int32,) * 3), gl.constexpr((gl.int32,) * 4)


@gluon.constexpr_function
def _powers(first, end):
    """Of two, from `first` to below `end`."""
    return [1 << bit for bit in range(first.bit_length() - 1, end.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(outs, warps, width):
    """A lane has `width` neighbouring words of a row of weights, and of the row eight further."""
    registers = [[0, at] for at in _powers(1, width)] + [[8, 0], *([at, 0] for at in _powers(16 * warps, outs))]
    lanes = [[0, width], [0, 2 * width], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[at, 0] for at in _powers(16, 16 * warps)], [], [outs, 4 * width]
    )


@gluon.constexpr_function
def _block_layout(outs, warps, width):
    """The same of `width` words of a block, of four lanes' [.., 4, width]: where these are neighbours in registers."""
    registers = [[0, 0, at] for at in _powers(1, width)] + [[at, 0, 0] for at in (8, *_powers(16 * warps, outs))]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[at, 0, 0] for at in _powers(16, 16 * warps)], [], [outs, 4, width]
    )


@gluon.constexpr_function
def _inputs_layout(rows, warps):
    """Of a half, a row and a lane's block 16 neighbours: a lane has those of both halves."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], *([4 * at, 0] for at in _powers(8, 2 * rows))]
    lanes = [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in _powers(1, warps)], [], [8 * rows, 16])


@gluon.jit
def _inputs(x, ROWS: gl.constexpr, layout: gl.constexpr):
    """[8 * ROWS, 16] to [128, ROWS]"""
    x = gl.reshape(x, [2, ROWS, 4, 4, 2, 2])  # half, row, lane, word, pair, number
    return gl.convert_layout(gl.reshape(gl.permute(x, [0, 3, 4, 2, 5, 1]), [128, ROWS]), layout)


@gluon.jit
def _halves(words, OUTS: gl.constexpr, WIDTH: gl.constexpr):
    """Of rows' words, of each of four lanes 2 * WIDTH, two tensors [OUTS, 4, WIDTH]."""
    first, other = gl.split(gl.permute(gl.reshape(words, [OUTS, 4, 2, WIDTH]), [0, 1, 3, 2]))
    layout: gl.constexpr = _block_layout(OUTS, gl.num_warps(), WIDTH)
    return gl.convert_layout(first, layout), gl.convert_layout(other, layout)


@gluon.jit
def _for_each(value, words):
    """[OUTS, 4], for each of words [OUTS, 4, N]."""
    value = gl.expand_dims(gl.convert_layout(value, gl.SliceLayout(2, words.type.layout)), 2)
    return gl.broadcast(value, words)[0]


@gluon.jit
def _two_words(first, other, high, scale, upper_scale, added, upper_added, ASM: gl.constexpr):
    """Numbers, of whose dimensions the last are: number, pair, half, word."""
    scale, upper_scale = _for_each(scale, first), _for_each(upper_scale, first)
    added, upper_added = _for_each(added, first), _for_each(upper_added, first)
    # All twice, for the assembly makes two numbers at once.
    held = [gl.join(first, first), gl.join(other, other), gl.join(high, high), gl.join(scale, scale),
            gl.join(upper_scale, upper_scale), gl.join(added, added), gl.join(upper_added, upper_added)]  # fmt: skip
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r,r,r,r,r,r", held, dtype=_EIGHT, is_pure=True, pack=2
    )
    return gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))


@gluon.jit
def _numbers(words, high, pairs, factor, minimum_factor, BLOCK: gl.constexpr, UPPER_BITS: gl.constexpr,
             OUTS: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Of a lane's words [OUTS, 4, 4] numbers [OUTS, 128], in the order of `_inputs`, by _BELOW smaller.

    pairs [OUTS, 4]: two steps of each block; factor, minimum_factor [OUTS]; high: the words of codes' upper bits."""
    factor, minimum_factor = gl.expand_dims(factor, 1), gl.expand_dims(minimum_factor, 1)
    factor, pairs = gl.broadcast(factor, pairs)
    minimum_factor, pairs = gl.broadcast(minimum_factor, pairs)
    if UPPER_BITS == 2:
        scale, upper_scale, added, upper_added = gl.inline_asm_elementwise(
            _STEPS[4 + BLOCK], "=&r,=&r,=&r,=&r,r,f", [pairs, factor], dtype=_FOUR_WORDS, is_pure=True, pack=1
        )
    else:
        scale, upper_scale, added = gl.inline_asm_elementwise(
            _STEPS[2 * UPPER_BITS + BLOCK], "=&r,=&r,=&r,r,f,f", [pairs, factor, minimum_factor], dtype=_THREE_WORDS,
            is_pure=True, pack=1,
        )  # fmt: skip
        upper_added = added
    if UPPER_BITS == 0:
        scale, upper_scale, added = _for_each(scale, words), _for_each(upper_scale, words), _for_each(added, words)
        held = [gl.join(words, words), gl.join(scale, scale), gl.join(upper_scale, upper_scale),
                gl.join(added, added)]  # fmt: skip
        low, low_after, upper, upper_after = gl.inline_asm_elementwise(
            _NUMBERS, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", held, dtype=_FOUR, is_pure=True, pack=2
        )
        numbers = gl.join(gl.join(low, low_after), gl.join(upper, upper_after))
        numbers = gl.permute(numbers, [0, 5, 2, 4, 1, 3])  # of row, lane, word, number, pair, half
    else:
        first, other = _halves(words, OUTS, 2)
        if UPPER_BITS == 2:
            numbers = _two_words(first, other, high, scale, upper_scale, added, upper_added, _TWO_WORDS_OF_SIX)
            numbers = gl.permute(numbers, [0, 5, 6, 2, 4, 1, 3])  # of row, lane, word, number, pair, half, word
        else:
            first, first_after = _halves(first, OUTS, 1)
            other, other_after = _halves(other, OUTS, 1)
            numbers = gl.join(
                _two_words(first, other, high, scale, scale, added, added, _TWO_WORDS_OF_FIVE),
                _two_words(first_after, other_after, high, scale, scale, added, added, _TWO_OTHERS_OF_FIVE),
            )
            numbers = gl.permute(numbers, [0, 5, 6, 7, 2, 4, 1, 3])  # and one more word at the end
    return gl.convert_layout(gl.reshape(numbers, [OUTS, 128]), layout)


@gluon.jit
def _first_out(tile, R: gl.constexpr, EPILOGUE: gl.constexpr, HALF: gl.constexpr):
    out = tile * R
    if EPILOGUE == 1:
        out = out // HALF * 2 * HALF + out % HALF
    return out


@gluon.jit
def _factors(
    factors_ptr, first,
    OUTS: gl.constexpr, R: gl.constexpr, APART: gl.constexpr, UNITS: gl.constexpr, TILES: gl.constexpr,
    HELD: gl.constexpr, EPILOGUE: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """[HELD, OUTS]: of units from `first` on the factor, in 16 bits, and above them the minima's where there is one."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4 if HELD > 2 else 1], [32, 1], [gl.num_warps(), 1], [1, 0])
    of_tile = gl.arange(0, OUTS, layout=gl.SliceLayout(1, layout))
    step = first + gl.arange(0, HELD, layout=gl.SliceLayout(0, layout))
    outs = _first_out(step // UNITS, R, EPILOGUE, HALF)[None, :] + (of_tile % R + of_tile // R * APART)[:, None]
    places = factors_ptr + outs * UNITS + (step % UNITS)[None, :]
    return gl.permute(gl.load(places, mask=(step < TILES * UNITS)[None, :], other=0), [1, 0])


@gluon.jit
def _load(
    codes_desc, high_desc, steps_desc, codes, high, steps, arrived, step, there,
    UNITS: gl.constexpr, R: gl.constexpr, HALVES: gl.constexpr, UPPER_BITS: gl.constexpr, EPILOGUE: gl.constexpr,
    HALF: gl.constexpr,
):  # fmt: skip
    """Asks for a unit of a tile's weights."""
    at = [step % UNITS, 0, _first_out(step // UNITS, R, EPILOGUE, HALF), 0]
    place = codes._reinterpret(gl.int32, [1, HALVES, R, 32], codes_desc.layout)
    tma.async_copy_global_to_shared(codes_desc, at, arrived, place, pred=there)
    if UPPER_BITS:
        place = high._reinterpret(gl.int32, [1, HALVES, R, 8 * UPPER_BITS], high_desc.layout)
        tma.async_copy_global_to_shared(high_desc, at, arrived, place, pred=there)
    place = steps._reinterpret(gl.int32, [1, HALVES, R, 4], steps_desc.layout)
    tma.async_copy_global_to_shared(steps_desc, at, arrived, place, pred=there)


@gluon.jit(do_not_specialize=["num_rows"])
def _few_rows_blocks_kernel(
    codes_desc, high_desc, steps_desc, x_desc, factors_ptr, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr,
    values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, num_squares, eps, v_offset, page_stride, token_stride, head_stride, first_head,
    IN: gl.constexpr, OUT: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, OUTS: gl.constexpr,
    HALVES: gl.constexpr, APART: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, SHARERS: gl.constexpr,
    EPILOGUE: gl.constexpr, NORMED: gl.constexpr, BIASED: gl.constexpr, SQUARED: gl.constexpr, SQUARES: gl.constexpr,
    HALF: gl.constexpr, NUM_HEADS: gl.constexpr, NUM_KV_HEADS: gl.constexpr, PAGE_SIZE: gl.constexpr,
    UPPER_BITS: gl.constexpr, HELD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A tile has OUTS rows of weights: neighbours, or those of two HALVES that are APART. A unit is 256 columns of it,
    of which STAGES are in the ring. All tiles' units, one after the other, are shared out to PROGRAMS evenly; where
    these are not as many as tiles, up to SHARERS have units of the same."""
    R: gl.constexpr = OUTS // HALVES
    UNITS: gl.constexpr = IN // 256
    TILES: gl.constexpr = OUT // OUTS
    BYTES: gl.constexpr = OUTS * (144 + 32 * UPPER_BITS) + ROWS * 512
    layout: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    numbers_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    inputs_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    steps_layout: gl.constexpr = _words_layout(OUTS, WARPS, 1)
    of_outs: gl.constexpr = gl.SliceLayout(1, layout)

    program = gl.program_id(0)
    first = _first_step(program, UNITS, TILES, PROGRAMS)
    num_steps = _first_step(program + 1, UNITS, TILES, PROGRAMS) - first
    codes = gl.allocate_shared_memory(gl.int32, [STAGES, OUTS, 32], gl.NVMMASharedLayout(128, 32, 2))
    if UPPER_BITS:
        HIGH: gl.constexpr = gl.NVMMASharedLayout(32 * UPPER_BITS, 32, 2)
        high = gl.allocate_shared_memory(gl.int32, [STAGES, OUTS, 8 * UPPER_BITS], HIGH)
    else:
        high = codes
    steps = gl.allocate_shared_memory(gl.int32, [STAGES, OUTS, 4], gl.NVMMASharedLayout(0, 32, 2))
    xs = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 16 * ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        there = stage < num_steps
        mbarrier.expect(arrived.index(stage), BYTES, pred=there)
        _load(
            codes_desc, high_desc, steps_desc, codes.index(stage), high.index(stage), steps.index(stage),
            arrived.index(stage), first + stage, there, UNITS, R, HALVES, UPPER_BITS, EPILOGUE, HALF,
        )  # fmt: skip
    held = _factors(factors_ptr, first, OUTS, R, APART, UNITS, TILES, HELD, EPILOGUE, HALF)
    factors = gl.allocate_shared_memory(held.dtype, [HELD, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    factors.store(held)
    factors = factors._reinterpret(held.dtype, [HELD, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if PDL:
        await_previous()
    for stage in gl.static_range(STAGES):
        place = xs.index(stage)._reinterpret(gl.bfloat16, [1, 4, ROWS, 4, 16], x_desc.layout)
        at = [(first + stage) % UNITS, 0, 0, 0, 0]
        tma.async_copy_global_to_shared(x_desc, at, arrived.index(stage), place, pred=stage < num_steps)

    if NORMED:
        of_squares: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
        row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, of_squares))[:, None]
        piece = gl.arange(0, SQUARES, layout=gl.SliceLayout(0, of_squares))[None, :]
        scale_of_rows = row_scales(squares_in_ptr, row, piece, num_rows, num_squares, eps, IN)
        scale_of_rows = gl.convert_layout(scale_of_rows, gl.SliceLayout(0, layout))[None, :]
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, layout))[None, :]
    within = gl.arange(0, OUTS, layout=of_outs)[:, None] * ROWS + rows

    total = gl.zeros([OUTS, ROWS], gl.float32, layout)
    stage, phase = 0, 0
    for index in range(num_steps):
        mbarrier.wait(arrived.index(stage), phase)
        factor = factors.index(index).load(gl.SliceLayout(1, steps_layout))
        minimum_factor = factor
        if UPPER_BITS < 2:
            minimum_factor = (factor >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32) * _BELOW
        factor = factor.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32) * _SCALED
        pairs = steps.index(stage).load(steps_layout)
        words = _halves(codes.index(stage).load(_words_layout(OUTS, WARPS, 8)), OUTS, 4)
        highs = words
        if UPPER_BITS:
            highs = _halves(high.index(stage).load(_words_layout(OUTS, WARPS, 2 * UPPER_BITS)), OUTS, UPPER_BITS)
        for block in gl.static_range(2):
            x = xs.index(stage).slice(block * (8 * ROWS), 8 * ROWS, dim=0).load(_inputs_layout(ROWS, WARPS))
            numbers = _numbers(
                words[block], highs[block], pairs, factor, minimum_factor, block, UPPER_BITS, OUTS, numbers_layout
            )
            total = mma_v2(numbers, _inputs(x, ROWS, inputs_layout), total)
        # What was read makes room.
        later = first + index + STAGES
        there = index + STAGES < num_steps
        mbarrier.expect(arrived.index(stage), BYTES, pred=there)
        _load(
            codes_desc, high_desc, steps_desc, codes.index(stage), high.index(stage), steps.index(stage),
            arrived.index(stage), later, there, UNITS, R, HALVES, UPPER_BITS, EPILOGUE, HALF,
        )  # fmt: skip
        place = xs.index(stage)._reinterpret(gl.bfloat16, [1, 4, ROWS, 4, 16], x_desc.layout)
        tma.async_copy_global_to_shared(x_desc, [later % UNITS, 0, 0, 0, 0], arrived.index(stage), place, pred=there)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)

        tile, unit = (first + index) // UNITS, (first + index) % UNITS
        if (unit == UNITS - 1) | (index == num_steps - 1):
            begin = tile * UNITS
            num_units = unit + 1 - gl.maximum(first - begin, 0)
            done = num_units == UNITS
            if SHARERS > 1:  # noqa: SIM102 - known when it is compiled
                if num_units < UNITS:
                    part = _part(program, begin, UNITS, TILES, PROGRAMS)
                    gl.store(parts_ptr + part * (OUTS * ROWS) + within, total)
                    barrier(True)  # the whole program's stores come before its arrival
                    before = gl.atomic_add(arrived_ptr + tile, num_units, sem="acq_rel")
                    done = before + num_units == UNITS
                    if done:
                        gl.store(arrived_ptr + tile, 0)
                        total = _joined(parts_ptr, within, begin, OUTS * ROWS, UNITS, TILES, PROGRAMS, SHARERS)
            if done:
                total *= 1 / _BELOW
                if NORMED:
                    total *= scale_of_rows
                one, other = total, total
                if HALVES == 2:
                    one, other = gl.split(gl.permute(gl.reshape(total, [2, R, ROWS]), [1, 2, 0]))
                    one, other = gl.convert_layout(one, layout), gl.convert_layout(other, layout)
                out = _first_out(tile, R, EPILOGUE, HALF)
                finish(
                    one, other, out, out + APART, first_head * HALF // R + tile, OUT // OUTS,
                    gl.arange(0, R, layout=of_outs)[:, None], rows, num_rows, bias_ptr, residual_ptr, norm_ptr,
                    out_ptr, values_ptr, squares_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
                    v_offset, page_stride, token_stride, head_stride,
                    OUT, R, EPILOGUE, BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                )  # fmt: skip
            total = gl.zeros([OUTS, ROWS], gl.float32, layout)


@gluon.jit
def _first_step(program, UNITS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr):
    """The first of a program's steps, of all tiles' units."""
    if TILES % PROGRAMS == 0:
        return program * (TILES // PROGRAMS * UNITS)
    return program * (TILES * UNITS) // PROGRAMS


@gluon.jit
def _part(program, begin, UNITS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr):
    """Where a program leaves its sums of a tile that begins there: of its first one, or else of its last."""
    return 2 * program + (_first_step(program, UNITS, TILES, PROGRAMS) < begin).to(gl.int32)


@gluon.jit
def _joined(
    parts_ptr, within, begin, SIZE: gl.constexpr, UNITS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr,
    SHARERS: gl.constexpr,
):  # fmt: skip
    """The sum of what all programs of a tile left, in order, all asked for at once."""
    program = ((begin + 1) * PROGRAMS - 1) // (TILES * UNITS)
    left = (_left(parts_ptr, within, program, begin, SIZE, UNITS, TILES, PROGRAMS),)
    for index in gl.static_range(1, SHARERS):
        left += (_left(parts_ptr, within, program + index, begin, SIZE, UNITS, TILES, PROGRAMS),)
    total = left[0]
    for index in gl.static_range(1, SHARERS):
        total += left[index]
    return total


@gluon.jit
def _left(
    parts_ptr, within, program, begin,
    SIZE: gl.constexpr, UNITS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """What a program left of a tile that begins there: zeros where that has none of it."""
    there = _first_step(program, UNITS, TILES, PROGRAMS) < begin + UNITS
    place = parts_ptr + _part(program, begin, UNITS, TILES, PROGRAMS) * SIZE
    return gl.load(place + within, mask=there, other=0.0, cache_modifier=".cg")


class Tiling(NamedTuple):
    """How a product is shared out."""

    outs: int
    """Rows of weights that a program has, of both halves where there are such."""
    num_programs: int
    """Among which all tiles' columns are shared out."""
    num_stages: int
    """Iterations whose weights are in the ring."""
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
        first_head: int = 0,
    ) -> None:
        """`first_head`: of those that the matrix projects to."""
        device, (num_rows, size_in), size_out = x.device, x.shape, coded.num_rows
        rows, units = 8 if num_rows <= 8 else 16, size_in // _UNIT
        half = 1 if rotation is None else rotation.kv_cache.shape[-1] // 2
        halves = 1 if epilogue in (ADD, PLAIN) else 2
        apart = half if epilogue == ROTATE else size_out // 2 if halves == 2 else 0

        def described(tensor: torch.Tensor) -> TensorDescriptor:
            words = tensor.view(size_out, -1).view(torch.int32)
            width, size = words.shape[1], words.shape[1] // units
            swizzle = 4 * size if size > 4 else 0
            return TensorDescriptor(
                words, [units, halves, size_out - apart, size], [size, max(apart, 1) * width, width, 1],
                [1, halves, self.outs // halves, size], gl.NVMMASharedLayout(swizzle, 32, 4),
            )  # fmt: skip

        inputs = TensorDescriptor(
            x, [units, 4, num_rows, 4, 16], [_UNIT, 16, x.stride(0), 64, 1], [1, 4, rows, 4, 16],
            gl.NVMMASharedLayout(32, 16, 5),
        )  # fmt: skip
        codes = described(coded.codes)
        num_tiles, num_programs, parts, sharers = size_out // self.outs, self.num_programs, x, 1
        if num_tiles % num_programs:
            sharers = triton.cdiv(units - 1, num_tiles * units // num_programs) + 1
            parts = x.new_empty(2 * num_programs * self.outs * rows, dtype=torch.float32)
        held = triton.next_power_of_2(triton.cdiv(num_tiles * units, num_programs))
        early, num_squares = pdl(device), 1 if squares_in is None else squares_in.shape[1]
        places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
        _few_rows_blocks_kernel[(num_programs,)](
            codes, codes if coded.high is None else described(coded.high), described(_steps(coded)), inputs,
            _factors_of(coded), _or(bias, x), _or(squares_in, x), _or(residual, x), x if norm is None else norm.weight,
            out, _or(values, x), _or(squares, x), parts, counters(device), *places,
            num_rows, num_squares, 0.0 if norm is None else norm.eps,
            *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]), first_head,
            IN=size_in, OUT=size_out, ROWS=rows, WARPS=self.num_warps, OUTS=self.outs, HALVES=halves, APART=apart,
            STAGES=self.num_stages, PROGRAMS=num_programs, SHARERS=sharers, EPILOGUE=epilogue,
            NORMED=squares_in is not None, BIASED=bias is not None, SQUARED=squares is not None,
            SQUARES=triton.next_power_of_2(num_squares), HALF=half,
            NUM_HEADS=0 if rotation is None else rotation.num_heads,
            NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
            PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
            UPPER_BITS=BITS[coded.kind][1], HELD=held, PDL=early,
            num_warps=self.num_warps, launch_pdl=early,
        )  # fmt: skip


def tiling(x: torch.Tensor, coded: Coded, epilogue: int, half: int = 1) -> Tiling | None:
    """For a product that ends so, of heads with such halves; None where this kernel does not fit.

    Programs are as many as run at once: three for each SM, or two where rows are long, whose ring is deeper. Each has
    whole tiles where these are many, or shares one with as many others where that leaves few places free."""
    gated, num_units, sms = epilogue in (SILU, GELU), coded.num_columns // _UNIT, num_sms(x.device)
    if not fits(x, coded) or (epilogue == ROTATE and half % 32):
        return None
    is_long, is_tall = epilogue == ADD and num_units > _MOST_UNITS, epilogue == PLAIN and coded.num_rows >= 256 * sms
    outs, num_stages, most = 128 if gated or is_long or is_tall else 64, 3 if is_long else 2, (3 - is_long) * sms
    num_tiles = coded.num_rows // outs
    most = max(min(most, num_tiles * num_units // _LEAST_UNITS), triton.cdiv(num_tiles * num_units, _MOST_UNITS))
    whole = num_tiles if num_tiles >= 2 * most else most - most % num_tiles
    # A warp has rows of both halves.
    num_warps = 2 if epilogue == ROTATE else 4
    return Tiling(outs, whole if whole >= _WHOLE * most else most, num_stages, num_warps)


def fits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether this kernel takes a product of x [M, K] by such a matrix, alone."""
    group_size = {"int4": 32, "int5": 32, "int6": 16}.get(coded.kind)
    if not coded.in_planes or coded.group_size != group_size or coded.shares_bytes or coded.table is not None:
        return False
    if coded.zeros is not None or coded.has_minima != (group_size == 32) or coded.span * group_size != _UNIT:
        return False
    if group_size == 32 and (coded.pairs is None or coded.factor_pairs is None):
        return False
    held = (coded.codes, _steps(coded), _factors_of(coded), *(() if coded.high is None else (coded.high,)))
    return (
        x.dtype == torch.bfloat16
        and coded.num_rows % 128 == 0
        and coded.num_columns % _UNIT == 0
        and _steps(coded).itemsize == 1
        and (coded.factors is not None and coded.factors.dtype == torch.float16)
        and all(each.is_contiguous() and each.data_ptr() % _ALIGNMENT == 0 for each in held)
        and x.data_ptr() % _ALIGNMENT == 0
        and x.stride(0) * x.itemsize % _ALIGNMENT == 0
    )


def _steps(coded: Coded) -> torch.Tensor:
    """Two bytes of each block of 32 columns: its scale and its minimum, or the scales of both its groups."""
    return coded.scales if coded.pairs is None else coded.pairs


def _factors_of(coded: Coded) -> torch.Tensor:
    """What those are multiplied with: of 256 columns one integer of 16 or, with the minima's, of 32 bits."""
    if coded.factor_pairs is not None:
        return coded.factor_pairs.view(torch.int32)
    assert coded.factors is not None
    return coded.factors.view(torch.int16)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
