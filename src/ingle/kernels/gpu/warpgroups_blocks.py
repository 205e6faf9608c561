"""GGUF's blocks of 256 columns on their way to the tensor cores, as `warpgroups` multiplies them: Q4_K, Q5_K and Q6_K.

Codes of 32 columns are in 16 bytes, and their upper bits in eight of another plane; the scales of 256 columns, and the
minima, are in 16. The warps that bring scales multiply them with their factors and round them to bfloat16; a code less
the middle of all codes is exact, so that minima are small beside the scales, whatever a file has.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ingle.kernels.coded import Coded

GROUP = 32
"""Columns of a word of scales: one and a minimum, or those of 16 columns each."""
_COLUMNS = 256
"""That share a factor."""
_KINDS = {"int4": (32, True, torch.uint8), "int5": (32, True, torch.uint8), "int6": (16, False, torch.int8)}
"""Columns of a scale, whether there are minima, and what both are."""

# Two bytes are spread over a word, and masked: floats below the lowest exponent, or above it by one bit at most, which
# are as far apart. So an instruction makes any bits of them that many times UNIT, and adds. In the order of columns of
# a block $0 and $1 are of the bytes' lower halves, $2 and $3 of the upper ones.
_FIELDS = (("w", "0x000f000f", "0x7d007d00"), ("v", "0x000f000f", "0x7d007d00"),
           ("w", "0x00f000f0", "0x7b007b00"), ("v", "0x00f000f0", "0x7b007b00"))  # fmt: skip
"""2 ** 123, 2 ** 119"""
_HIGH = (("0x00030003", "0x7f007f00"), ("0x000c000c", "0x7e007e00"),
         ("0x00300030", "0x7d007d00"), ("0x00c000c0", "0x7c007c00"))  # fmt: skip
"""2 ** 127, 2 ** 125, 2 ** 123, 2 ** 121"""
_UNIT = gl.constexpr(2.0**10)
_SPREAD = "cvt.u32.u16 {0}, ${1}; prmt.b32 {0}, {0}, 0, 0x4140; "


def _int4() -> str:
    """$4 and $5: bytes; $6: a scale, and a minimum in the upper half."""
    text = "{ .reg .b32 w, v, t, s, m, f, z; " + _SPREAD.format("w", 4) + _SPREAD.format("v", 5)
    text += "prmt.b32 s, $6, $6, 0x1010; prmt.b32 m, $6, $6, 0x3232; mov.b32 z, 0xbc00bc00; "  # -8 / UNIT
    for index, (word, mask, factor) in enumerate(_FIELDS):
        text += f"and.b32 t, {word}, {mask}; mov.b32 f, {factor}; fma.rn.bf16x2 t, t, f, z; "
        text += f"fma.rn.bf16x2 ${index}, t, s, m; "
    return text + "}"


def _int5() -> str:
    """As `_int4`; $6: bytes of the other plane, of whose bits lanes have every second one; $7: as its $6."""
    text = "{ .reg .b32 w, v, h, t, u, s, m, f, z; " + _SPREAD.format("w", 4) + _SPREAD.format("v", 5)
    text += "mov.u32 u, %laneid; bfe.u32 u, u, 1, 1; " + _SPREAD.format("h", 6) + "shr.b32 h, h, u; "
    text += "prmt.b32 s, $7, $7, 0x1010; prmt.b32 m, $7, $7, 0x3232; mov.b32 z, 0xbc80bc80; "  # -16 / UNIT
    for index, (word, mask, factor) in enumerate(_FIELDS):
        bit, factor_high = 0x00010001 << 2 * index, 0x7F007F00 - index * 0x01000100  # 2 ** (127 - 2 * index)
        text += f"and.b32 u, h, {bit:#x}; mov.b32 f, {factor_high:#x}; fma.rn.bf16x2 u, u, f, z; "
        text += f"and.b32 t, {word}, {mask}; mov.b32 f, {factor}; fma.rn.bf16x2 t, t, f, u; "
        text += f"fma.rn.bf16x2 ${index}, t, s, m; "
    return text + "}"


def _int6() -> str:
    """$4 and $5: bytes; $6: of the other plane; $7: the scale of the bytes' lower halves, and that of the others."""
    text = "{ .reg .b32 w, v, h, t, u, s, f, z; " + _SPREAD.format("w", 4) + _SPREAD.format("v", 5)
    text += _SPREAD.format("h", 6) + "mov.b32 z, 0xbd00bd00; prmt.b32 s, $7, $7, 0x1010; "  # -32 / UNIT
    for index, ((word, mask, factor), (mask_high, factor_high)) in enumerate(zip(_FIELDS, _HIGH, strict=True)):
        if index == 2:
            text += "prmt.b32 s, $7, $7, 0x3232; "
        text += f"and.b32 u, h, {mask_high}; mov.b32 f, {factor_high}; fma.rn.bf16x2 u, u, f, z; "
        text += f"and.b32 t, {word}, {mask}; mov.b32 f, {factor}; fma.rn.bf16x2 t, t, f, u; "
        text += f"mul.rn.bf16x2 ${index}, t, s; "
    return text + "}"


_INT4, _INT5, _INT6 = gl.constexpr(_int4()), gl.constexpr(_int5()), gl.constexpr(_int6())
_NUMBERS = gl.constexpr((gl.bfloat16,) * 4)
_EIGHT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [128, 0]], [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0], [64, 0]], [], [256, 8]
    )
)
"""Half of the columns that the tensor cores take at once, as they take them."""
_TWICE = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [128, 0, 0]],
        [[0, 0, 2], [0, 1, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [64, 0, 0]], [], [256, 2, 4],
    )
)  # fmt: skip
"""The same of four bytes, twice."""


