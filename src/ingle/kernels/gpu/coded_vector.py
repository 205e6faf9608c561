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
from ingle.kernels.gpu.coded_tiles import first_column, load_tile, of_word, rows_of_tile
from ingle.kernels.gpu.device import await_previous, barrier, counters, has_warpgroups, num_sms, pdl
from ingle.kernels.gpu.elementwise import activate, rotate_and_store
from ingle.kernels.gpu.integers import as_integers, in_quads, load_fours, multiply_quads, table_words
from ingle.kernels.gpu.rotation import load_rotation, store_rotated
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
    warps_at_once: int = 16
    """That an SM runs, by what a thread then has of registers."""


@triton.jit(do_not_specialize=["num_programs"])
def _coded_vector_kernel(
    x_ptr, norm_ptr, matrix, table_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    parts_ptr, arrived_ptr, num_programs, out_stride, eps, v_offset, page_stride, token_stride, head_stride,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, CHUNKS: tl.constexpr,
    SPLITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr,
    GROUPS: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr,
    PAIR: tl.constexpr, TABLE: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HALF: tl.constexpr, FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
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
    column = first_column(chunk, APART)
    group = column // GROUP
    table = table_words(table_ptr, TABLE, COMPILED)
    loaded = load_tile(
        matrix, program, program < NUM_TILES, first_chunk, last_chunk, OUT, OUTS, CHUNKS, EPILOGUE, HALF, COUNT, LOW,
        HIGH, APART, GROUP, GROUPS, SPAN, ZEROS, COMPILED,
    )  # fmt: skip
    if SPLITS == 1:
        outs = rows_of_tile(program, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF)
    else:  # of all tiles at once, for the last program to arrive: one wait for what the others left
        lines = tl.arange(0, TILES * LINES)
        tiles = program + lines // LINES * num_programs
        outs = tl.where(tiles < NUM_TILES, tiles * LINES + lines % LINES, OUT)
    norms = load_fours(norm_ptr, column, in_chunks, APART) if NORMED else ()
    # What sums end in was there before the kernel before this one began.
    ending = _load_ending(
        program, outs, bias_ptr, residual_ptr, cos_sin_ptr, kv_places_ptr, ROWS, OUT, OUTS, EPILOGUE, BIAS, RESIDUAL,
        HALF,
    )  # fmt: skip
    if PDL:
        await_previous()
    inputs = ()
    scales = ()
    for row in tl.static_range(ROWS):
        given, squared = as_integers(x_ptr + row * IN, norms, column, in_chunks, CHUNKS, APART, NORMED, COMPILED)
        inputs += (given,)
        scales += (tl.rsqrt(tl.sum(squared, 0) / IN + eps) if NORMED else 1.0,)
    if TILES == 1:
        sums = _sums(
            loaded, inputs, scales, table, table_ptr, matrix, group, ROWS, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE,
            ZEROS, MINIMA, PAIR, TABLE, COMPILED,
        )  # fmt: skip
        if SPLITS > 1:
            _leave(sums, program, split, parts_ptr, ROWS, OUT, OUTS)
        else:
            _finish(
                sums, ending, program, outs, out_ptr, x_ptr, kv_ptr, out_stride, v_offset, page_stride, token_stride,
                head_stride, ROWS, OUT, OUTS, EPILOGUE, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
            )  # fmt: skip
    else:
        for tile in range(program, NUM_TILES, num_programs):
            held, of_tile = loaded, ending
            # The next weights are on their way while these are multiplied.
            following = tile + num_programs
            loaded = load_tile(
                matrix, following, following < NUM_TILES, first_chunk, last_chunk, OUT, OUTS, CHUNKS, EPILOGUE, HALF,
                COUNT, LOW, HIGH, APART, GROUP, GROUPS, SPAN, ZEROS, COMPILED,
            )  # fmt: skip
            if SPLITS == 1:
                outs = rows_of_tile(following, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF)
                ending = _load_ending(
                    following, outs, bias_ptr, residual_ptr, cos_sin_ptr, kv_places_ptr, ROWS, OUT, OUTS, EPILOGUE,
                    BIAS, RESIDUAL, HALF,
                )  # fmt: skip
            sums = _sums(
                held, inputs, scales, table, table_ptr, matrix, group, ROWS, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE,
                ZEROS, MINIMA, PAIR, TABLE, COMPILED,
            )  # fmt: skip
            if SPLITS > 1:
                _leave(sums, tile, split, parts_ptr, ROWS, OUT, OUTS)
            else:
                _finish(
                    sums, of_tile, tile, rows_of_tile(tile, tl.arange(0, LINES), OUT, OUTS, EPILOGUE, HALF), out_ptr,
                    x_ptr, kv_ptr, out_stride, v_offset, page_stride, token_stride, head_stride, ROWS, OUT, OUTS,
                    EPILOGUE, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                )  # fmt: skip
    if SPLITS > 1:
        barrier(COMPILED)  # the whole program's stores come before its arrival
        if tl.atomic_add(arrived_ptr + program, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrived_ptr + program, 0)
            sums = ()
            for row in tl.static_range(ROWS):
                total = tl.zeros([TILES * LINES], tl.float32)
                for index in tl.static_range(SPLITS):
                    place = parts_ptr + (index * ROWS + row) * OUT + outs
                    total += tl.load(place, mask=outs < OUT, other=0.0, cache_modifier=".cg")
                sums += (total,)
            _finish(
                sums, ending, program, outs, out_ptr, x_ptr, kv_ptr, out_stride, v_offset, page_stride, token_stride,
                head_stride, ROWS, OUT, OUTS, EPILOGUE, HALF, FIRST_HEAD, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
            )  # fmt: skip


@triton.jit
def _sums(
    loaded, inputs, scales, table, table_ptr, matrix, group, ROWS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, MINIMA: tl.constexpr, PAIR: tl.constexpr, TABLE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """What `load_tile` gives of a tile, times each row's inputs: for each row [LINES]."""
    words, steps = loaded
    quads = in_quads(words, table, table_ptr, LOW, HIGH, TABLE, COMPILED)
    steps = take_steps(steps, matrix, group, GROUP, GROUPS, SPAN, ZEROS, PAIR)
    sums = ()
    for row in tl.static_range(ROWS):
        product = multiply_quads(quads, steps, inputs[row], GROUP, MIDDLE, ZEROS, MINIMA, PAIR, SPAN, TABLE, COMPILED)
        sums += (tl.sum(product, 1) * scales[row],)
    return sums


@triton.jit
def _leave(sums, tile, split, parts_ptr, ROWS: tl.constexpr, OUT: tl.constexpr, LINES: tl.constexpr):
    """A split's sums of a tile, for the last one to arrive."""
    outs = tile * LINES + tl.arange(0, LINES)
    for row in tl.static_range(ROWS):
        tl.store(parts_ptr + (split * ROWS + row) * OUT + outs, sums[row], mask=outs < OUT)


@triton.jit
def take_steps(
    steps, matrix, group, GROUP: tl.constexpr, GROUPS: tl.constexpr, SPAN: tl.constexpr, ZEROS: tl.constexpr,
    PAIR: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of groups out of what `load_tile` gives of them."""
    taken = ()
    for part in tl.static_range(2 if GROUP == 16 else 1):
        taken += (of_word(steps[2 * part], matrix[2], group + part, GROUPS, PAIR),)
        taken += (of_word(steps[2 * part + 1], matrix[3], group + part, GROUPS, 0) if ZEROS else taken[2 * part],)
    if SPAN:
        factors = steps[4 if GROUP == 16 else 2]
        taken += (of_word(factors, matrix[4], group // SPAN, GROUPS // SPAN, 0),)
    return taken


@triton.jit
def _load_ending(
    tile, outs, bias_ptr, residual_ptr, cos_sin_ptr, kv_places_ptr, ROWS: tl.constexpr, OUT: tl.constexpr,
    OUTS: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """For each row what is added to the sums of weights' rows `outs`, and of a tile of heads what `store_rotated` takes
    of it."""
    bias = tl.load(bias_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32) if BIAS else 0.0
    added = ()
    rotations = ()
    for row in tl.static_range(ROWS):
        if RESIDUAL:
            added += (bias + tl.load(residual_ptr + row * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32),)
        else:
            added += (bias,)
        if EPILOGUE == 1:
            block = (tile * OUTS % HALF + tl.arange(0, OUTS))[:, None]
            own, there = tl.full([1, 1], row, tl.int32), tl.full([1, 1], True, tl.int1)
            rotations += (load_rotation(own, block, there, cos_sin_ptr, kv_places_ptr, HALF),)
    return added, rotations


@triton.jit
def _finish(
    sums, ending, tile, outs, out_ptr, x_ptr, kv_ptr, out_stride, v_offset, page_stride, token_stride, head_stride,
    ROWS: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr,
    FIRST_HEAD: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """What becomes of the sums of weights' rows `outs`."""
    dtype = out_ptr.dtype.element_ty
    added, rotations = ending
    for row in tl.static_range(ROWS):
        total = sums[row] + added[row]
        if EPILOGUE == 0:
            tl.store(out_ptr + row * out_stride + outs, total.to(dtype), mask=outs < OUT)
        else:
            first, other = tl.split(tl.trans(tl.reshape(total, [2, OUTS])))
            block = tl.arange(0, OUTS)
            if EPILOGUE == 1:
                store_rotated(
                    first[:, None], other[:, None], FIRST_HEAD + tile * OUTS // HALF, tl.full([1, 1], row, tl.int32),
                    (tile * OUTS % HALF + block)[:, None], tl.full([1, 1], True, tl.int1),
                    out_ptr, x_ptr, x_ptr, x_ptr, kv_ptr, x_ptr,
                    0.0, v_offset, page_stride, token_stride, head_stride, kv_ptr,
                    HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0, rotations[row],
                )  # fmt: skip
            else:
                place = tile * OUTS + block
                out = activate(first, EPILOGUE == 3) * other
                tl.store(out_ptr + row * out_stride + place, out.to(dtype), mask=place < OUT // 2)


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
    """Rows beyond 8,192 columns are split, unless a norm is that of `whole` ones.

    A program makes integers of its inputs for all rows of its tiles: so a tile of four bits has many, as long as all
    SMs have tiles. There are as many programs as an SM runs at once, by the compiled code: of a chunk a thread four of
    four warps; with two chunks eight of two, or six of two rows and of five bits (`tests/kernels/resources.py`).
    """
    count = coded.num_columns // CHUNK
    num_splits = 1 if whole or count <= 256 else triton.cdiv(count, 128)
    chunks = triton.next_power_of_2(triton.cdiv(count, num_splits))
    bits, alone = sum(BITS[coded.kind]), num_rows == 1
    of_thread, lines = (1, 8) if bits == 4 and alone else (2, 4 if bits <= 5 and alone else 2)
    warps_a_sm = 16 if bits != 5 and alone else 12
    num_warps = min(max(chunks // (32 * of_thread), 1), 16)
    at_once = max(num_sms * warps_a_sm // num_warps // num_splits, 1)
    while lines > 4 and triton.cdiv(coded.num_rows, lines) < at_once // 2:
        lines //= 2
    num_tiles = triton.cdiv(coded.num_rows, lines)
    if of_thread == 1:
        # A few tiles too many are done sooner by programs of their own than as the second ones of others.
        num_programs = num_tiles if num_tiles <= at_once * 5 // 4 else at_once
    else:  # all programs have as many tiles, or one less
        num_programs = triton.cdiv(num_tiles, triton.cdiv(num_tiles, at_once))
    outs = lines // 2 if paired else lines
    return Tiling(outs, chunks, num_splits, num_programs, num_warps, warps_at_once=warps_a_sm)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ coded.T + bias, for x [M, K] with its columns in the matrix's order."""
    out = x.new_empty(len(x), coded.num_rows)
    _run(x, None, coded, bias, _ADD, out)
    return out


def multiply_by_twos(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """The same of more rows than `MAX_ROWS`, of which each two ask for the weights anew."""
    out = x.new_empty(len(x), coded.num_rows)
    for first in range(0, len(x), MAX_ROWS):
        rows = slice(first, first + MAX_ROWS)
        _run(x[rows], None, coded, bias, _ADD, out[rows])
    return out


def add(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """residual + x @ coded.T + bias, for x [M, K] and residual [M, E], which the kernel that made x did not write."""
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
    if has_warpgroups(x.device):
        from ingle.kernels.gpu import coded_row  # Gluon takes a while to import

        row_shape = coded_row.tiling(x, coded, epilogue, rotation)
        if row_shape is not None:
            coded_row.run_by(
                row_shape, x, norm, coded, bias, epilogue, out, residual=residual, rotation=rotation,
                first_head=first_head,
            )  # fmt: skip
            return
    alone = epilogue != _ADD
    shape = tiling(coded, num_sms(x.device), len(x), paired=alone, whole=alone or norm is not None)
    run_by(
        shape, x, norm, coded, bias, epilogue, out, residual=residual, rotation=rotation, first_head=first_head,
    )  # fmt: skip


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
    assert shape.num_splits == 1 or epilogue == _ADD  # a pair's ending is that of one tile
    early = pdl(x.device)
    low, high = BITS[coded.kind]
    lines = shape.outs if epilogue == _ADD else 2 * shape.outs
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    parts = x
    if shape.num_splits > 1:
        parts = torch.empty(shape.num_splits * len(x) * coded.num_rows, dtype=torch.float32, device=x.device)
    _coded_vector_kernel[(shape.num_programs * shape.num_splits,)](
        x, x if norm is None else norm.weight, pointers(coded), coded.codes if coded.table is None else coded.table,
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
        TILES=triton.next_power_of_2(triton.cdiv(triton.cdiv(coded.num_rows, lines), shape.num_programs)),
        PDL=early, COMPILED=x.is_cuda,
        num_warps=shape.num_warps, maxnreg=(2048 // shape.warps_at_once) & ~7, launch_pdl=early,
    )  # fmt: skip


def _bits_of_pairs(coded: Coded) -> int:
    """Of a scale or a minimum, which are parts of one number; 0 without minima."""
    return 4 if coded.shares_bytes else 0 if coded.pairs is None else 8 * coded.pairs.itemsize


def pointers(coded: Coded) -> tuple[torch.Tensor, ...]:
    """What `load_tile` is given of a matrix, codes by words; what it does not have is not read."""
    words = coded.codes.view(torch.int32)
    high = words if coded.high is None else coded.high.view(torch.int32)
    scales, factors = coded.scales, words if coded.factors is None else coded.factors
    if coded.pairs is not None:
        scales = coded.pairs.view(torch.int16 if coded.pairs.itemsize == 1 else torch.int32)
    if coded.factor_pairs is not None:
        factors = coded.factor_pairs.view(torch.int32)
    return words, high, scales, coded.codes if coded.zeros is None else coded.zeros, factors
