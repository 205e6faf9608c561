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
from ingle.kernels.gpu.integers import both, small

LEAST_DECODED = 65
"""From so many rows on, decoding the matrix costs less than decoding a tile for every 64 or 128 of them."""
_OUTS = 64
_PER_SM = 4
"""Programs that an SM should have of a product."""
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
    num_tiles = triton.cdiv(coded.num_rows, _OUTS)
    num_units = triton.cdiv(coded.num_columns, 4 * PLANES_BLOCK)
    num_splits = max(min(_PER_SM * num_sms // num_tiles, num_units // 4), 1)
    # Of four blocks fewer programs fit an SM, which would leave some for later.
    blocks = 4 if rows <= 32 and num_tiles * num_splits <= _PER_SM * num_sms else 2
    return Tiling(rows, _OUTS, blocks, 4, 4 if rows <= 32 else 3, num_splits)


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
        **constants(coded), BIAS=bias is not None, SPLIT=shape.num_splits > 1, PDL=early, COMPILED=x.is_cuda,
        num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


def decode(coded: Coded, first: int, out: torch.Tensor) -> None:
    """Writes its rows from `first` on to out [R, I]."""
    outs, blocks = 16, 16
    early = pdl(out.device)
    grid = triton.cdiv(len(out), outs), triton.cdiv(coded.num_columns, blocks * PLANES_BLOCK)
    _decode_kernel[grid](
        pointers(coded), out, first, len(out),
        IN=coded.num_columns, OUTS=outs, BLOCKS=blocks, **constants(coded), PDL=early, num_warps=4, launch_pdl=early,
    )  # fmt: skip


def suits(coded: Coded) -> bool:
    """Whether these kernels read it."""
    size = coded.group_size
    in_groups = size % PLANES_BLOCK == 0 or coded.scales.shape[1] == 1 or (size == 16 and BITS[coded.kind][0] < 8)
    return coded.in_planes and in_groups


def pointers(coded: Coded) -> tuple[torch.Tensor, ...]:
    """What `multiply_tile` is given of a matrix, codes by words; what it does not have is not read."""
    words = coded.codes.view(torch.int32)
    high = words if coded.high is None else coded.high.view(torch.int32)
    scales, factors = coded.scales, words if coded.factors is None else coded.factors
    if coded.pairs is not None:
        scales = coded.pairs.view(torch.int16 if coded.pairs.itemsize == 1 else torch.int32)
    if coded.factor_pairs is not None:
        factors = coded.factor_pairs.view(torch.int32)
    others = (coded.codes if tensor is None else tensor for tensor in (coded.zeros, coded.table))
    return words, high, scales, factors, *others


def constants(coded: Coded) -> dict[str, int]:
    """What kernels are compiled for."""
    low, high = BITS[coded.kind]
    without = coded.has_minima or coded.table is not None or coded.kind == "fp8"
    bits = 4 if coded.shares_bytes else 0 if coded.pairs is None else 8 * coded.pairs.itemsize
    return {
        "LOW": low, "HIGH": high, "GROUP": coded.group_size, "GROUPS": coded.scales.shape[1], "SPAN": coded.span,
        "MIDDLE": 0 if without else MIDDLE[coded.kind], "ZEROS": coded.zeros is not None, "PAIR": bits,
        "TABLE": _E2M1 + coded.codes.is_cuda if coded.is_e2m1 else int(coded.table is not None),
        "FLOAT8": coded.kind == "fp8",
    }  # fmt: skip


@triton.jit
def _place(index, OUTS: tl.constexpr, BLOCKS: tl.constexpr, FRAGMENTS: tl.constexpr):
    """The row, the block and the half of a run of which a thread has the numbers, by its index.

    FRAGMENTS: as the tensor cores have them of a tile, so that four threads have the same row of two blocks.
    """
    if FRAGMENTS:
        row = index // 32 % (OUTS // 16) * 16 + index // (2 * OUTS) % 2 * 8 + index // 4 % 8
        block = index // (4 * OUTS) * 2 + index // 2 % 2
    else:
        row, block = index // (2 * BLOCKS), index // 2 % BLOCKS
    return row, block, index % 2


@triton.jit
def _load_words(
    ptr, first_row, last_row, first_block, at: tl.constexpr, EACH: tl.constexpr, WIDTH: tl.constexpr,
    OUTS: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """Two words for each half of a run, of blocks of WIDTH: those from `at` on, or, of EACH, from the half's own on."""
    index = tl.arange(0, OUTS * BLOCKS * 4)
    row, block, half = _place(index // 2, OUTS, BLOCKS, FRAGMENTS)
    mask = first_row + row < last_row
    if COUNT % BLOCKS:
        mask = mask & (first_block + block < COUNT)
    within = at + (half * 2 if EACH == 4 else 0) + index % 2
    place = ptr + (first_row.to(tl.int64) * COUNT + first_block) * WIDTH + ((row * COUNT + block) * WIDTH + within)
    words = tl.load(tl.max_contiguous(tl.multiple_of(place, [8]), [2]), mask=mask, other=0)
    return tl.split(tl.reshape(words, [OUTS * BLOCKS * 2, 2]))


@triton.jit
def load_tile(
    matrix, first_row, last_row, first_block, OUTS: tl.constexpr, BLOCKS: tl.constexpr, IN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    ZEROS: tl.constexpr, FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """Of OUTS rows of weights and BLOCKS blocks of 32 columns what `numbers` makes numbers of.

    In one dimension, so that what is loaded, shared by groups and put in order is laid out alike: a thread has half of
    a run of 16 columns, eight neighbours, and the same half of the block's other run.
    """
    codes_ptr, high_ptr, scales_ptr, factors_ptr, zeros_ptr, _table_ptr = matrix
    COUNT: tl.constexpr = IN // 32
    if LOW == 8:
        words = _load_words(
            codes_ptr, first_row, last_row, first_block, 0, 4, 8, OUTS, BLOCKS, COUNT, FRAGMENTS
        ) + _load_words(codes_ptr, first_row, last_row, first_block, 4, 4, 8, OUTS, BLOCKS, COUNT, FRAGMENTS)
    else:
        words = _load_words(codes_ptr, first_row, last_row, first_block, 0, LOW, LOW, OUTS, BLOCKS, COUNT, FRAGMENTS)
    row, block, _half = _place(tl.arange(0, OUTS * BLOCKS * 2), OUTS, BLOCKS, FRAGMENTS)
    block += first_block
    mask = first_row + row < last_row
    if COUNT % BLOCKS:
        mask = mask & (block < COUNT)
    if HIGH == 2:
        words += _load_words(high_ptr, first_row, last_row, first_block, 0, 2, 2, OUTS, BLOCKS, COUNT, FRAGMENTS)
    elif HIGH == 1:
        place = high_ptr + first_row.to(tl.int64) * COUNT + (row * COUNT + block)
        words += (tl.load(place, mask=mask, other=0),)
    steps = ()
    for run in tl.static_range(2 if GROUP == 16 else 1):
        group = (block * 32 + run * 16) // GROUP
        at = first_row.to(tl.int64) * GROUPS + (row * GROUPS + group)
        scales = _whole(tl.load(scales_ptr + at, mask=mask, other=0))
        steps += (scales,)
        steps += (_whole(tl.load(zeros_ptr + at, mask=mask, other=0)) if ZEROS else scales,)
    if SPAN:
        FACTORS: tl.constexpr = GROUPS // SPAN
        at = first_row.to(tl.int64) * FACTORS + (row * FACTORS + block * 32 // GROUP // SPAN)
        steps += (_whole(tl.load(factors_ptr + at, mask=mask, other=0)),)
    return words, steps


@triton.jit
def _whole(values):
    """Of 32 bits, which threads carry from one iteration to the next without packing them."""
    return values.to(tl.int32) if values.dtype.is_int() else values.to(tl.float32)


@triton.jit
def numbers(
    loaded, run: tl.constexpr, table_ptr, dtype: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    GROUP: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, PAIR: tl.constexpr,
    TABLE: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """[OUTS * BLOCKS * 2, 8]: of what `load_tile` gives, the columns of a run, each rounded once."""
    words, steps = loaded
    PART: tl.constexpr = 2 * run if GROUP == 16 else 0
    scale, minimum = both(steps[PART], PAIR)
    if SPAN:
        factor, minimum_factor = both(steps[4 if GROUP == 16 else 2], 16 if PAIR else 0)
        scale *= factor
        minimum *= minimum_factor
    zero = small(steps[PART + 1]) if ZEROS else tl.full([1], MIDDLE, tl.float32)
    half = tl.arange(0, words[0].shape[0]) % 2
    found = ()
    for four in tl.static_range(2):  # codes, in bytes of a word
        if LOW == 8:
            codes = words[2 * run + four]
        elif LOW == 4:
            codes = (words[four] >> (4 * run)) & 0x0F0F0F0F
        else:
            codes = (words[four] >> (2 * half + 4 * run)) & 0x03030303
        if HIGH == 2:
            codes |= ((words[2 + four] >> (2 * half + 4 * run)) & 0x03030303) << LOW
        elif HIGH == 1:
            codes |= ((words[2] >> (2 * half + 4 * run + four)) & 0x01010101) << LOW
        for byte in tl.static_range(4):
            code = (codes >> (8 * byte)) & 255
            if FLOAT8:  # the bits of a float with another bias, which is put right
                bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
                values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
            elif TABLE >= 2:  # below float32's lowest exponent, put right
                bits = ((code & 8) << 28) | ((code & 7) << 22)
                values = bits.to(tl.float32, bitcast=True) * _RIGHT
            elif TABLE:
                values = tl.load(table_ptr + code).to(tl.float32)
            # A power of two and the code, where that is: conversions of integers take longer.
            elif byte % 2 == 1 and (LOW == 8 or byte == 1):
                bits = ((codes >> (8 * byte - 8)) & 0xFF00) | 0x47000000
                values = bits.to(tl.float32, bitcast=True) - (32768.0 + zero)
            elif LOW == 8 or byte == 0:
                values = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)
            else:
                bits = ((codes >> (8 * byte - 16)) & 0x7F0000) | 0x43000000
                values = bits.to(tl.float32, bitcast=True) - (128.0 + zero)
            values *= scale
            if PAIR:
                values += minimum
            found += (values.to(dtype),)
    return tl.reshape(in_order(found), [words[0].shape[0], 8])


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
def _pairs(
    matrix, first_row, last_row, first_block, run: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
    IN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """bfloat16 [OUTS, BLOCKS, 16] of a run of E2M1."""
    outs, blocks = first_row + tl.arange(0, OUTS), first_block + tl.arange(0, BLOCKS)
    mask = (outs < last_row)[:, None] & (blocks < IN // 32)[None, :]
    place = (outs.to(tl.int64)[:, None] * (IN // 32) + blocks[None, :])[:, :, None]
    pairs_ptr = matrix[0].to(tl.pointer_type(tl.int16)) + place * 8 + tl.arange(0, 8)[None, None, :]
    at = outs.to(tl.int64)[:, None] * GROUPS + (blocks * 32 // GROUP)[None, :]
    scales = (tl.load(matrix[2] + at, mask=mask, other=0.0).to(tl.float32) * _RIGHT).to(tl.bfloat16)
    return _e2m1(tl.load(pairs_ptr, mask=mask[:, :, None], other=0), scales[:, :, None, None], run)


@triton.jit
def multiply_tile(
    x_ptr, x_rows, in_rows, matrix, first_row, last_row, first_unit, last_unit, columns_ptr, ROWS: tl.constexpr,
    OUTS: tl.constexpr, BLOCKS: tl.constexpr, ORDERED: tl.constexpr, IN: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, PAIR: tl.constexpr, TABLE: tl.constexpr, FLOAT8: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """float32 [OUTS, ROWS]: of units of BLOCKS blocks the product of weights' rows from `first_row` on with those
    columns of x.

    x_rows [ROWS]: where rows of x begin; if ORDERED, columns_ptr: which input each column is multiplied with. Weights
    stand where the tensor cores want many rows.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    PAIRS: tl.constexpr = TABLE == 3 and dtype == tl.bfloat16
    total = tl.zeros([OUTS, ROWS], tl.float32)
    loaded = ()
    if not PAIRS:
        loaded = load_tile(
            matrix, first_row, last_row, first_unit * BLOCKS, OUTS, BLOCKS, IN, LOW, HIGH, GROUP, GROUPS, SPAN, ZEROS,
            FRAGMENTS,
        )  # fmt: skip
    depth = tl.arange(0, BLOCKS * 16 if PAIRS else BLOCKS * 32)
    for unit in range(first_unit, last_unit):
        held = loaded
        if PAIRS:
            for run in tl.static_range(2):
                values = _pairs(matrix, first_row, last_row, unit * BLOCKS, run, OUTS, BLOCKS, IN, GROUP, GROUPS)
                columns = unit * (BLOCKS * 32) + depth // 16 * 32 + run * 16 + depth % 16
                total = _add(total, values, x_ptr, x_rows, in_rows, columns, columns_ptr, BLOCKS, ORDERED, IN)
        else:  # the next unit's are on their way while this one's are multiplied
            following = tl.minimum(unit + 1, last_unit - 1) * BLOCKS
            loaded = load_tile(
                matrix, first_row, last_row, following, OUTS, BLOCKS, IN, LOW, HIGH, GROUP, GROUPS, SPAN, ZEROS,
                FRAGMENTS,
            )  # fmt: skip
            first = numbers(held, 0, matrix[5], dtype, LOW, HIGH, GROUP, SPAN, MIDDLE, ZEROS, PAIR, TABLE, FLOAT8)
            second = numbers(held, 1, matrix[5], dtype, LOW, HIGH, GROUP, SPAN, MIDDLE, ZEROS, PAIR, TABLE, FLOAT8)
            values = tl.permute(tl.join(first, second), [0, 2, 1])
            if FRAGMENTS:
                values = tl.reshape(values, [BLOCKS // 2, 2, OUTS // 16, 8, 4, 4, 2, 2])
                values = tl.permute(values, [2, 1, 3, 0, 5, 6, 4, 7])
                within = depth // 32 % 2 * 16 + depth // 2 % 2 * 8
                within += depth // 16 % 2 * 4 + depth // 8 % 2 * 2 + depth % 2
                columns = unit * (BLOCKS * 32) + depth // 64 * 64 + depth // 4 % 2 * 32 + within
            else:
                within = depth // 8 % 2 * 16 + depth // 16 % 2 * 8 + depth % 8
                columns = unit * (BLOCKS * 32) + depth // 32 * 32 + within
            total = _add(total, values, x_ptr, x_rows, in_rows, columns, columns_ptr, BLOCKS, ORDERED, IN)
    return total


@triton.jit
def _add(
    total, values, x_ptr, x_rows, in_rows, columns, columns_ptr, BLOCKS: tl.constexpr, ORDERED: tl.constexpr,
    IN: tl.constexpr,
):  # fmt: skip
    """total and the product of the numbers of columns, of each row one after the other, with those of x."""
    mask = in_rows[None, :]
    if IN // 32 % BLOCKS:
        mask = mask & (columns < IN)[:, None]
    if ORDERED:
        columns = tl.load(columns_ptr + columns, mask=columns < IN, other=0)
    x = tl.load(x_ptr + x_rows[None, :] + columns[:, None], mask=mask, other=0.0)
    return tl.dot(tl.reshape(values, [total.shape[0], columns.shape[0]]), x, total, input_precision="ieee")


@triton.jit
def _planes_kernel(
    x_ptr, matrix, bias_ptr, out_ptr, parts_ptr, arrived_ptr, num_rows, x_stride, num_splits,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, PAIR: tl.constexpr, TABLE: tl.constexpr, FLOAT8: tl.constexpr,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    split = tl.program_id(0) % num_splits
    row_tile = tl.program_id(0) // num_splits
    tile = row_tile * tl.num_programs(1) + tl.program_id(1)
    rows, outs = row_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = rows < num_rows, outs < OUT
    UNITS: tl.constexpr = (IN // 32 + BLOCKS - 1) // BLOCKS
    total = multiply_tile(
        x_ptr, rows.to(tl.int64) * x_stride, in_rows, matrix, tl.program_id(1) * OUTS, OUT,
        UNITS * split // num_splits, UNITS * (split + 1) // num_splits, x_ptr, ROWS, OUTS, BLOCKS, False, IN,
        LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS, PAIR, TABLE, FLOAT8, True,
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
def _decode_kernel(
    matrix, out_ptr, first, num_rows, IN: tl.constexpr, OUTS: tl.constexpr, BLOCKS: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr,
    MIDDLE: tl.constexpr, ZEROS: tl.constexpr, PAIR: tl.constexpr, TABLE: tl.constexpr, FLOAT8: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    first_row, first_block = tl.program_id(0) * OUTS, tl.program_id(1) * BLOCKS
    loaded = load_tile(
        matrix, first + first_row, first + num_rows, first_block, OUTS, BLOCKS, IN, LOW, HIGH, GROUP, GROUPS, SPAN,
        ZEROS, False,
    )  # fmt: skip
    if PDL:
        await_previous()  # which may still read what is overwritten
    lane = tl.arange(0, OUTS * BLOCKS * 2)[:, None]
    row, block = first_row + lane // (2 * BLOCKS), first_block + lane // 2 % BLOCKS
    inside = (row < num_rows) & (block < IN // 32)
    for run in tl.static_range(2):
        values = numbers(
            loaded, run, matrix[5], out_ptr.dtype.element_ty, LOW, HIGH, GROUP, SPAN, MIDDLE, ZEROS, PAIR, TABLE,
            FLOAT8,
        )  # fmt: skip
        place = tl.multiple_of(row.to(tl.int64) * IN + (block * 32 + run * 16 + lane % 2 * 8), [8, 8])
        tl.store(out_ptr + (place + tl.arange(0, 8)[None, :]), values, mask=inside)


@triton.jit
def in_order(numbers):
    """Eight tensors as the last three dimensions of one: what is joined last is what differs first."""
    even = tl.join(tl.join(numbers[0], numbers[4]), tl.join(numbers[2], numbers[6]))
    odd = tl.join(tl.join(numbers[1], numbers[5]), tl.join(numbers[3], numbers[7]))
    return tl.join(even, odd)