def suits(coded: Coded) -> bool:
    """Whether these read it, besides what any matrix has to be."""
    if coded.kind not in _KINDS or not coded.in_planes or coded.factors is None or coded.num_columns % _COLUMNS:
        return False
    group, minima, dtype = _KINDS[coded.kind]
    held = (coded.scales, coded.factors) if coded.pairs is None else (coded.pairs, coded.factor_pairs)
    return (
        coded.table is None
        and coded.zeros is None
        and coded.group_size == group
        and coded.span * group == _COLUMNS
        and minima == (coded.minima is not None) == (coded.pairs is not None) == (coded.factor_pairs is not None)
        and coded.scales.dtype == dtype
        and coded.factors.dtype == torch.float16
        and all(each is None or (each.is_contiguous() and each.data_ptr() % 16 == 0) for each in (*held, coded.high))
    )


def pointers(coded: Coded) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scales, 16 bytes for each 256 columns, and of factors, both with the minima where there are some."""
    assert coded.factors is not None
    if coded.pairs is None or coded.factor_pairs is None:
        return coded.scales.view(torch.int32), coded.factors
    return coded.pairs.flatten(1).view(torch.int32), coded.factor_pairs.flatten(1).view(torch.int32)


@gluon.jit
def load_steps(steps_ptr, factors_ptr, first_out, size_out, num_blocks, block, there, OUTS: gl.constexpr):
    """Of a block of 256 columns the scales [OUTS, 4], and their factors [OUTS, 1]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [2, 1], [1, 0])
    outs = first_out + gl.arange(0, OUTS, gl.SliceLayout(1, layout))[:, None]
    mask = there & (outs < size_out)
    places = (outs * num_blocks + block) * 4 + gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    steps = gl.load(steps_ptr + places, mask=mask, other=0)
    return steps, gl.load(factors_ptr + (outs * num_blocks + block), mask=mask, other=0)


@gluon.jit
def store_steps(held, block, steps, factors, MIDDLE: gl.constexpr, OUTS: gl.constexpr):
    """For the warpgroups, eight words of a block: UNIT times a scale, and above it the next one, or where there are
    minima, MIDDLE is that of codes, the minimum and what the scale makes of that."""
    blocks = held._reinterpret(gl.int32, [4, 4, OUTS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    if MIDDLE:
        scale = (factors & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32) * _UNIT
        other = (factors >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    else:
        steps ^= -0x7F7F7F80  # by 128 more, without signs
        scale = factors.to(gl.float32) * _UNIT
        other = scale
    LESS: gl.constexpr = 0 if MIDDLE else 128
    units = gl.split(gl.permute(gl.reshape(steps, [OUTS, 2, 2]), [0, 2, 1]))
    for unit in gl.static_range(2):
        four = gl.convert_layout(units[unit], factors.type.layout)
        first = _packed(_number(four, 0, LESS) * scale, _number(four, 8, LESS) * other, MIDDLE)
        second = _packed(_number(four, 16, LESS) * scale, _number(four, 24, LESS) * other, MIDDLE)
        words = gl.reshape(gl.join(first, second), [OUTS, 4])
        blocks.index(block % 2 * 2 + unit).store(gl.permute(words, [1, 0]))


@gluon.jit
def _number(words, SHIFT: gl.constexpr, LESS: gl.constexpr):
    """Of a byte of words, less so much: by 2 ** 23 and the byte, for conversions of integers take longer."""
    bits = ((words >> SHIFT) & 0xFF) | 0x4B000000
    return bits.to(gl.float32, bitcast=True) - (8388608.0 + LESS)


@gluon.jit
def _packed(first, second, MIDDLE: gl.constexpr):
    if MIDDLE:
        second += first * (MIDDLE / _UNIT)
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [second, first], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def block_numbers(codes, high, scales, BYTE: gl.constexpr, HIGH: gl.constexpr, WEIGHTS: gl.constexpr):
    """Of 32 columns, whose codes are 16 bytes from BYTE on, numbers [OUTS, 16] twice."""
    first, second = codes.slice(BYTE, 8, 1).load(_EIGHT), codes.slice(BYTE + 8, 8, 1).load(_EIGHT)
    scales = gl.expand_dims(gl.convert_layout(scales, gl.SliceLayout(1, _EIGHT)), 1)
    if HIGH == 1:
        more = gl.expand_dims(high.slice(BYTE // 4, 4, 1).load(gl.SliceLayout(1, _TWICE)), 1)
        twice, _ = gl.broadcast(more, gl.full([more.shape[0], 2, 4], 0, gl.uint8, _TWICE))
        more = gl.convert_layout(gl.reshape(twice, [more.shape[0], 8]), _EIGHT)
        a, b, c, d = gl.inline_asm_elementwise(
            _INT5, "=r,=r,=r,=r,h,h,h,r,r", [first, second, more, scales], dtype=_NUMBERS, is_pure=True, pack=2
        )
    elif HIGH == 2:
        more = high.slice(BYTE // 2, 8, 1).load(_EIGHT)
        a, b, c, d = gl.inline_asm_elementwise(
            _INT6, "=r,=r,=r,=r,h,h,h,r,r", [first, second, more, scales], dtype=_NUMBERS, is_pure=True, pack=2
        )
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            _INT4, "=r,=r,=r,=r,h,h,r,r", [first, second, scales], dtype=_NUMBERS, is_pure=True, pack=2
        )
    return _beside(a, b, WEIGHTS), _beside(c, d, WEIGHTS)


@gluon.jit
def _beside(first, second, WEIGHTS: gl.constexpr):
    numbers = gl.permute(gl.join(first, second), [0, 2, 1])
    return gl.convert_layout(gl.reshape(numbers, [numbers.shape[0], 16]), WEIGHTS)
