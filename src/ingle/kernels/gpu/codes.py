"""Tiles of codes on their way to a product: how each kind of code becomes numbers, and a tile is added to a sum.

A kind is a row here and in `FORMATS`: a byte holds one code or two, and `numbers` says what a code less its zero is, in
the type of activations, exactly. Where a tile lies in one group, its product is scaled; else its numbers are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import MIDDLE, Coded

INT4, INT8, FP8 = 0, 1, 2


class Format(NamedTuple):
    """What a kernel is compiled for."""

    kind: int
    columns_per_byte: int
    middle: int
    """The zero of codes without one."""


FORMATS = {
    "int4": Format(INT4, 2, MIDDLE["int4"]),
    "int8": Format(INT8, 1, MIDDLE["int8"]),
    "fp8": Format(FP8, 1, 0),
}


def suits(coded: Coded) -> bool:
    """Whether kernels read it: two codes that share a byte share a scale."""
    if coded.table is not None:
        return False
    return coded.kind != "int4" or coded.group_size % (2 * coded.half) == 0


def columns_at_once(coded: Coded) -> int:
    """Of few rows: of one group where that is large enough, else of several."""
    return 64 if coded.group_size % 128 == 64 else 128


def constants(coded: Coded) -> dict[str, int]:
    """What kernels are compiled for."""
    form = FORMATS[coded.kind]
    return {
        "GROUPS": coded.scales.shape[1], "GROUP": coded.group_size, "CODE_HALF": coded.half, "KIND": form.kind,
        "MIDDLE": 0 if coded.minima is not None else form.middle, "ZEROS": coded.zeros is not None,
        "SPAN": coded.span, "MINIMA": coded.minima is not None,
    }  # fmt: skip


NO_CODES = {"GROUPS": 1, "GROUP": 1, "CODE_HALF": 1, "KIND": INT8, "MIDDLE": 0, "ZEROS": False, "SPAN": 0,
            "MINIMA": False}  # fmt: skip
"""The same for a matrix of floats."""


def pointers(coded: Coded) -> tuple[torch.Tensor, ...]:
    """What `add_tile` is given of a matrix; what it does not have is not read."""
    held = (coded.codes, coded.scales, coded.zeros, coded.factors, coded.minima, coded.minimum_factors)
    return tuple(coded.codes if tensor is None else tensor for tensor in held)


@triton.jit
def _in_floats(ptr, factors_ptr, outs, groups, mask, GROUPS: tl.constexpr, SPAN: tl.constexpr):
    """Scales or minima, times the factors that groups share."""
    values = tl.load(ptr + outs * GROUPS + groups, mask=mask, other=0).to(tl.float32)
    if SPAN:
        places = factors_ptr + outs * (GROUPS // SPAN) + groups // SPAN
        values *= tl.load(places, mask=mask, other=0.0).to(tl.float32)
    return values


@triton.jit
def numbers(codes, zeros, KIND: tl.constexpr, dtype: tl.constexpr):
    """What codes less their zeros are, exactly. By bits, for conversions of integers take four times as long."""
    if KIND == 2:  # FP8: the bits of a float with another bias, which is put right
        wide = codes.to(tl.int32)
        if dtype == tl.float16:
            bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
            return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return (bits.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(dtype)
    if dtype == tl.float16:  # 1024 and the code
        bits = codes.to(tl.int16) | 0x6400
        return bits.to(tl.float16, bitcast=True) - (zeros.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    if dtype == tl.bfloat16 and KIND == 0:  # 128 and the code
        bits = codes.to(tl.int16) | 0x4300
        return bits.to(tl.bfloat16, bitcast=True) - (zeros.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    bits = codes.to(tl.int32) | 0x4B000000  # 2 ** 23 and the code
    return (bits.to(tl.float32, bitcast=True) - (zeros.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)).to(
        dtype
    )


@triton.jit
def add_tile(
    total, x_ptr, x_rows, in_rows, matrix, outs, in_outs, k,
    IN: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    KIND: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, SPAN: tl.constexpr, MINIMA: tl.constexpr,
):  # fmt: skip
    """total [OUTS, ROWS] and the product of the bytes [k, k + BYTES) of weights' rows `outs` with those columns of x.

    x_rows [ROWS]: where rows of x begin; matrix: what `pointers` gives. Weights stand where the tensor cores want many
    rows.
    """
    codes_ptr, scales_ptr, zeros_ptr, factors_ptr, minima_ptr, minimum_factors_ptr = matrix
    PER_BYTE: tl.constexpr = 2 if KIND == 0 else 1
    WIDTH: tl.constexpr = IN // PER_BYTE
    ONE_GROUP: tl.constexpr = (GROUP % (BYTES * PER_BYTE) == 0 or GROUPS == 1) and not MINIMA
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    places = k + tl.arange(0, BYTES)
    inside = places < WIDTH
    columns = places
    if KIND == 0:
        columns = places // HALF * (2 * HALF) + places % HALF
    x_places = x_ptr + x_rows[None, :] + columns[:, None]
    in_x = inside[:, None] & in_rows[None, :]
    code_places = codes_ptr + outs.to(tl.int64)[:, None] * WIDTH + places[None, :]
    codes = tl.load(code_places, mask=in_outs[:, None] & inside[None, :], other=0)
    if ONE_GROUP:
        group = k * PER_BYTE // GROUP
        scale_places = outs * GROUPS + group
        scales = _in_floats(scales_ptr, factors_ptr, outs, group, in_outs, GROUPS, SPAN)[:, None]
        zeros = tl.full([1, 1], MIDDLE, tl.uint8)
        if ZEROS:
            zeros = tl.load(zeros_ptr + scale_places, mask=in_outs, other=0)[:, None]
    else:
        groups = (columns // GROUP)[None, :]
        scale_places = outs[:, None] * GROUPS + groups
        in_scales = in_outs[:, None] & inside[None, :]
        scales = _in_floats(scales_ptr, factors_ptr, outs[:, None], groups, in_scales, GROUPS, SPAN)
        minima = 0.0
        if MINIMA:
            minima = _in_floats(minima_ptr, minimum_factors_ptr, outs[:, None], groups, in_scales, GROUPS, SPAN)
        zeros = tl.full([1, 1], MIDDLE, tl.uint8)
        if ZEROS:
            zeros = tl.load(zeros_ptr + scale_places, mask=in_scales, other=0)
    first = numbers(codes & 15 if KIND == 0 else codes, zeros, KIND, dtype)
    x = tl.load(x_places, mask=in_x, other=0.0)
    if ONE_GROUP:
        part = tl.dot(first, x, input_precision="ieee")
        if KIND == 0:
            other = tl.load(x_places + HALF, mask=in_x, other=0.0)
            part = tl.dot(numbers(codes >> 4, zeros, KIND, dtype), other, part, input_precision="ieee")
        total += part * scales
    else:
        total = tl.dot((first.to(tl.float32) * scales + minima).to(dtype), x, total, input_precision="ieee")
        if KIND == 0:
            other = tl.load(x_places + HALF, mask=in_x, other=0.0)
            second = numbers(codes >> 4, zeros, KIND, dtype).to(tl.float32) * scales + minima
            total = tl.dot(second.to(dtype), other, total, input_precision="ieee")
    return total
