"""Products with matrices of codes for any number of rows, by the kernels that suit them.

Here a tile is decoded on its way to the tensor cores. Where tiles are few, each tile's inputs are shared out to several
programs; the last of them to arrive adds up what the others left, in order (`few_rows` does the same, and takes what
stands around a product into it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels import reference_coded
from ingle.kernels.coded import Coded
from ingle.kernels.gpu import coded_vector, decoded, few_rows_coded, fp8, planes, vector
from ingle.kernels.gpu.codes import FORMATS, add_tile, columns_at_once, constants, pointers, suits
from ingle.kernels.gpu.device import await_previous, barrier, counters, has_warpgroups, num_sms, pdl, shared_memory

_LEAST_DECODED = 65
"""Rows from which the library's product of decoded weights is faster than one that decodes on its way."""
_MOST_BY_TWOS = 8
"""Rows of what `lanes` does not read, such as Q6_K, for which reading the matrix for each two beats `planes`."""
_MAX_SPLIT_ROWS = 64
"""With more, tiles are as many as a device has programs at once."""
_MUCH_MEMORY = 128 << 10
"""Of an SM, shared by its programs: what A100 and Hopper have, and cards for desktops do not."""


class Tiling(NamedTuple):
    rows: int
    outs: int
    num_bytes: int
    """Of a row of weights, that an iteration takes."""
    num_warps: int
    num_stages: int
    num_splits: int


def multiply_coded(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """As `ingle.kernels.reference_coded.multiply_coded`."""
    flat = coded.ordered(x.reshape(-1, x.shape[-1]))
    if coded_vector.fits(flat, coded):
        return coded_vector.multiply(flat, coded, bias).view(*x.shape[:-1], coded.num_rows)
    if vector.suits(flat, coded):
        return vector.add(flat, coded, bias, None).view(*x.shape[:-1], coded.num_rows)
    if x.dtype == torch.float32 or not (planes.suits(coded) if coded.in_planes else suits(coded)):
        return reference_coded.multiply_coded(x, coded, bias)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    return _multiply(flat, coded, bias).view(*x.shape[:-1], coded.num_rows)


def _multiply(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, I], its columns as the matrix has them."""
    if fp8.suits(x, coded):
        return fp8.multiply(x, coded, bias)
    if few_rows_coded.fits(x, coded):
        return few_rows_coded.multiply(x, coded, bias)
    if has_warpgroups(x.device):
        from ingle.kernels.gpu import warpgroups  # Gluon takes a while to import

        otherwise = decoded.multiply if decoded.suits(coded) else _multiply_anywhere
        if warpgroups.is_fastest(x, coded) and warpgroups.is_right(x, coded, otherwise):
            return warpgroups.multiply(x, coded, bias)
    return _multiply_anywhere(x, coded, bias)


def _multiply_anywhere(x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """As `_multiply`, with more rows than few, on any GPU."""
    if coded.in_planes:
        if len(x) <= _MOST_BY_TWOS and x.is_contiguous() and coded_vector.fits(x[: coded_vector.MAX_ROWS], coded):
            return coded_vector.multiply_by_twos(x, coded, bias)
        multiply = decoded.multiply if len(x) >= planes.LEAST_DECODED else planes.multiply
        return multiply(x, coded, bias)
    if len(x) >= _LEAST_DECODED and decoded.suits(coded):
        return decoded.multiply(x, coded, bias)
    return multiply_by(tiling(len(x), coded, num_sms(x.device), shared_memory(x.device)), x, coded, bias)


def tiling(num_rows: int, coded: Coded, num_sms: int, shared_memory: int) -> Tiling:
    """An iteration takes 128 columns, or 64: of one group where groups are that large. Of 64 rows and codes of a byte
    four stages take 112 KiB, which not every card has."""
    per_byte = FORMATS[coded.kind].columns_per_byte
    if num_rows > _MAX_SPLIT_ROWS:
        rows = 128 if num_rows > 96 else 64
        return Tiling(rows, 128, 64 // per_byte, 8, 3, 1)
    rows = max(triton.next_power_of_2(num_rows), 16)
    num_bytes = columns_at_once(coded) // per_byte
    num_tiles = triton.cdiv(coded.num_rows, 64)
    num_units = triton.cdiv(coded.codes.shape[1], num_bytes)
    num_splits = max(min(2 * num_sms // num_tiles, num_units // 4), 1)
    return Tiling(rows, 64, num_bytes, 4, 4 if shared_memory >= _MUCH_MEMORY else 3, num_splits)


def multiply_by(shape: Tiling, x: torch.Tensor, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, I], its columns as the matrix has them, to [M, O]."""
    num_rows, size_out = len(x), coded.num_rows
    out = torch.empty(num_rows, size_out, dtype=x.dtype, device=x.device)
    num_tiles, num_row_tiles = triton.cdiv(size_out, shape.outs), triton.cdiv(num_rows, shape.rows)
    parts = x
    if shape.num_splits > 1:
        size = num_row_tiles * num_tiles * shape.num_splits * shape.outs * shape.rows
        parts = torch.empty(size, dtype=torch.float32, device=x.device)
    early = pdl(x.device)
    _coded_kernel[(num_row_tiles * shape.num_splits, num_tiles)](
        x, pointers(coded), x if bias is None else bias, out, parts, counters(x.device),
        num_rows, x.stride(0), shape.num_splits,
        IN=coded.num_columns, OUT=size_out, ROWS=shape.rows, OUTS=shape.outs, BYTES=shape.num_bytes,
        **constants(coded), BIAS=bias is not None, SPLIT=shape.num_splits > 1, PDL=early,
        COMPILED=x.is_cuda, num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit
def _coded_kernel(
    x_ptr, matrix, bias_ptr, out_ptr, parts_ptr, arrived_ptr, num_rows, x_stride, num_splits,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, BYTES: tl.constexpr,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, CODE_HALF: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr,
    ZEROS: tl.constexpr, SPAN: tl.constexpr, MINIMA: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    split = tl.program_id(0) % num_splits
    row_tile = tl.program_id(0) // num_splits
    tile = row_tile * tl.num_programs(1) + tl.program_id(1)
    rows, outs = row_tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    in_rows, in_outs = rows < num_rows, outs < OUT
    UNITS: tl.constexpr = ((IN // 2 if KIND == 0 else IN) + BYTES - 1) // BYTES
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for unit in range(UNITS * split // num_splits, UNITS * (split + 1) // num_splits):
        total = add_tile(
            total, x_ptr, rows.to(tl.int64) * x_stride, in_rows, matrix, outs, in_outs, unit * BYTES,
            IN, GROUPS, BYTES, GROUP, CODE_HALF, KIND, MIDDLE, ZEROS, SPAN, MINIMA,
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
