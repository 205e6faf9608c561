"""Products of a few rows with codes, and what stands before and after them in a decoder layer.

As `few_rows` of floats: tiles of weights' rows, whose inputs are shared out to several programs where tiles are few,
and what is fused to them. How codes come to the tensor cores is in `lanes`. Programs are small and have no part of an
SM's memory, so that a kernel's run beside those of the one before, and ask for their first codes before these have
ended. Hopper takes int4, and blocks of GGUF's, another way where that fits (`few_rows_ring`, `few_rows_blocks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Norm, Rotation
from ingle.kernels.gpu import lanes
from ingle.kernels.gpu.codes import pointers
from ingle.kernels.gpu.device import (
    await_previous,
    barrier,
    counters,
    has_warpgroups,
    multiplies_bfloat16,
    num_sms,
    pdl,
)
from ingle.kernels.gpu.elementwise import rms_norm, rotate_and_store
from ingle.kernels.gpu.endings import ADD, GELU, PLAIN, ROTATE, SILU, finish, row_scales
from ingle.kernels.gpu.lanes import load_codes, load_inputs, load_scales, multiply_unit
from ingle.kernels.options import Activation

if TYPE_CHECKING:
    from ingle.kernels.gpu import few_rows_blocks, few_rows_ring

MAX_ROWS = 16
"""With more, inputs take more registers than there are."""
_WARPS = 4
_PER_SM = 5
"""Programs that an SM should have of a kernel."""
_EARLY_WARPS = 12
"""Of programs that an SM runs, where what is next is loaded early."""
_LONG = 8192
"""Columns of a row, from which on a program has several strips of rows, that share inputs."""
_LEAST_UNITS = 2
"""Iterations of a program, at least: its beginning and its end take longer than one."""


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_coded_kernel(
    x_ptr, x_words_ptr, matrix, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr, squares_ptr,
    parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    num_rows, x_stride, num_squares, eps, v_offset, page_stride, token_stride, head_stride,
    IN: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, WARPS: tl.constexpr, EPILOGUE: tl.constexpr,
    NORMED: tl.constexpr, BIASED: tl.constexpr, SQUARED: tl.constexpr, HALF: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, SQUARES: tl.constexpr,
    PDL: tl.constexpr, STRIPS: tl.constexpr, SPLITS: tl.constexpr, EARLY: tl.constexpr, WIDTH: tl.constexpr,
    PER_BYTE: tl.constexpr, WORDS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, BIAS: tl.constexpr,
    ZEROS: tl.constexpr, MINIMA: tl.constexpr, SUMS: tl.constexpr, UNIT: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A program has STRIPS of 16 rows, or pairs of them; its warps share out the columns. What comes next is on its way
    while a unit is multiplied: EARLY, and of a next tile, too, or as late as the compiler finds it best."""
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    PAIRED: tl.constexpr = EPILOGUE != 0 and EPILOGUE != 4
    PER: tl.constexpr = 2 if PAIRED else 1
    M: tl.constexpr = STRIPS * PER
    TILES: tl.constexpr = (OUT + 16 * M - 1) // (16 * M)
    UNITS: tl.constexpr = (WIDTH + 4 * WORDS * WARPS - 1) // (4 * WORDS * WARPS)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    first_unit, last_unit = UNITS * split // SPLITS, UNITS * (split + 1) // SPLITS
    outs = _outs(tile, OUT, STRIPS, EPILOGUE, HALF)
    scales = load_scales(
        matrix, outs, first_unit, OUT, WARPS, PER_BYTE, WORDS, GROUP, GROUPS, STEPS, FACTOR_STEPS, SPAN, ZEROS, MINIMA
    )
    codes = load_codes(matrix[0], outs, first_unit, OUT, WIDTH, WARPS, WORDS)
    if PDL:
        await_previous()
    xs = load_inputs(x_ptr, x_words_ptr, x_stride, num_rows, first_unit, IN, N, WARPS, PER_BYTE, WORDS, COMPILED)
    totals = _zeros(M * N, WARPS)
    if EARLY:
        unit, num_programs = first_unit, tl.num_programs(0) // SPLITS
        # One loop: of two, one in the other, Triton passes scales through an SM's memory. A tile's end is in it: beyond
        # that the compiler moves no loads.
        for _ in range(0, (TILES - tile + num_programs - 1) // num_programs * (last_unit - first_unit)):
            is_last = unit + 1 == last_unit
            next_unit = tl.where(is_last, first_unit, unit + 1)
            next_tile = tl.where(is_last, tile + num_programs, tile)
            next_outs = _outs(tl.minimum(next_tile, TILES - 1), OUT, STRIPS, EPILOGUE, HALF)
            next_codes = load_codes(matrix[0], next_outs, next_unit, OUT, WIDTH, WARPS, WORDS)
            next_scales = load_scales(
                matrix, next_outs, next_unit, OUT, WARPS, PER_BYTE, WORDS, GROUP, GROUPS, STEPS, FACTOR_STEPS, SPAN,
                ZEROS, MINIMA,
            )  # fmt: skip
            next_xs = load_inputs(
                x_ptr, x_words_ptr, x_stride, num_rows, next_unit, IN, N, WARPS, PER_BYTE, WORDS, COMPILED
            )
            totals = multiply_unit(
                totals, codes, xs, scales, M, N, dtype, WARPS, PER_BYTE, WORDS, KIND, GROUP, SPAN, ZERO, BIAS, ZEROS,
                MINIMA, SUMS, UNIT, COMPILED,
            )  # fmt: skip
            if is_last:
                outs = _outs(tile, OUT, STRIPS, EPILOGUE, HALF)
                _end(
                    totals, tile, split, outs, matrix, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr,
                    values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr, num_rows,
                    num_squares, eps, v_offset, page_stride, token_stride, head_stride, IN, OUT, N, EPILOGUE, NORMED,
                    BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, SQUARES, STRIPS, SPLITS, GROUP, STEPS[0],
                    UNIT, COMPILED,
                )  # fmt: skip
                totals = _zeros(M * N, WARPS)
            codes = next_codes
            scales = next_scales
            xs = next_xs
            tile, unit = next_tile, next_unit
    else:
        for unit in range(first_unit, last_unit):
            after = tl.minimum(unit + 1, last_unit - 1)
            next_codes = load_codes(matrix[0], outs, after, OUT, WIDTH, WARPS, WORDS)
            next_scales = load_scales(
                matrix, outs, after, OUT, WARPS, PER_BYTE, WORDS, GROUP, GROUPS, STEPS, FACTOR_STEPS, SPAN, ZEROS,
                MINIMA,
            )  # fmt: skip
            next_xs = load_inputs(
                x_ptr, x_words_ptr, x_stride, num_rows, after, IN, N, WARPS, PER_BYTE, WORDS, COMPILED
            )
            totals = multiply_unit(
                totals, codes, xs, scales, M, N, dtype, WARPS, PER_BYTE, WORDS, KIND, GROUP, SPAN, ZERO, BIAS, ZEROS,
                MINIMA, SUMS, UNIT, COMPILED,
            )  # fmt: skip
            codes = next_codes
            scales = next_scales
            xs = next_xs
        _end(
            totals, tile, split, outs, matrix, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr,
            values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr, num_rows,
            num_squares, eps, v_offset, page_stride, token_stride, head_stride, IN, OUT, N, EPILOGUE, NORMED,
            BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, SQUARES, STRIPS, SPLITS, GROUP, STEPS[0],
            UNIT, COMPILED,
        )  # fmt: skip


@triton.jit
def _outs(tile, OUT: tl.constexpr, STRIPS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr):
    """The first row of each of a tile's strips, one half's or the gate's before the other's."""
    outs = ()
    for strip in tl.static_range(STRIPS):
        row = (tile * STRIPS + strip) * 16
        if EPILOGUE == 1:
            row = row // HALF * 2 * HALF + row % HALF
        outs += (row,)
        if EPILOGUE != 0 and EPILOGUE != 4:
            outs += (row + (HALF if EPILOGUE == 1 else OUT // 2),)
    return outs


@triton.jit
def _end(
    totals, tile, split, outs, matrix, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr,
    squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr, num_rows, num_squares, eps, v_offset,
    page_stride, token_stride, head_stride,
    IN: tl.constexpr, OUT: tl.constexpr, N: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr,
    BIASED: tl.constexpr, SQUARED: tl.constexpr, HALF: tl.constexpr, NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, SQUARES: tl.constexpr, STRIPS: tl.constexpr,
    SPLITS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, UNIT: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """What becomes of each warp's sums, where a tile's other programs have left theirs."""
    PAIRED: tl.constexpr = EPILOGUE != 0 and EPILOGUE != 4
    PER: tl.constexpr = 2 if PAIRED else 1
    M: tl.constexpr = STRIPS * PER
    sums = ()
    for index in tl.static_range(M * N):
        sums += (tl.sum(totals[index], 0),)
    done = True
    if SPLITS > 1:
        within = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
        place = parts_ptr + tile.to(tl.int64) * (SPLITS * M * N * 128) + within
        for index in tl.static_range(M * N):
            tl.store(place + (split * M * N + index) * 128, sums[index])
        barrier(COMPILED)  # the whole program's stores come before its arrival
        done = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if done:
            tl.store(arrived_ptr + tile, 0)
            sums = _joined(place, SPLITS, M * N)
    if done:
        block = tl.arange(0, 16)[:, None]
        for n in tl.static_range(N):
            scale = tl.full([1, 8], 1.0, tl.float32)
            if NORMED:
                row, piece = n * 8 + tl.arange(0, 8)[:, None], tl.arange(0, SQUARES)[None, :]
                scale = row_scales(squares_in_ptr, row, piece, num_rows, num_squares, eps, IN)[None, :]
            for strip in tl.static_range(STRIPS):
                first, other = _two_of(sums, strip * PER * N + n, (strip * PER + PER - 1) * N + n)
                if GROUP == 0:
                    first *= _of_rows(matrix[1], outs[strip * PER], OUT, STEP) * UNIT
                    if PAIRED:
                        other *= _of_rows(matrix[1], outs[strip * PER + 1], OUT, STEP) * UNIT
                finish(
                    first * scale, other * scale, outs[strip * PER], outs[strip * PER + PER - 1],
                    tile * STRIPS + strip, (OUT + 15) // 16, block, n * 8 + tl.arange(0, 8)[None, :], num_rows,
                    bias_ptr, residual_ptr, norm_ptr, out_ptr, values_ptr, squares_ptr, cos_sin_ptr,
                    kv_ptr, kv_places_ptr, v_offset, page_stride, token_stride, head_stride,
                    OUT, 16, EPILOGUE, BIASED, SQUARED, HALF, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE,
                )  # fmt: skip


@triton.jit
def _zeros(COUNT: tl.constexpr, WARPS: tl.constexpr):
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([WARPS, 16, 8], tl.float32),)
    return totals


@triton.jit
def _two_of(sums, first: tl.constexpr, other: tl.constexpr):
    return sums[first], sums[other]


@triton.jit
def _joined(place, SPLITS: tl.constexpr, COUNT: tl.constexpr):
    """The sums of what all programs of a tile left, in order, all asked for at once."""
    left = ()
    for index in tl.static_range(SPLITS * COUNT):
        left += (tl.load(place + index * 128, cache_modifier=".cg"),)
    sums = ()
    for index in tl.static_range(COUNT):
        total = tl.zeros([16, 8], tl.float32)
        for split in tl.static_range(SPLITS):
            total += left[split * COUNT + index]
        sums += (total,)
    return sums


@triton.jit
def _of_rows(scales_ptr, first_out, OUT: tl.constexpr, STEP: tl.constexpr):
    """[16, 1]"""
    rows = first_out + tl.arange(0, 16)
    return tl.load(scales_ptr + rows * STEP, mask=rows < OUT, other=0.0).to(tl.float32)[:, None]


class Tiling(NamedTuple):
    """How a product is shared out."""

    strips: int
    """Of 16 rows of weights, or pairs of them, that a program has."""
    num_warps: int
    """Among which its columns are shared out."""
    num_splits: int
    """Programs that share a tile's inputs."""
    early: bool = False
    """Whether what is next is loaded early in a loop, which takes registers that other programs do not have."""
    registers: int | None = None
    """Of a thread, at most."""


def tiling(coded: Coded, *, paired: bool, num_sms: int) -> Tiling:
    """Of few programs each has much on its way, and as many splits as run at once; of many there are more at once."""
    per_sm, strips, num_warps, registers = _PER_SM, 1 if paired or coded.num_rows % 32 else 2, _WARPS, None
    if not paired and coded.kind == "int4" and lanes.block_bytes(coded) == 64 and coded.num_rows % 64 == 0:
        strips, num_warps = (4, _WARPS) if coded.num_columns > _LONG else (1, 2)
        per_sm, registers = _EARLY_WARPS // num_warps, 2048 // _EARLY_WARPS & ~7
    num_tiles = triton.cdiv(coded.num_rows, 16 * strips * (1 + paired))
    num_splits = min(max(per_sm * num_sms // num_tiles, 1), max(_num_units(coded, num_warps) // _LEAST_UNITS, 1))
    return Tiling(strips, num_warps, num_splits, registers is not None, registers)


def _num_units(coded: Coded, num_warps: int) -> int:
    """Iterations that a row takes."""
    size = lanes.block_bytes(coded)
    assert size is not None
    return int(triton.cdiv(coded.codes.shape[1], size * num_warps))


def suits(x: torch.Tensor, coded: Coded) -> bool:
    """Whether these kernels may, and should, multiply x [M, K] by such a matrix, with what is fused to that."""
    return coded.order is None and fits(x, coded)


def suits_heads(x: torch.Tensor, parts: Sequence[Coded], rotation: Rotation) -> bool:
    """The same for a matrix whose parts, one below the other, are whole heads."""
    if len(parts) == 1:
        return suits(x, parts[0])
    half = rotation.kv_cache.shape[-1] // 2
    return not _of_heads(rotation) and all(
        suits(x, part) and part.in_planes and _ring(x, part, ROTATE, half) is not None for part in parts
    )


def fits(x: torch.Tensor, coded: Coded) -> bool:
    """The same for a product alone of x, its columns as the matrix has them."""
    return (
        0 < len(x) <= MAX_ROWS
        and (x.itemsize == 2 or not x.is_cuda)  # Triton's interpreter takes float32
        and x.stride(1) == 1
        and x.stride(0) % 2 == 0
        and x.storage_offset() % 2 == 0
        and multiplies_bfloat16(x.device)
        and (lanes.block_bytes(coded) is not None or _ring(x, coded, PLAIN) is not None)
    )


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias, for x [M, K]."""
    out = x.new_empty(len(x), coded.num_rows)
    _run(x, coded, bias, None, PLAIN, out)
    return out


def add(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None, residual: torch.Tensor, norm: Norm) -> Flow:
    """residual + x @ matrix.T + bias, for x [M, K] and residual [M, E], on its way to the norm."""
    out = torch.empty_like(residual)
    if x.dtype == torch.float16:  # for which a row times the norm's weight may be too large before it is divided
        _run(x, coded, bias, None, ADD, out, residual=residual, norm=norm)
        return Flow(out, norm)
    values = torch.empty_like(residual)
    ring = _ring(x, coded, ADD)
    num_squares = triton.cdiv(coded.num_rows, 16 if ring is None else ring.outs)
    squares = torch.empty(len(x), num_squares, dtype=torch.float32, device=x.device)
    _run(x, coded, bias, None, ADD, out, residual=residual, norm=norm, values=values, squares=squares)
    return Flow(out, norm, values, squares)


def gated(flow: Flow, coded: Coded, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """activation(gate) * up of the normed rows times a matrix [2 * I, E], the gate in the first half: [M, I]."""
    x = _values(flow)
    out = x.new_empty(len(x), coded.num_rows // 2)
    _run(x, coded, bias, flow.squares, GELU if activation == "gelu_tanh" else SILU, out, norm=flow.norm)
    return out


def project_and_store(
    flow: Flow, parts: Sequence[Coded], bias: torch.Tensor | None, rotation: Rotation
) -> torch.Tensor:
    """The queries [M, Hq, D] of the normed rows, rotated; keys and values, of later rows, go to the cache."""
    x, head_dim = _values(flow), rotation.kv_cache.shape[-1]
    if len(parts) == 1 and (_of_heads(rotation) or not _ends(x, parts[0], ROTATE, head_dim // 2)):
        qkv = x.new_empty(len(x), parts[0].num_rows)
        _run(x, parts[0], bias, flow.squares, PLAIN, qkv, norm=flow.norm)
        return rotate_and_store(qkv, *rotation)
    q, first = x.new_empty(len(x), rotation.num_heads, head_dim), 0
    for part in parts:
        own = None if bias is None else bias[first : first + part.num_rows]
        _run(x, part, own, flow.squares, ROTATE, q, norm=flow.norm, rotation=rotation, first_head=first // head_dim)
        first += part.num_rows
    return q


def _of_heads(rotation: Rotation) -> bool:
    """Whether what stands behind a projection is of whole heads, which no program has."""
    return rotation.q_norm is not None or rotation.kv_scales is not None


def _ends(x: torch.Tensor, coded: Coded, epilogue: int, half: int) -> bool:
    """Whether a kernel takes a product that ends so: what `lanes` reads, any."""
    return lanes.block_bytes(coded) is not None or _ring(x, coded, epilogue, half) is not None


def _ring(
    x: torch.Tensor, coded: Coded, epilogue: int, half: int = 1
) -> few_rows_ring.Tiling | few_rows_blocks.Tiling | None:
    """How a kernel for Hopper shares out a product that ends so; None for all that these do not take."""
    if not (coded.in_planes or coded.kind == "int4") or not has_warpgroups(x.device):
        return None
    from ingle.kernels.gpu import few_rows_blocks, few_rows_ring  # Gluon takes a while to import

    if coded.in_planes:
        return few_rows_blocks.tiling(x, coded, epilogue, half)
    return few_rows_ring.tiling(x, coded, epilogue, half)


def _values(flow: Flow) -> torch.Tensor:
    """A first flow has none: nothing has been added to it."""
    return rms_norm(flow.residual, flow.norm.weight, flow.norm.eps) if flow.values is None else flow.values


def _run(
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
    ring = _ring(x, coded, epilogue, 1 if rotation is None else rotation.kv_cache.shape[-1] // 2)
    if ring is not None:
        more: dict[str, Any] = {"residual": residual, "values": values, "squares": squares}
        if first_head:
            more["first_head"] = first_head
        ring.run(x, coded, bias, squares_in, epilogue, out, norm=norm, rotation=rotation, **more)
        return
    device, (num_rows, size_in), size_out = x.device, x.shape, coded.num_rows
    paired = epilogue not in (ADD, PLAIN)
    shape = tiling(coded, paired=paired, num_sms=num_sms(device))
    num_tiles = triton.cdiv(size_out, 16 * shape.strips * (1 + paired))
    blocks_of_rows, num_splits = triton.cdiv(num_rows, 8), min(shape.num_splits, _num_units(coded, shape.num_warps))
    size = num_tiles * num_splits * shape.strips * (1 + paired) * blocks_of_rows * 128
    parts = x if num_splits == 1 else x.new_empty(size, dtype=torch.float32)
    early, num_squares = pdl(device), 1 if squares_in is None else squares_in.shape[1]
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    _few_rows_coded_kernel[(num_tiles * num_splits,)](
        x, _words(x), (coded.codes.view(torch.int32), *pointers(coded)[1:]), _or(bias, x), _or(squares_in, x),
        _or(residual, x), x if norm is None else norm.weight, out, _or(values, x), _or(squares, x), parts,
        counters(device), *places,
        num_rows, x.stride(0), num_squares, 0.0 if norm is None else norm.eps,
        *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        IN=size_in, OUT=size_out, N=blocks_of_rows, WARPS=shape.num_warps, EPILOGUE=epilogue,
        NORMED=squares_in is not None, BIASED=bias is not None, SQUARED=squares is not None,
        HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        SQUARES=triton.next_power_of_2(num_squares), PDL=early, STRIPS=shape.strips,
        SPLITS=num_splits, EARLY=shape.early,
        **lanes.constants(coded, x.dtype, compiled=x.is_cuda),
        num_warps=shape.num_warps, num_stages=1, maxnreg=shape.registers, launch_pdl=early,
    )  # fmt: skip


def _words(x: torch.Tensor) -> torch.Tensor:
    """Two numbers of 16 bits as one: the strides stay those of x."""
    return x.view(torch.int32) if x.is_cuda else x


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
