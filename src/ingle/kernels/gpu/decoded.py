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

from ingle.kernels.coded import Coded
from ingle.kernels.gpu import codes, planes
from ingle.kernels.gpu.codes import pointers
from ingle.kernels.gpu.device import await_previous, pdl

SCRATCH_NUMBERS = 72 << 20
"""Of 16 bits: of a matrix with 19,000 inputs 4,000 rows, which are enough tiles for a GPU."""
_ROWS, _BYTES = 16, 256
"""That a program decodes."""


@functools.cache
def _scratch(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(SCRATCH_NUMBERS if device.type == "cuda" else 1 << 16, dtype=dtype, device=device)


def multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ matrix.T + bias, for x [M, I] whose columns are as the matrix has them."""
    size_out, size_in = coded.num_rows, coded.num_columns
    out, scratch = x.new_empty(len(x), size_out), _scratch(x.device, x.dtype)
    room = min(len(scratch), planes.PIECE) if coded.in_planes else len(scratch)
    num_chunks = triton.cdiv(size_out * size_in, room)
    size = min(triton.cdiv(triton.cdiv(size_out, num_chunks), 128) * 128, max(room // size_in, 1))
    for start in range(0, size_out, size):
        end = min(start + size, size_out)
        weights = scratch[: (end - start) * size_in].view(end - start, size_in)
        (planes.decode if coded.in_planes else decode)(coded, start, weights)
        part = out[:, start:end]
        if bias is None:
            torch.mm(x, weights.t(), out=part)
        else:
            torch.addmm(bias[start:end], x, weights.t(), out=part)
    return out


def decode(coded: Coded, first_row: int, out: torch.Tensor) -> None:
    """Writes the numbers of the rows from `first_row` on to out [R, I], contiguous."""
    early = pdl(out.device)
    form, held = codes.FORMATS[coded.kind], codes.constants(coded)
    width = coded.codes.shape[1]
    factor_steps = (0, 0) if coded.factors is None else coded.factors.stride()
    _decode_kernel[(triton.cdiv(len(out), _ROWS), triton.cdiv(width, _BYTES))](
        pointers(coded), out, first_row, len(out),
        WIDTH=width, PER_BYTE=form.columns_per_byte, ROWS=_ROWS, BYTES=_BYTES, GROUP=coded.group_size,
        HALF=coded.half, KIND=form.kind, MIDDLE=held["MIDDLE"], ZEROS=coded.zeros is not None, SPAN=coded.span,
        MINIMA=coded.minima is not None, STEPS=coded.scales.stride(), FACTOR_STEPS=factor_steps, PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    matrix, out_ptr, first_row, num_rows,
    WIDTH: tl.constexpr, PER_BYTE: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, SPAN: tl.constexpr,
    MINIMA: tl.constexpr, STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    codes_ptr, scales_ptr, zeros_ptr, factors_ptr, minima_ptr, minimum_factors_ptr = matrix
    IN: tl.constexpr = WIDTH * PER_BYTE
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    places = tl.program_id(1) * BYTES + tl.arange(0, BYTES)[None, :]
    mask = (rows < num_rows) & (places < WIDTH)
    columns = places
    if PER_BYTE == 2:
        columns = places // HALF * (2 * HALF) + places % HALF
    held_rows = first_row + rows
    held = tl.load(codes_ptr + held_rows.to(tl.int64) * WIDTH + places, mask=mask, other=0)
    group = columns // GROUP  # of both codes in a byte
    place = held_rows * STEPS[0] + group * STEPS[1]
    scales = tl.load(scales_ptr + place, mask=mask, other=0).to(tl.float32)
    minima = tl.zeros([1, 1], tl.float32)
    zeros = tl.full([1, 1], MIDDLE, tl.uint8)
    if SPAN:
        of_factor = held_rows * FACTOR_STEPS[0] + group // SPAN * FACTOR_STEPS[1]
        scales *= tl.load(factors_ptr + of_factor, mask=mask, other=0.0).to(tl.float32)
    if MINIMA:
        minima = tl.load(minima_ptr + place, mask=mask, other=0).to(tl.float32)
        if SPAN:
            minima *= tl.load(minimum_factors_ptr + of_factor, mask=mask, other=0.0).to(tl.float32)
    if ZEROS:
        zeros = tl.load(zeros_ptr + place, mask=mask, other=0)
    dtype = out_ptr.dtype.element_ty
    out = out_ptr + rows.to(tl.int64) * IN + columns
    if PDL:
        await_previous()  # which may still read what is overwritten
    first = codes.numbers(held & 15 if PER_BYTE == 2 else held, zeros, KIND, tl.float32) * scales + minima
    tl.store(out, first.to(dtype), mask=mask)
    if PER_BYTE == 2:
        second = codes.numbers(held >> 4, zeros, KIND, tl.float32) * scales + minima
        tl.store(out + HALF, second.to(dtype), mask=mask)
