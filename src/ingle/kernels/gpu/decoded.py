"""Products of many rows with codes: some rows of weights at a time become numbers in one scratch, for the library's.

With many rows the tensor cores are what takes the time, and the library's product uses them best; decoding takes the
time of writing the numbers, once, whatever the rows. The scratch is one for all matrices, and no larger than it takes
to keep the tensor cores busy.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import BITS, MIDDLE, PLANES_BLOCK, Coded
from ingle.kernels.gpu import codes, planes
from ingle.kernels.gpu.codes import pointers
from ingle.kernels.gpu.device import await_previous, pdl

SCRATCH_NUMBERS = 72 << 20
"""Of 16 bits: of a matrix with 19,000 inputs 4,000 rows, which are enough tiles for a GPU."""
_ROWS, _BYTES = 16, 256
"""That a program decodes."""
_PLANES_BLOCK: tl.constexpr = tl.constexpr(PLANES_BLOCK)
_RUN = 8
"""Bytes of a thread."""


@functools.cache
def _scratch(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(SCRATCH_NUMBERS if device.type == "cuda" else 1 << 16, dtype=dtype, device=device)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias, for x [M, I] whose columns are as the matrix has them."""
    size_out, size_in = coded.num_rows, coded.num_columns
    out, scratch = x.new_empty(len(x), size_out), _scratch(x.device, x.dtype)
    room = len(scratch)
    num_chunks = triton.cdiv(size_out * size_in, room)
    size = min(triton.cdiv(triton.cdiv(size_out, num_chunks), 128) * 128, max(room // size_in, 1))
    for start in range(0, size_out, size):
        end = min(start + size, size_out)
        weights = scratch[: (end - start) * size_in].view(end - start, size_in)
        (decode if by_bytes(coded) else planes.decode)(coded, start, weights)
        part = out[:, start:end]
        if bias is None:
            torch.mm(x, weights.t(), out=part)
        else:
            torch.addmm(bias[start:end], x, weights.t(), out=part)
    return out


def suits(coded: Coded) -> bool:
    return coded.in_planes or by_bytes(coded)


def by_bytes(coded: Coded) -> bool:
    """Whether the numbers of a thread's eight bytes are neighbours, once or twice, of one group each time."""
    low, high = BITS[coded.kind]
    if low < 4 or coded.table is not None or not coded.codes.is_contiguous():
        return False
    if high and not (coded.in_planes and coded.high is not None and coded.high.is_contiguous()):
        return False
    in_groups = coded.scales.shape[1] == 1 or coded.group_size % _RUN == 0
    return in_groups and coded.codes.shape[1] % _RUN == 0 and (low == 8 or coded.half % _RUN == 0)


def decode(coded: Coded, first_row: int, out: torch.Tensor) -> None:
    """Writes the numbers of the rows from `first_row` on to out [R, I], contiguous."""
    early = pdl(out.device)
    width, high = coded.codes.shape[1], BITS[coded.kind][1]
    middle = 0 if coded.minima is not None or coded.kind == "fp8" else MIDDLE[coded.kind]
    factor_steps = (0, 0) if coded.factors is None else coded.factors.stride()
    words = coded.codes.view(torch.int32)
    matrix = (words, words if coded.high is None else coded.high.view(torch.int32), *pointers(coded)[1:])
    _decode_weights_kernel[(triton.cdiv(len(out), _ROWS), triton.cdiv(width, _BYTES))](
        matrix, out, first_row, len(out),
        WIDTH=width, PER_BYTE=8 // BITS[coded.kind][0], HIGH=high, ROWS=_ROWS, BYTES=_BYTES, GROUP=coded.group_size,
        HALF=coded.half, FLOAT8=coded.kind == "fp8", MIDDLE=middle, ZEROS=coded.zeros is not None, SPAN=coded.span,
        MINIMA=coded.minima is not None, STEPS=coded.scales.stride(), FACTOR_STEPS=factor_steps, PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _decode_weights_kernel(
    matrix, out_ptr, first_row, num_rows,
    WIDTH: tl.constexpr, PER_BYTE: tl.constexpr, HIGH: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
    GROUP: tl.constexpr, HALF: tl.constexpr, FLOAT8: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr,
    SPAN: tl.constexpr, MINIMA: tl.constexpr, STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A thread has eight neighbouring bytes of a row, whose numbers it stores by 16 bytes. In one dimension, so that
    what is loaded, shared by groups and stored is laid out alike and passes through no shared memory."""
    RUNS: tl.constexpr = BYTES // 8  # of a row
    BLOCK: tl.constexpr = _PLANES_BLOCK // PER_BYTE  # bytes
    index = tl.arange(0, ROWS * RUNS * 2)
    row = tl.program_id(0) * ROWS + index // (2 * RUNS)
    word = tl.program_id(1) * (2 * RUNS) + index % (2 * RUNS)
    places = matrix[0] + ((first_row + row).to(tl.int64) * (WIDTH // 4) + word)
    places = tl.max_contiguous(tl.multiple_of(places, [8]), [2])
    held = tl.load(places, mask=(row < num_rows) & (word < WIDTH // 4), other=0, eviction_policy="evict_first")
    words = tl.split(tl.reshape(held, [ROWS * RUNS, 2]))
    run = tl.arange(0, ROWS * RUNS)
    row = tl.program_id(0) * ROWS + run // RUNS
    place = tl.program_id(1) * BYTES + run % RUNS * 8
    mask = (row < num_rows) & (place < WIDTH)
    held_row = first_row + row
    column = place // HALF * (2 * HALF) + place % HALF if PER_BYTE == 2 else place
    block = held_row.to(tl.int64) * (WIDTH // BLOCK) + place // BLOCK
    upper = _upper_bits(matrix[1], block, place % BLOCK // 8 * 2, mask, HIGH)
    scale, minimum, zero = _of_group(
        matrix, held_row, column // GROUP, mask, MIDDLE, ZEROS, SPAN, MINIMA, STEPS, FACTOR_STEPS
    )
    scales, minima, zeros = (scale, scale), (minimum, minimum), (zero, zero)
    if PER_BYTE == 2 and GROUP % (2 * HALF) != 0:
        other = _of_group(
            matrix, held_row, (column + HALF) // GROUP, mask, MIDDLE, ZEROS, SPAN, MINIMA, STEPS, FACTOR_STEPS
        )
        scales, minima, zeros = (scale, other[0]), (minimum, other[1]), (zero, other[2])
    dtype = out_ptr.dtype.element_ty
    if PDL:
        await_previous()  # which may still read what is overwritten
    for half in tl.static_range(PER_BYTE):
        numbers = ()
        for byte in tl.static_range(8):
            code = (words[byte // 4] >> (byte % 4 * 8 + half * 4)) & (15 if PER_BYTE == 2 else 255)
            if HIGH == 2:
                code |= (upper[byte // 4] >> (byte % 4 * 8 + half * 4) & 3) << 4
            elif HIGH == 1:
                code |= (upper[0] >> (byte % 4 * 8 + half * 4 + byte // 4) & 1) << 4
            number = codes.numbers(code.to(tl.uint8), zeros[half], 2 if FLOAT8 else 1, tl.float32)
            numbers += ((number * scales[half] + minima[half]).to(dtype),)
        lane = tl.arange(0, ROWS * RUNS)[:, None]
        row_out = tl.program_id(0) * ROWS + lane // RUNS
        byte_out = tl.program_id(1) * BYTES + lane % RUNS * 8
        to = byte_out // HALF * (2 * HALF) + byte_out % HALF + half * HALF if PER_BYTE == 2 else byte_out
        to = tl.multiple_of(row_out.to(tl.int64) * (WIDTH * PER_BYTE) + to, [8, 8])
        out = out_ptr + (to + tl.arange(0, 8)[None, :])
        inside = (row_out < num_rows) & (byte_out < WIDTH)
        tl.store(out, tl.reshape(_in_order(numbers), [ROWS * RUNS, 8]), mask=inside)


@triton.jit
def _upper_bits(high_ptr, block, shift, mask, HIGH: tl.constexpr):
    """The words that have those of a block's codes."""
    words = ()
    for each in tl.static_range(HIGH):
        words += (tl.load(high_ptr + block * HIGH + each, mask=mask, other=0) >> shift,)
    return words


@triton.jit
def _of_group(
    matrix, rows, group, mask, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, SPAN: tl.constexpr, MINIMA: tl.constexpr,
    STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr,
):  # fmt: skip
    """Scale, minimum and zero."""
    _codes_ptr, _high_ptr, scales_ptr, zeros_ptr, factors_ptr, minima_ptr, minimum_factors_ptr = matrix
    of_group = rows * STEPS[0] + group * STEPS[1]
    scale = tl.load(scales_ptr + of_group, mask=mask, other=0).to(tl.float32)
    minimum = tl.zeros([1], tl.float32)
    zero = tl.full([1], MIDDLE, tl.uint8)
    if SPAN:
        of_factor = rows * FACTOR_STEPS[0] + group // SPAN * FACTOR_STEPS[1]
        scale *= tl.load(factors_ptr + of_factor, mask=mask, other=0.0).to(tl.float32)
    if MINIMA:
        minimum = tl.load(minima_ptr + of_group, mask=mask, other=0).to(tl.float32)
        if SPAN:
            minimum *= tl.load(minimum_factors_ptr + of_factor, mask=mask, other=0.0).to(tl.float32)
    if ZEROS:
        zero = tl.load(zeros_ptr + of_group, mask=mask, other=0)
    return scale, minimum, zero


@triton.jit
def _in_order(numbers):
    """Eight tensors as the last three dimensions of one: what is joined last is what differs first."""
    even = tl.join(tl.join(numbers[0], numbers[4]), tl.join(numbers[2], numbers[6]))
    odd = tl.join(tl.join(numbers[1], numbers[5]), tl.join(numbers[3], numbers[7]))
    return tl.join(even, odd)
