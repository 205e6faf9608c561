"""Codes on the shortest way to the tensor cores: what a lane loads of a row is what it gives to a product.

A product adds over columns, whose order is free. So a lane loads up to 16 bytes of a row of codes at once, as they are
stored, turns them into numbers in its registers, and those already are its share of the tensor cores' operand: nothing
goes through an SM's memory, and no warp waits for another. A program's warps have the same rows and share out the
columns: so what a warp loads of the inputs serves several strips of rows.

Of codes become numbers that are theirs but for a constant (`BIAS`), for a code's bits are put below a fixed exponent.
What that adds to a group's sum is the sum of the inputs times the constant, and so is what a zero takes away; that sum
comes from the tensor cores too, by a product with ones.

The inline assembly is on two numbers of 16 bits at once, so it asks that Triton keeps those two beside each other, and
that the operands of products are laid out as here: `tests/kernels/test_targets.py` compiles the kernel and looks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.gpu import codes
from ingle.kernels.gpu.codes import FORMATS

# Two numbers of 16 bits in a register. $1 and $2 are a word of a row, $3 and $4 of the one eight further; $5 and $6
# say which, $7 and $8 how far the bits are from where they are wanted. All but the words are constants.
_PICK = "{ .reg .b32 t, s, a, b; .reg .pred p; setp.ne.s32 p, $5, 0; selp.b32 t, $3, $1, p; "
_INT4_BF16 = _PICK + "shr.b32 t, t, $7; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }"  # 128 and the code
_INT4_FP16 = _PICK + "shr.b32 t, t, $7; and.b32 $0, t, 0x000f000f; }"  # the code times 2 ** -24
_INT8_BF16 = (  # 128 and seven bits, less 256 or, where the eighth is set, 128
    _PICK + "shr.b32 t, t, $7; lop3.b32 s, t, 0x00800080, 0xc380c380, 0x6a; "
    "lop3.b32 t, t, 0x007f007f, 0x43004300, 0xea; mov.b32 a, 0x3f803f80; fma.rn.bf16x2 $0, t, a, s; }"
)
_INT8_FP16 = _PICK + "shr.b32 t, t, $7; and.b32 $0, t, 0x00ff00ff; }"
# The bits of a float whose exponent has another bias, which is put right here, or in float16 by the scales.
_FP8 = _PICK + "xor.b32 s, $7, 8; shl.b32 t, t, s; and.b32 s, t, 0x80008000; "
_FP8_BF16 = (
    _FP8 + "shr.b32 t, t, 4; lop3.b32 t, t, 0x07f007f0, s, 0xea; "
    "mov.b32 a, 0x7b807b80; mov.b32 b, 0x80008000; fma.rn.bf16x2 $0, t, a, b; }"
)
_FP8_FP16 = _FP8 + "shr.b32 t, t, 1; lop3.b32 $0, t, 0x3f803f80, s, 0xea; }"
_BF16_ASM: tl.constexpr = tl.constexpr((_INT4_BF16, _INT8_BF16, _FP8_BF16))
_FP16_ASM: tl.constexpr = tl.constexpr((_INT4_FP16, _INT8_FP16, _FP8_FP16))
_LOW: tl.constexpr = tl.constexpr("prmt.b32 $0, $1, $2, 0x5410;")
_HIGH: tl.constexpr = tl.constexpr("prmt.b32 $0, $1, $2, 0x7632;")
_BIAS = {torch.bfloat16: (128, -128, 0), torch.float16: (0, 0, 0)}
_UNIT = {torch.bfloat16: (1.0, 1.0, 1.0), torch.float16: (2.0**24, 2.0**24, 2.0**8)}
"""By kind: what a number is more than its code, and what it is multiplied with to be as large."""


def block_bytes(coded: Coded) -> int | None:
    """Of a row, that four lanes load at once, all of one group; None for codes that are not read so."""
    if coded.kind not in FORMATS or coded.table is not None:
        return None
    if not coded.codes.is_contiguous():
        return None
    per_byte, whole = FORMATS[coded.kind].columns_per_byte, coded.scales.shape[1] == 1
    others = (coded.zeros, coded.minima)
    if any(each is not None and each.stride() != coded.scales.stride() for each in others):
        return None
    for size in (coded.half,) if coded.kind == "int4" else (64, 32, 16):
        fits = coded.codes.shape[1] % size == 0 and (whole or coded.group_size % (size * per_byte) == 0)
        if size in (64, 32, 16) and fits:
            return size
    return None


def constants(coded: Coded, dtype: torch.dtype, *, compiled: bool) -> dict[str, object]:
    """What kernels are compiled for."""
    size = block_bytes(coded)
    assert size is not None
    form, minima, groups = FORMATS[coded.kind], coded.minima is not None, coded.scales.shape[1]
    bias = _BIAS[dtype][form.kind] if compiled else 0
    zero = bias + (0 if minima else form.middle)
    sums = zero != 0 or coded.zeros is not None or minima
    return {
        "WIDTH": coded.codes.shape[1] // 4, "PER_BYTE": form.columns_per_byte, "WORDS": size // 16, "KIND": form.kind,
        "GROUP": coded.group_size if groups > 1 or sums or coded.span else 0, "GROUPS": groups,
        "STEPS": coded.scales.stride(), "FACTOR_STEPS": (0, 0) if coded.factors is None else coded.factors.stride(),
        "SPAN": coded.span, "ZERO": zero, "BIAS": bias, "ZEROS": coded.zeros is not None, "MINIMA": minima,
        "SUMS": sums, "UNIT": _UNIT[dtype][form.kind] if compiled else 1.0, "COMPILED": compiled,
    }  # fmt: skip


@triton.jit
def _numbers(
    first, other, HALF: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr,
    dtype: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """int32 [WARPS, 8, 4, WORDS] of rows r and r + 8 to numbers [WARPS, 16, 16 * WORDS] of those rows."""
    # Of a word the bytes 0 and 2, then 1 and 3: `far` and `pair` in the names of dimensions.
    second = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 2, 1])
    far = tl.reshape(tl.arange(0, 2) * 8 + 4 * HALF, [1, 1, 1, 1, 2, 1, 1])
    pair = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 1, 1, 2])
    if COMPILED:
        # A pair's dimension comes by joining, which also makes the compiler give a lane four columns in a row.
        first = tl.reshape(tl.join(first, first), [WARPS, 8, 4, WORDS, 1, 1, 2])
        other = tl.reshape(tl.join(other, other), [WARPS, 8, 4, WORDS, 1, 1, 2])
        far, pair = tl.broadcast(far, pair)
        first, second = tl.broadcast(first, second)
        first, far = tl.broadcast(first, far)
        other, first = tl.broadcast(other, first)
        second, first = tl.broadcast(second, first)
        if dtype == tl.bfloat16:
            out = tl.inline_asm_elementwise(
                _BF16_ASM[KIND], "=r,r,r,r,r,r,r,r,r", [first, other, second, far],
                dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            out = tl.inline_asm_elementwise(
                _FP16_ASM[KIND], "=r,r,r,r,r,r,r,r,r", [first, other, second, far],
                dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        first = tl.reshape(first, [WARPS, 8, 4, WORDS, 1, 1, 1])
        other = tl.reshape(other, [WARPS, 8, 4, WORDS, 1, 1, 1])
        code = (tl.where(second == 1, other, first) >> (far + 16 * pair)) & (15 if KIND == 0 else 255)
        out = codes.numbers(code.to(tl.uint8), 0, KIND, dtype) if KIND == 2 else code.to(dtype)
    # warp, row, lane, word, far, second, pair: to rows and columns
    return tl.reshape(tl.permute(out, [0, 5, 1, 3, 2, 4, 6]), [WARPS, 16, 16 * WORDS])


@triton.jit
def _load_inputs(
    x_ptr, x_words_ptr, x_stride, first_row, num_rows, column, last,
    COLUMNS: tl.constexpr, STEP: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr, WHOLE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Eight rows of x, for each warp 4 * WORDS columns from each STEP on, as `_inputs` takes them.

    WHOLE: there are as many columns as are asked for.
    """
    # In one dimension, so that the layout of what is loaded is the one that is wanted, in any version of Triton.
    RUN: tl.constexpr = 2 * WORDS if COMPILED else 4 * WORDS
    index = tl.arange(0, WARPS * 32 * RUN)
    row = first_row + index // (4 * RUN) % 8
    within = index // (32 * RUN) * COLUMNS + index // RUN % 4 * STEP
    if COMPILED:
        mask = row < num_rows
        if not WHOLE:
            mask = mask & (column + within + index % RUN * 2 < last)
        places = row * (x_stride // 2) + (column // 2 + within // 2 + index % RUN)
        loaded = tl.load(x_words_ptr + places, mask=mask, other=0)
    else:
        columns = column + within + index % RUN
        loaded = tl.load(x_ptr + row * x_stride + columns, mask=(row < num_rows) & (columns < last), other=0.0)
    return loaded


@triton.jit
def _inputs(x, dtype: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr, COMPILED: tl.constexpr):
    """[WARPS, 16 * WORDS, 8], in the order of `_numbers`' columns."""
    if COMPILED:
        words = tl.reshape(x, [WARPS, 8, 4, WORDS, 2])
        if dtype == tl.bfloat16:
            low = tl.inline_asm_elementwise(_LOW, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
            high = tl.inline_asm_elementwise(_HIGH, "=r,r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)
        else:
            low = tl.inline_asm_elementwise(_LOW, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
            high = tl.inline_asm_elementwise(_HIGH, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
        numbers = tl.reshape(tl.join(low, high), [WARPS, 8, 4, WORDS, 2, 2])
    else:
        numbers = tl.reshape(x, [WARPS, 8, 4, WORDS, 2, 2])
    return tl.reshape(tl.permute(numbers, [0, 3, 2, 5, 4, 1]), [WARPS, 16 * WORDS, 8])


@triton.jit
def load_inputs(
    x_ptr, x_words_ptr, x_stride, num_rows, unit,
    IN: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, PER_BYTE: tl.constexpr, WORDS: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Of N times eight rows of x, for each warp the columns of its block of a unit."""
    COLUMNS: tl.constexpr = 16 * WORDS * PER_BYTE
    PARTS: tl.constexpr = 2 if WORDS == 4 else 1
    WHOLE: tl.constexpr = IN % (WARPS * COLUMNS) == 0
    xs = ()
    for step in tl.static_range(PER_BYTE * PARTS):
        column = unit * (WARPS * COLUMNS) + step // PARTS * (16 * WORDS) + step % PARTS * 8
        for n in tl.static_range(N):
            xs += (
                _load_inputs(
                    x_ptr, x_words_ptr, x_stride, n * 8, num_rows, column, IN,
                    COLUMNS, 4 * WORDS, WARPS, WORDS // PARTS, WHOLE, COMPILED,
                ),
            )  # fmt: skip
    return xs


@triton.jit
def _load_codes(
    codes_ptr, first_out, unit,
    OUT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """int32 [WARPS, 8, 4, WORDS]: for each warp its block of a unit, of eight rows, or of the last that there are."""
    index = tl.arange(0, WARPS * 32 * WORDS)
    row = first_out + index // (4 * WORDS) % 8
    if not INSIDE:  # which costs the loads their width
        row = tl.minimum(row, OUT - 1)
    word = unit * (WARPS * 4 * WORDS) + index // (32 * WORDS) * (4 * WORDS) + index % (4 * WORDS)
    if WIDTH % (WARPS * 4 * WORDS):
        word = tl.where(word < WIDTH, word, 0)  # of which the inputs are zeros
    places = codes_ptr + row.to(tl.int64) * WIDTH + word
    if WIDTH % (WARPS * 4 * WORDS):  # of which the compiler does not see how far neighbours are
        places = tl.max_contiguous(tl.multiple_of(places, [4 * WORDS]), [WORDS])
    return tl.reshape(tl.load(places, eviction_policy="evict_first"), [WARPS, 8, 4, WORDS])


@triton.jit
def load_codes(codes_ptr, outs, unit, OUT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, WORDS: tl.constexpr):
    """The codes of a unit, of the eight rows from each of `outs` on, and of the next eight."""
    INSIDE: tl.constexpr = OUT % (16 * len(outs)) == 0
    loaded = ()
    for m in tl.static_range(len(outs)):
        loaded += (_load_codes(codes_ptr, outs[m], unit, OUT, WIDTH, WARPS, WORDS, INSIDE),)
        loaded += (_load_codes(codes_ptr, outs[m] + 8, unit, OUT, WIDTH, WARPS, WORDS, INSIDE),)
    return loaded


@triton.jit
def load_scales(
    matrix, outs, unit,
    OUT: tl.constexpr, WARPS: tl.constexpr, PER_BYTE: tl.constexpr, WORDS: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, SPAN: tl.constexpr, ZEROS: tl.constexpr,
    MINIMA: tl.constexpr,
):  # fmt: skip
    """For each of `outs` four tensors [WARPS, 16, 1]: scales, their factors, zeros or minima, and their factors."""
    _codes_ptr, scales_ptr, zeros_ptr, factors_ptr, minima_ptr, minimum_factors_ptr = matrix
    loaded = ()
    if GROUP > 0:
        column = (unit * WARPS + tl.arange(0, WARPS)[:, None, None]) * (16 * WORDS * PER_BYTE)
        group = column // GROUP if GROUPS > 1 else column * 0
        for m in tl.static_range(len(outs)):
            rows = outs[m] + tl.arange(0, 16)[None, :, None]
            mask = (rows < OUT) & (group < GROUPS)
            place = rows * STEPS[0] + group * STEPS[1]
            of_factor = rows * FACTOR_STEPS[0] + group // SPAN * FACTOR_STEPS[1] if SPAN else place
            scales = tl.load(scales_ptr + place, mask=mask, other=0)
            factors = tl.load(factors_ptr + of_factor, mask=mask, other=0.0) if SPAN else scales
            if MINIMA:
                others = tl.load(minima_ptr + place, mask=mask, other=0)
            elif ZEROS:
                others = tl.load(zeros_ptr + place, mask=mask, other=0)
            else:
                others = scales
            more = tl.load(minimum_factors_ptr + of_factor, mask=mask, other=0.0) if SPAN and MINIMA else scales
            loaded += (scales, factors, others, more)
    return loaded


@triton.jit
def multiply_unit(
    totals, words, xs, scales,
    M: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr, WARPS: tl.constexpr, PER_BYTE: tl.constexpr,
    WORDS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr,
    BIAS: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr, SUMS: tl.constexpr, UNIT: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Adds a unit to totals: of M strips of 16 rows and N times eight of x, each warp's, float32 [WARPS, 16, 8]."""
    PARTS: tl.constexpr = 2 if WORDS == 4 else 1
    none = ()
    for _ in tl.static_range(M * N):
        none += (tl.zeros([WARPS, 16, 8], tl.float32),)
    parts = totals if GROUP == 0 else none
    sums = none
    pieces = ()
    for each in tl.static_range(2 * M):
        if PARTS == 2:
            pieces += tl.split(tl.permute(tl.reshape(words[each], [WARPS, 8, 4, 2, 2]), [0, 1, 2, 4, 3]))
        else:
            pieces += (words[each],)
    for step in tl.static_range(PER_BYTE * PARTS):
        inputs = ()
        for n in tl.static_range(N):
            inputs += (_inputs(xs[step * N + n], dtype, WARPS, WORDS // PARTS, COMPILED),)
        if SUMS:
            ones = tl.full([WARPS, 16, 16 * WORDS // PARTS], 1.0, dtype)
            more = ()
            for n in tl.static_range(N):
                more += (tl.dot(ones, inputs[n], sums[n], input_precision="ieee"),)
            sums = more
        more = ()
        for m in tl.static_range(M):
            numbers = _numbers(
                pieces[2 * m * PARTS + step % PARTS], pieces[(2 * m + 1) * PARTS + step % PARTS], step // PARTS,
                KIND, WARPS, WORDS // PARTS, dtype, COMPILED,
            )  # fmt: skip
            for n in tl.static_range(N):
                more += (tl.dot(numbers, inputs[n], parts[m * N + n], input_precision="ieee"),)
        parts = more
    if GROUP > 0:
        more = ()
        for m in tl.static_range(M):
            scale = scales[4 * m].to(tl.float32)
            if SPAN:
                scale *= scales[4 * m + 1].to(tl.float32)
            taken = scale * ZERO
            if MINIMA:
                minimum = scales[4 * m + 2].to(tl.float32)
                taken -= minimum * scales[4 * m + 3].to(tl.float32) if SPAN else minimum
            elif ZEROS:
                taken = scale * (scales[4 * m + 2].to(tl.float32) + BIAS)
            for n in tl.static_range(N):
                total = totals[m * N + n] + parts[m * N + n] * (scale * UNIT)
                if SUMS:
                    total -= sums[n] * taken
                more += (total,)
        parts = more
    return parts
