"""Products of more than two rows with matrices of codes in planes, as GGUF's blocks are held: a tile is decoded on its
way to the tensor cores; of many rows, the matrix is, for the library's product.

Blocks of 32 columns are what a byte's codes belong to. Its lowest code is a column of the block's first run, the next
one of the second: a tile of bytes is one of each run's columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import BITS, MIDDLE, PLANES_BLOCK, Coded
from ingle.kernels.gpu.device import await_previous, barrier, counters, num_sms, pdl

LEAST_DECODED = 65
"""From so many rows on, decoding the matrix costs less than decoding a tile for every 64 or 128 of them."""
_E2M1: tl.constexpr = tl.constexpr(2)
"""In place of a look-up, the numbers' bits are taken; one more: by instructions for two at once, where there are some.
Those of a table are twice E2M1's, and so are these."""
# Of the second bytes of $1 and $2, in 16 bits each, the lower code or the upper one: a sign and three bits, below
# bfloat16's lowest exponent, times $3, which puts that right.
_PICK = (
    "{ .reg .b32 t, s; prmt.b32 s, $1, $2, 0x5511; shr.b32 t, s, DOWN; and.b32 t, t, 0x01c001c0; shl.b32 s, s, UP; "
    "lop3.b32 t, s, 0x80008000, t, 0xea; mov.b32 s, 0x80008000; fma.rn.bf16x2 $0, t, $3, s; }"
)
_LOWER: tl.constexpr = tl.constexpr(_PICK.replace("DOWN", "2").replace("UP", "4"))
_UPPER: tl.constexpr = tl.constexpr(_PICK.replace("DOWN", "6").replace("UP", "0"))
_RIGHT: tl.constexpr = tl.constexpr(2.0**127)


