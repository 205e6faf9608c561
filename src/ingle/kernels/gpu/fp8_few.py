"""Products of a few rows of FP8 with FP8 matrices that have a scale for each row: the time is that of reading these.

As `few_rows`: weights come by copies into an SM's memory, from where the tensor cores take them as they are, and where
tiles are few, each tile's inputs are shared out to several programs, whose last to arrive adds up, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Quantized
from ingle.kernels.gpu.device import await_previous, counters, num_sms, pdl, prefetch

MAX_ROWS, MAX_WIDE_ROWS = 16, 64
"""With more, the library multiplies; the second of matrices with so many rows of weights that a program for each 128 of
them is enough for any device. (The library has 48 us for gate and up of Qwen2-7B where this has 44.)"""
_WIDE = 1 << 15
_MIN_ROWS = 16
"""Columns of a tile, which is weights @ rows'."""
_DEPTH = 256
"""Inputs that one iteration takes."""


class Tiling(NamedTuple):
    """How a product is shared out."""

    outs: int
    """Rows of weights that a program has."""
    num_splits: int
    """Programs that share a tile's inputs."""
    depth: int = _DEPTH
    num_stages: int = 4
    """Iterations whose weights are on their way."""
    num_warps: int = 4
    most_rows: int = 128
    """Of inputs, that a program has."""


def suits(num_rows: int, coded: Coded) -> bool:
    most = MAX_WIDE_ROWS if coded.num_rows >= _WIDE else MAX_ROWS
    return num_rows <= most and pdl(coded.codes.device)


def tiling(num_rows: int, size_in: int, size_out: int, num_sms: int) -> Tiling:
    """Three programs for each SM, or as many more as there are tiles, each with ten iterations at least."""
    if num_rows > MAX_ROWS:
        return Tiling(128, 1, depth=128)
    num_tiles = triton.cdiv(size_out, 64)
    num_splits = max(min(3 * num_sms // num_tiles, size_in // (10 * _DEPTH)), 1)
    return Tiling(64, num_splits, num_stages=6 if num_splits == 1 and num_tiles < num_sms else 3)


def multiply(x: Quantized, coded: Coded, bias: torch.Tensor | None, dtype: torch.dtype, *, exact: bool) -> torch.Tensor:
    """x @ matrix.T + bias: [M, O]. `exact`: sums leave the tensor cores for float32 every 128 numbers."""
    values, device = x.values, x.values.device
    (num_rows, size_in), size_out = values.shape, coded.num_rows
    shape = tiling(num_rows, size_in, size_out, num_sms(device))
    rows = max(min(triton.next_power_of_2(num_rows), shape.most_rows), _MIN_ROWS)
    out = torch.empty(num_rows, size_out, dtype=dtype, device=device)
    num_row_tiles, parts = triton.cdiv(num_rows, rows), x.scales
    num_tiles = triton.cdiv(size_out, shape.outs) * num_row_tiles
    if shape.num_splits > 1:
        size = num_tiles * shape.num_splits * shape.outs * rows
        parts = torch.empty(size, dtype=torch.float32, device=device)
    codes, early = coded.codes.view(torch.float8_e4m3fn), pdl(device)
    _fp8_few_kernel[(num_tiles * shape.num_splits,)](
        TensorDescriptor.from_tensor(values, [rows, shape.depth]),
        TensorDescriptor.from_tensor(codes, [shape.outs, shape.depth]),
        coded.codes, x.scales, coded.scales, out if bias is None else bias, out, parts, counters(device),
        num_rows, num_row_tiles, shape.num_splits,
        IN=size_in, OUT=size_out, ROWS=rows, OUTS=shape.outs, DEPTH=shape.depth, EXACT=exact, BIAS=bias is not None,
        PREFETCH=shape.depth, PDL=early, num_warps=shape.num_warps, num_stages=shape.num_stages, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_few_kernel(
    x_desc, codes_desc, codes_ptr, x_scales_ptr, scales_ptr, bias_ptr, out_ptr, parts_ptr, arrived_ptr,
    num_rows, num_row_tiles, num_splits,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    EXACT: tl.constexpr, BIAS: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A tile is [OUTS, ROWS]."""
    tile = tl.program_id(0) // num_splits  # those of the same weights side by side
    split = tl.program_id(0) % num_splits
    first_row, first_out = tile % num_row_tiles * ROWS, tile // num_row_tiles * OUTS
    UNITS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    first_unit, last_unit = UNITS * split // num_splits, UNITS * (split + 1) // num_splits
    outs = first_out + tl.arange(0, OUTS)
    in_outs = outs < OUT
    of_outs = tl.load(scales_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)
    if PDL:
        num_bytes = tl.minimum(IN - first_unit * DEPTH, PREFETCH)
        prefetch(codes_ptr + outs.to(tl.int64) * IN + first_unit * DEPTH, tl.where(in_outs, num_bytes, 0))
        await_previous()
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for unit in range(first_unit, last_unit):
        codes = codes_desc.load([first_out, unit * DEPTH])
        x = x_desc.load([first_row, unit * DEPTH])
        if EXACT:
            total = tl.dot(codes, tl.trans(x), total, max_num_imprecise_acc=128)
        else:
            total = tl.dot(codes, tl.trans(x), total)
    rows = first_row + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    scales = of_outs[:, None] * tl.load(x_scales_ptr + rows, mask=in_rows, other=0.0)[None, :]
    done = True
    if num_splits > 1:
        within = tl.arange(0, OUTS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        place = parts_ptr + tile.to(tl.int64) * num_splits * OUTS * ROWS + within
        tl.store(place + split * OUTS * ROWS, total)
        tl.debug_barrier()  # the whole program's stores come before its arrival
        done = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == num_splits - 1
        if done:
            tl.store(arrived_ptr + tile, 0)
            total = tl.zeros([OUTS, ROWS], tl.float32)
            for index in range(num_splits):
                total += tl.load(place + index * OUTS * ROWS, cache_modifier=".cg")
    if done:
        total *= scales
        if BIAS:
            total += tl.load(bias_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
        out_place = out_ptr + rows.to(tl.int64)[None, :] * OUT + outs[:, None]
        tl.store(out_place, total.to(out_ptr.dtype.element_ty), mask=in_rows[None, :] & in_outs[:, None])
