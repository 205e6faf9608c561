"""Products of codes with inputs as integers: four bytes of each are one instruction (`dp4a`).

Inputs are of 16 bits, of 32 columns each under one scale; their upper bytes are multiplied apart from the lower ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_fours(ptr, column, mask, APART: tl.constexpr):
    """Of chunks 32 numbers of a row, each four together: eight of [CHUNKS, 4]."""
    within = tl.arange(0, 4)[None, :]
    fours = ()
    for index in tl.static_range(8):
        at = (column + (index // 4 * APART + index % 4 * 4))[:, None] + within
        fours += (tl.load(ptr + at, mask=mask[:, None], other=0.0),)
    return fours


@triton.jit
def as_integers(
    x_ptr, norms, column, mask, CHUNKS: tl.constexpr, APART: tl.constexpr, NORMED: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """A row's inputs of chunks, times what `load_fours` gives of the norm's, as integers: the upper bytes of each four,
    the lower ones; what one stands for, the sums of the integers of both halves; and apart from that, the sum of the
    inputs' squares."""
    given = load_fours(x_ptr, column, mask, APART)
    fours = ()
    largest = tl.zeros([CHUNKS], tl.float32)
    squared = tl.zeros([CHUNKS], tl.float32)
    for index in tl.static_range(8):
        x = given[index].to(tl.float32)
        if NORMED:
            squared += tl.sum(x * x, 1)
            x *= norms[index].to(tl.float32)
        largest = larger(largest, tl.reduce(tl.abs(x), 1, larger))
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
def larger(a, b):
    """NaN of anything and NaN, which `tl.max` leaves out."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


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
def table_words(table_ptr, TABLE: tl.constexpr, COMPILED: tl.constexpr):
    """Its 16 bytes as words."""
    if TABLE and COMPILED:
        words = table_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    return 0, 0, 0, 0


@triton.jit
def in_quads(
    words, table, table_ptr, LOW: tl.constexpr, HIGH: tl.constexpr, TABLE: tl.constexpr, COMPILED: tl.constexpr
):
    """The 32 codes of a chunk, or the numbers that they stand for, as words of four neighbours' bytes."""
    quads = ()
    if TABLE and COMPILED and LOW == 4 and not HIGH:
        lowers = ()
        uppers = ()
        for index in tl.static_range(4):
            lower, upper = _look_up_word(words[index], table)
            lowers += (lower,)
            uppers += (upper,)
        return lowers + uppers
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
def _look_up_word(codes, table):
    """`_look_up` of a word's eight codes: of the lower halves of its bytes, and of the upper ones."""
    # Codes are the selectors themselves, but for their fourth bit, by which the two halves of the table are chosen of.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 picks, upper, a, b, c;
        and.b32 picks, $2, 0x77777777;
        shr.u32 upper, $2, 1;
        lop3.b32 upper, upper, 0x44444444, 0x32103210, 0xea;
        prmt.b32 a, $3, $4, picks;
        prmt.b32 b, $5, $6, picks;
        prmt.b32 a, a, b, upper;
        shr.u32 picks, picks, 16;
        shr.u32 upper, upper, 16;
        prmt.b32 b, $3, $4, picks;
        prmt.b32 c, $5, $6, picks;
        prmt.b32 b, b, c, upper;
        prmt.b32 $0, a, b, 0x6420;
        prmt.b32 $1, a, b, 0x7531;
        }""",
        "=r,=r,r,r,r,r,r", [codes, table[0], table[1], table[2], table[3]], dtype=(tl.int32, tl.int32), is_pure=True,
        pack=1,
    )  # fmt: skip


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
def multiply_quads(
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