class Tiling(NamedTuple):
    rows: int
    outs: int
    blocks: int
    """Of a row of weights, that an iteration takes."""
    num_warps: int
    num_stages: int
    num_splits: int


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, I], its columns as the matrix has them, by one in planes: [M, O]."""
    return multiply_by(tiling(len(x), coded, num_sms(x.device)), x, coded, bias)


def tiling(num_rows: int, coded: Coded, num_sms: int) -> Tiling:
    rows = min(max(triton.next_power_of_2(num_rows), 16), 64)
    num_tiles = triton.cdiv(coded.num_rows, 64)
    num_units = triton.cdiv(coded.num_columns, 4 * PLANES_BLOCK)
    return Tiling(rows, 64, 4, 4, 4, max(min(2 * num_sms // num_tiles, num_units // 4), 1))


def multiply_by(shape: Tiling, x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows, size_out = len(x), coded.num_rows
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    num_tiles, num_row_tiles = triton.cdiv(size_out, shape.outs), triton.cdiv(num_rows, shape.rows)
    parts = x
    if shape.num_splits > 1:
        size = num_row_tiles * num_tiles * shape.num_splits * shape.outs * shape.rows
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
    early = pdl(x.device)
    _planes_kernel[(num_row_tiles * shape.num_splits, num_tiles)](
        x, pointers(coded), x if bias is None else bias, out, parts, counters(x.device),
        num_rows, x.stride(0), shape.num_splits,
        IN=coded.num_columns, OUT=size_out, ROWS=shape.rows, OUTS=shape.outs, BLOCKS=shape.blocks,
        **constants(coded), BIAS=bias is not None, SPLIT=shape.num_splits > 1, PDL=early,
        COMPILED=x.is_cuda, num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


def decode(coded: Coded, first: int, out: torch.Tensor) -> None:
    """Writes its rows from `first` on to out [R, I]."""
    outs, blocks = 32, 4
    early = pdl(out.device)
    grid = triton.cdiv(len(out), outs), triton.cdiv(coded.num_columns, blocks * PLANES_BLOCK)
    _decode_weights_kernel[grid](
        pointers(coded), out, first, len(out),
        IN=coded.num_columns, OUTS=outs, BLOCKS=blocks, **constants(coded), PDL=early, num_warps=4, launch_pdl=early,
    )  # fmt: skip


def suits(coded: Coded) -> bool:
    """Whether these kernels read it."""
    size = coded.group_size
    in_groups = size % PLANES_BLOCK == 0 or coded.scales.shape[1] == 1 or (size == 16 and BITS[coded.kind][0] < 8)
    return coded.in_planes and in_groups


def pointers(coded: Coded) -> tuple[torch.Tensor, ...]:
    """What `numbers` is given of a matrix; what it does not have is not read."""
    held = (coded.high, coded.scales, coded.zeros, coded.factors, coded.minima, coded.minimum_factors, coded.table)
    return (coded.codes, *(coded.codes if tensor is None else tensor for tensor in held))


def constants(coded: Coded) -> dict[str, int]:
    """What kernels are compiled for."""
    low, high = BITS[coded.kind]
    without = coded.has_minima or coded.table is not None or coded.kind == "fp8"
    return {
        "LOW": low, "HIGH": high, "GROUP": coded.group_size, "GROUPS": coded.scales.shape[1], "SPAN": coded.span,
        "MIDDLE": 0 if without else MIDDLE[coded.kind], "ZEROS": coded.zeros is not None,
        "MINIMA": coded.has_minima, "STEP": 1 if coded.pairs is None else 2,
        "FACTOR_STEP": 1 if coded.factor_pairs is None else 2, "SHARED": coded.shares_bytes,
        "TABLE": _E2M1 + coded.codes.is_cuda if coded.is_e2m1 else int(coded.table is not None),
        "FLOAT8": coded.kind == "fp8",
    }  # fmt: skip


@triton.jit
def numbers(
    matrix, outs, in_outs, blocks, run, dtype: tl.constexpr, IN: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr,
    MINIMA: tl.constexpr, STEP: tl.constexpr,
    FACTOR_STEP: tl.constexpr, SHARED: tl.constexpr, TABLE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """[OUTS, BLOCKS, 4 * LOW]: of weights' rows `outs` the columns of one run of each block, of 8 / LOW runs."""
    codes_ptr, high_ptr, scales_ptr, zeros_ptr, factors_ptr, minima_ptr, minimum_factors_ptr, table_ptr = matrix
    WIDTH: tl.constexpr = 4 * LOW
    mask = in_outs[:, None] & (blocks < IN // 32)[None, :]
    within = tl.arange(0, WIDTH)[None, None, :]
    place = (outs.to(tl.int64)[:, None] * (IN // 32) + blocks[None, :])[:, :, None]
    if TABLE == 3 and dtype == tl.bfloat16:
        pairs_ptr = codes_ptr.to(tl.pointer_type(tl.int16)) + place * 8 + tl.arange(0, 8)[None, None, :]
        at = outs.to(tl.int64)[:, None] * GROUPS + (blocks * 32 // GROUP)[None, :]
        scales = (tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32) * _RIGHT).to(tl.bfloat16)
        return _e2m1(tl.load(pairs_ptr, mask=mask[:, :, None], other=0), scales[:, :, None, None], run)
    codes = tl.load(codes_ptr + place * WIDTH + within, mask=mask[:, :, None], other=0).to(tl.int32)
    codes = (codes >> (LOW * run)) & ((1 << LOW) - 1)
    if HIGH:
        EACH: tl.constexpr = 4 * HIGH
        column = run * WIDTH + within
        high = tl.load(high_ptr + place * EACH + column % EACH, mask=mask[:, :, None], other=0).to(tl.int32)
        codes |= ((high >> (column // EACH * HIGH)) & ((1 << HIGH) - 1)) << LOW
    group = (blocks * 32 + run * WIDTH) // GROUP
    at = outs.to(tl.int64)[:, None] * GROUPS + group[None, :]
    scales = tl.load(scales_ptr + at * STEP, mask=mask, other=0)
    minima = scales
    if SHARED:
        scales, minima = scales & 15, scales >> 4
    if MINIMA and not SHARED:
        minima = tl.load(minima_ptr + at * STEP, mask=mask, other=0)
    scales, minima = scales.to(tl.float32), minima.to(tl.float32)
    if SPAN:
        at_factors = outs.to(tl.int64)[:, None] * (GROUPS // SPAN) + (group // SPAN)[None, :]
        scales *= tl.load(factors_ptr + at_factors * FACTOR_STEP, mask=mask, other=0.0).to(tl.float32)
        if MINIMA:
            minima *= tl.load(minimum_factors_ptr + at_factors * FACTOR_STEP, mask=mask, other=0.0).to(tl.float32)
    if FLOAT8:  # the bits of a float with another bias, which is put right
        bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
        values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    elif TABLE >= 2:  # below float32's lowest exponent, put right
        bits = ((codes & 8) << 28) | ((codes & 7) << 22)
        values = bits.to(tl.float32, bitcast=True) * _RIGHT
    elif TABLE:
        values = tl.load(table_ptr + codes).to(tl.float32)
    else:  # 2 ** 23 and the code, for conversions of integers take longer
        values = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
        if ZEROS:
            zeros = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
            values += (MIDDLE - zeros)[:, :, None]
    values *= scales[:, :, None]
    if MINIMA:
        values += minima[:, :, None]
    return values.to(dtype)


@triton.jit
def _e2m1(pairs, scales, run: tl.constexpr):
    """bfloat16 [.., 2 * N] of bytes two by two, int16 [.., N]: of their lower halves, or of run 1 the upper ones."""
    words = pairs.to(tl.int32)
    both = tl.join(words << 8, words)
    both, scales = tl.broadcast(both, scales)
    if run == 0:
        out = tl.inline_asm_elementwise(_LOWER, "=r,r,r,r", [both, scales], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        out = tl.inline_asm_elementwise(_UPPER, "=r,r,r,r", [both, scales], dtype=tl.bfloat16, is_pure=True, pack=2)
    return tl.reshape(out, [out.shape[0], out.shape[1], 2 * out.shape[2]])


@triton.jit
def add_tile(
    total, x_ptr, x_rows, in_rows, matrix, outs, in_outs, first_block, columns_ptr, BLOCKS: tl.constexpr,
    ORDERED: tl.constexpr, IN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr, STEP: tl.constexpr,
    FACTOR_STEP: tl.constexpr, SHARED: tl.constexpr, TABLE: tl.constexpr,
    FLOAT8: tl.constexpr,
):  # fmt: skip
    """total [OUTS, ROWS] and the product of BLOCKS blocks of weights' rows `outs` with those columns of x.

    x_rows [ROWS]: where rows of x begin; if ORDERED, columns_ptr: which input each column is multiplied with. Weights
    stand where the tensor cores want many rows.
    """
    WIDTH: tl.constexpr = 4 * LOW
    DEPTH: tl.constexpr = BLOCKS * WIDTH
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    blocks = first_block + tl.arange(0, BLOCKS)
    for run in tl.static_range(8 // LOW):
        values = numbers(
            matrix, outs, in_outs, blocks, run, dtype, IN, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS, MINIMA,
            STEP, FACTOR_STEP, SHARED, TABLE, FLOAT8,
        )  # fmt: skip
        depth = tl.arange(0, DEPTH)
        columns = first_block * 32 + depth // WIDTH * 32 + run * WIDTH + depth % WIDTH
        mask = (columns < IN)[:, None] & in_rows[None, :]
        if ORDERED:
            columns = tl.load(columns_ptr + columns, mask=columns < IN, other=0)
        x = tl.load(x_ptr + x_rows[None, :] + columns[:, None], mask=mask, other=0.0)
        total = tl.dot(tl.reshape(values, [values.shape[0], DEPTH]), x, total, input_precision="ieee")
    return total


@triton.jit
def _planes_kernel(
    x_ptr, matrix, bias_ptr, out_ptr, parts_ptr, arrived_ptr, num_rows, x_stride, num_splits,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr, STEP: tl.constexpr,
    FACTOR_STEP: tl.constexpr, SHARED: tl.constexpr, TABLE: tl.constexpr,
    FLOAT8: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    split = tl.program_id(0) % num_splits
    row_tile = tl.program_id(0) // num_splits
    tile = row_tile * tl.num_programs(1) + tl.program_id(1)
    rows, outs = row_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = rows < num_rows, outs < OUT
    UNITS: tl.constexpr = (IN // 32 + BLOCKS - 1) // BLOCKS
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for unit in range(UNITS * split // num_splits, UNITS * (split + 1) // num_splits):
        total = add_tile(
            total, x_ptr, rows.to(tl.int64) * x_stride, in_rows, matrix, outs, in_outs, unit * BLOCKS, x_ptr, BLOCKS,
            False, IN, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS, MINIMA, STEP, FACTOR_STEP, SHARED, TABLE, FLOAT8,
        )  # fmt: skip
    done = True
    if SPLIT:
        within = tl.arange(0, OUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        place = parts_ptr + tile.to(tl.int64) * num_splits * OUTS * ROWS + within
        tl.store(place + split * OUTS * ROWS, total)
        barrier(COMPILED)  # the whole program's stores come before its arrival
        done = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == num_splits - 1
        if done:
            tl.store(arrived_ptr + tile, 0)
            total = tl.zeros([OUTS, ROWS], tl.float32)
            for index in range(num_splits):
                total += tl.load(place + index * OUTS * ROWS, cache_modifier=".cg")
    if done:
        if BIAS:
            total += tl.load(bias_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
        out_place = out_ptr + rows.to(tl.int64)[None, :] * OUT + outs[:, None]
        tl.store(out_place, total.to(out_ptr.dtype.element_ty), mask=in_rows[None, :] & in_outs[:, None])


@triton.jit
def _decode_weights_kernel(
    matrix, out_ptr, first, num_rows, IN: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr, STEP: tl.constexpr,
    FACTOR_STEP: tl.constexpr, SHARED: tl.constexpr, TABLE: tl.constexpr,
    FLOAT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    WIDTH: tl.constexpr = 4 * LOW
    rows = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (rows < num_rows)[:, None] & (blocks < IN // 32)[None, :]
    place = (rows.to(tl.int64)[:, None] * IN + blocks[None, :] * 32)[:, :, None]
    for run in tl.static_range(8 // LOW):
        values = numbers(
            matrix, first + rows, rows < num_rows, blocks, run, out_ptr.dtype.element_ty, IN, LOW, HIGH, GROUP, GROUPS,
            SPAN, MIDDLE, ZEROS, MINIMA, STEP, FACTOR_STEP, SHARED, TABLE, FLOAT8,
        )  # fmt: skip
        within = run * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        tl.store(out_ptr + place + within, values, mask=mask[:, :, None])
