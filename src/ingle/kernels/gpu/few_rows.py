"""Matrix products of a few rows, with what stands before and after them in a decoder layer: norm, rotation, activation.

With few rows a product's time is that of reading its weights, and then of the short kernels around it. So those are
part of it here, and the weights, floats or codes, are read by programs that all run at once: their rows are divided
into tiles, and where these are few, each tile's inputs into splits; a tile's last program to arrive adds up its splits,
in order. A kernel starts while the one before it ends (`pdl`), and asks for its first weights meanwhile.

A norm between two products needs no kernel of its own, for norm(h) @ W' is (h * g) @ W' / rms(h): the product that
makes h also writes h * g and the sum of its squares, by tile; the product that takes it divides at its end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Norm, Rotation
from ingle.kernels.gpu import codes, kv_codes
from ingle.kernels.gpu.codes import FORMATS, NO_CODES, add_tile, constants, pointers
from ingle.kernels.gpu.device import await_previous, counters, num_sms, pdl, prefetch
from ingle.kernels.gpu.elementwise import activate, rms_norm
from ingle.kernels.gpu.kv_codes import words
from ingle.kernels.gpu.rotation import store_rotated
from ingle.kernels.options import Activation

MAX_ROWS = 16
"""With more, PyTorch's products and the kernels around them are as fast."""
_ALIGNMENT = 8
"""Numbers of 16 bits in the 16 bytes to which a row of weights has to be aligned."""
_MIN_ROWS = 16
"""Columns that the tensor cores need at least: a product is weights @ rows'."""
_OUTS = 64
"""Weight rows that the tensor cores take at once."""
_UNIT = 8192
"""Weights of a block that one iteration takes."""
_MAX_DEPTH = 256
"""Inputs that one copy into an SM's memory takes at most."""

_CODED_ALIGNMENT = 16
"""Bytes to which a row of codes has to be aligned."""
Matrix = torch.Tensor | Coded

_ADD, _ROTATE, _SILU, _GELU = 0, 1, 2, 3
"""What becomes of a product: see `add`, `project_and_store`, `gated`."""


@triton.jit
def _few_rows_kernel(
    x_desc, weight_desc, x_ptr, weight_ptr, matrix, bias_ptr, squares_in_ptr, residual_ptr, norm_ptr, out_ptr,
    values_ptr, squares_ptr, parts_ptr, arrived_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, kv_ptr, kv_places_ptr,
    num_rows, num_splits, num_squares, eps, qk_eps, v_offset, page_stride, token_stride, head_stride, scales,
    IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    EPILOGUE: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr, HALF: tl.constexpr, QK_NORM: tl.constexpr,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KV_KIND: tl.constexpr,
    SQUARES: tl.constexpr,
    PREFETCH: tl.constexpr, PDL: tl.constexpr, CODED: tl.constexpr, KIND: tl.constexpr, GROUPS: tl.constexpr,
    GROUP: tl.constexpr, CODE_HALF: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, SPAN: tl.constexpr,
    MINIMA: tl.constexpr,
):  # fmt: skip
    """A tile is a block of OUTS weight rows, or two: from both halves of a head, or from gate and up.

    Of codes DEPTH and PREFETCH are bytes of a row.
    """
    ADD: tl.constexpr = EPILOGUE == 0
    ROTATE: tl.constexpr = EPILOGUE == 1
    tile = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    WIDTH: tl.constexpr = IN // 2 if CODED and KIND == 0 else IN
    UNITS: tl.constexpr = (WIDTH + DEPTH - 1) // DEPTH
    PER_TILE: tl.constexpr = OUTS if ADD else 2 * OUTS
    LIMIT: tl.constexpr = OUT if ADD or ROTATE else OUT // 2
    first_unit, last_unit = UNITS * split // num_splits, UNITS * (split + 1) // num_splits
    first_out = tile * OUTS
    other_out = first_out + OUT // 2
    if ROTATE:
        first_out = tile * OUTS // HALF * 2 * HALF + tile * OUTS % HALF
        other_out = first_out + HALF
    rows = tl.arange(0, ROWS)[None, :]
    block = tl.arange(0, OUTS)[:, None]
    if PDL:
        lines = tl.arange(0, PER_TILE)
        outs = tl.where(lines < OUTS, first_out + lines, other_out + lines - OUTS)
        begin = first_unit * DEPTH
        num_bytes = tl.minimum(tl.minimum(last_unit * DEPTH, WIDTH) - begin, PREFETCH) * (1 if CODED else 2)
        prefetch(weight_ptr + outs.to(tl.int64) * WIDTH + begin, tl.where(outs < OUT, num_bytes, 0))
        await_previous()
    first = tl.zeros([OUTS, ROWS], tl.float32)
    other = tl.zeros([OUTS, ROWS], tl.float32)
    for unit in range(first_unit, last_unit):
        k = unit * DEPTH
        if CODED:
            x_rows, tile_outs = tl.arange(0, ROWS), tl.arange(0, OUTS)
            in_rows, first_outs, other_outs = x_rows < num_rows, first_out + tile_outs, other_out + tile_outs
            first = add_tile(
                first, x_ptr, x_rows * IN, in_rows, matrix, first_outs, first_outs < OUT, k,
                IN, GROUPS, DEPTH, GROUP, CODE_HALF, KIND, MIDDLE, ZEROS, SPAN, MINIMA,
            )  # fmt: skip
            if not ADD:
                other = add_tile(
                    other, x_ptr, x_rows * IN, in_rows, matrix, other_outs, other_outs < OUT, k,
                    IN, GROUPS, DEPTH, GROUP, CODE_HALF, KIND, MIDDLE, ZEROS, SPAN, MINIMA,
                )  # fmt: skip
        else:
            x = x_desc.load([0, k])
            a = weight_desc.load([first_out, k])
            first = tl.dot(a, tl.trans(x), first)
            if not ADD:
                b = weight_desc.load([other_out, k])
                other = tl.dot(b, tl.trans(x), other)
    # What the end needs is asked for before the programs of a tile wait for each other.
    mask = (first_out + block < LIMIT) & (rows < num_rows)
    scale = tl.full([1, ROWS], 1.0, tl.float32)
    if NORMED:
        scale = _scale(squares_in_ptr, num_rows, num_squares, eps, IN, ROWS, SQUARES)[None, :]
    done = True
    if num_splits > 1:
        within = block * ROWS + rows
        place = parts_ptr + (tile * num_splits + split) * PER_TILE * ROWS + within
        tl.store(place, first)
        if not ADD:
            tl.store(place + OUTS * ROWS, other)
        tl.debug_barrier()  # the whole program's stores come before its arrival
        done = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == num_splits - 1
        if done:
            tl.store(arrived_ptr + tile, 0)
            first = tl.zeros([OUTS, ROWS], tl.float32)
            other = tl.zeros([OUTS, ROWS], tl.float32)
            for index in range(num_splits):
                place = parts_ptr + (tile * num_splits + index) * PER_TILE * ROWS + within
                first += tl.load(place, cache_modifier=".cg")
                if not ADD:
                    other += tl.load(place + OUTS * ROWS, cache_modifier=".cg")
    if done:
        first *= scale
        other *= scale
        if BIAS:
            first += tl.load(bias_ptr + first_out + block, mask=first_out + block < LIMIT, other=0.0).to(tl.float32)
            if not ADD:
                other += tl.load(bias_ptr + other_out + block, mask=other_out + block < OUT, other=0.0).to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        if ROTATE:
            store_rotated(
                first, other, tile * OUTS // HALF, rows, tile * OUTS % HALF + block, rows < num_rows,
                out_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, kv_ptr, kv_places_ptr,
                qk_eps, v_offset, page_stride, token_stride, head_stride, scales,
                HALF, QK_NORM, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, KV_KIND,
            )  # fmt: skip
        elif ADD:
            place = rows * OUT + first_out + block
            # Rounded as it is stored: the norm is that of what the next layers read.
            total = (first + tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
            wide = tl.where(mask, total.to(tl.float32), 0.0)
            weight = tl.load(norm_ptr + first_out + block, mask=first_out + block < OUT, other=0.0).to(tl.float32)
            tl.store(out_ptr + place, total, mask=mask)
            tl.store(values_ptr + place, (wide * weight).to(dtype), mask=mask)
            row = tl.arange(0, ROWS)
            place = squares_ptr + row * ((OUT + OUTS - 1) // OUTS) + tile
            tl.store(place, tl.sum(wide * wide, 0), mask=row < num_rows)
        else:
            out = activate(first, EPILOGUE == 3) * other
            tl.store(out_ptr + rows * LIMIT + first_out + block, out.to(dtype), mask=mask)


@triton.jit
def _scale(squares_ptr, num_rows, num_squares, eps, IN: tl.constexpr, ROWS: tl.constexpr, SQUARES: tl.constexpr):
    """One over the root mean square of each row that comes in, whose squares' sums come in pieces."""
    row = tl.arange(0, ROWS)[:, None]
    piece = tl.arange(0, SQUARES)[None, :]
    mask = (row < num_rows) & (piece < num_squares)
    total = tl.sum(tl.load(squares_ptr + row * num_squares + piece, mask=mask, other=0.0), 1)
    return tl.rsqrt(total / IN + eps)


class Tiling(NamedTuple):
    """How a product is shared out."""

    outs: int
    """Weight rows in a block."""
    num_splits: int
    """Programs that share a tile's inputs."""
    depth: int
    """Inputs that one iteration takes."""
    num_stages: int
    """Iterations whose weights are on their way."""
    prefetch: int
    """Inputs asked for before the kernel before has ended."""


def tiling(size_in: int, size_out: int, outs: int, *, paired: bool, num_sms: int) -> Tiling:
    """One program for each SM, or as many more as there are tiles of one or two blocks of `outs` rows."""
    depth = min(_UNIT // outs, _MAX_DEPTH)
    num_tiles = triton.cdiv(size_out, outs * (1 + paired))
    num_splits = min(max(num_sms // num_tiles, 1), triton.cdiv(size_in, depth))
    # Keys and values are wanted at once: the kernel after that of the projections starts beside it in what it leaves.
    num_stages = 3 if paired and num_splits > 1 else 4 if paired and outs < _OUTS else 5
    return Tiling(outs, num_splits, depth, num_stages, prefetch=256)


def coded_tiling(coded: Coded, outs: int, *, paired: bool, num_sms: int) -> Tiling:
    """Two programs for each SM, for fewer bytes are on their way in one."""
    depth = codes.columns_at_once(coded) // FORMATS[coded.kind].columns_per_byte
    num_tiles = triton.cdiv(coded.num_rows, outs * (1 + paired))
    num_splits = min(max(2 * num_sms // num_tiles, 1), triton.cdiv(coded.codes.shape[1], depth))
    return Tiling(outs, num_splits, depth, 4, prefetch=256)


def _tiling(weight: Matrix, outs: int, *, paired: bool, num_sms: int) -> Tiling:
    if isinstance(weight, Coded):
        return coded_tiling(weight, outs, paired=paired, num_sms=num_sms)
    return tiling(weight.shape[1], len(weight), outs, paired=paired, num_sms=num_sms)


def _outs(size_out: int, num_sms: int, *, paired: bool) -> int:
    """Half the rows where full tiles would be few."""
    num_tiles = triton.cdiv(size_out, _OUTS * (1 + paired))
    return _OUTS if 5 * num_tiles >= 2 * num_sms else _OUTS // 2


def suits(x: torch.Tensor, weight: Matrix) -> bool:
    """Whether these kernels may, and should, multiply x [M, K] by such a weight."""
    # Not float16: a row times the norm's weight, before the division by its length, may be too large for it.
    if not 0 < x.shape[0] <= MAX_ROWS or x.dtype != torch.bfloat16 or not pdl(x.device) or not x.is_contiguous():
        return False
    if isinstance(weight, Coded):
        if weight.in_planes:
            return False
        return weight.order is None and weight.codes.shape[1] % _CODED_ALIGNMENT == 0 and codes.suits(weight)
    return weight.dtype == x.dtype and weight.shape[1] % _ALIGNMENT == 0 and weight.is_contiguous()


def add(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor, norm: Norm) -> Flow:
    """residual + x @ weight.T + bias, for x [M, K] and residual [M, E], on its way to the norm: values and squares."""
    num_rows, size_out = residual.shape
    out, values = torch.empty_like(residual), torch.empty_like(residual)
    sms = num_sms(x.device)
    outs = _outs(size_out, sms, paired=False)
    shape = _tiling(weight, outs, paired=False, num_sms=sms)
    squares = torch.empty(num_rows, triton.cdiv(size_out, shape.outs), dtype=torch.float32, device=x.device)
    _run(x, weight, bias, None, _ADD, out, shape, residual=residual, norm=norm, values=values, squares=squares)
    return Flow(out, norm, values, squares)


def gated(flow: Flow, weight: Matrix, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """activation(gate) * up of the normed rows' product with weight [2 * I, E], the gate in the first half: [M, I]."""
    x = _values(flow)
    size_out = _num_rows(weight)
    out = x.new_empty(len(x), size_out // 2)
    epilogue = _GELU if activation == "gelu_tanh" else _SILU
    sms = num_sms(out.device)
    shape = _tiling(weight, _outs(size_out, sms, paired=True), paired=True, num_sms=sms)
    _run(x, weight, bias, flow.squares, epilogue, out, shape, norm=flow.norm)
    return out


def project_and_store(flow: Flow, weight: Matrix, bias: torch.Tensor | None, rotation: Rotation) -> torch.Tensor:
    """The queries [M, Hq, D] of the normed rows, rotated; keys and values, of weight's later rows, go to the cache."""
    x = _values(flow)
    head_dim = rotation.kv_cache.shape[-1]
    q = x.new_empty(len(x), rotation.num_heads, head_dim)
    of_whole_heads = rotation.q_norm is not None or rotation.kv_scales is not None  # norms and scales are
    outs = head_dim // 2 if of_whole_heads else min(head_dim // 2, _OUTS)
    shape = _tiling(weight, outs, paired=True, num_sms=num_sms(q.device))
    _run(x, weight, bias, flow.squares, _ROTATE, q, shape, norm=flow.norm, rotation=rotation)
    return q


def _num_rows(weight: Matrix) -> int:
    return weight.num_rows if isinstance(weight, Coded) else len(weight)


def _values(flow: Flow) -> torch.Tensor:
    """A first flow has none: nothing has been added to it."""
    return rms_norm(flow.residual, flow.norm.weight, flow.norm.eps) if flow.values is None else flow.values


def _run(
    x: torch.Tensor,
    weight: Matrix,
    bias: torch.Tensor | None,
    squares_in: torch.Tensor | None,
    epilogue: int,
    out: torch.Tensor,
    shape: Tiling,
    *,
    norm: Norm,
    residual: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> None:
    device, (num_rows, size_in), size_out = x.device, x.shape, _num_rows(weight)
    rows = max(triton.next_power_of_2(num_rows), _MIN_ROWS)
    outs, num_splits, depth, num_stages, prefetch = shape
    per_tile = outs if epilogue == _ADD else 2 * outs
    num_tiles = triton.cdiv(size_out, per_tile)
    parts = x if num_splits == 1 else x.new_empty(num_tiles * num_splits * per_tile * rows, dtype=torch.float32)
    early, num_squares = pdl(device), 1 if squares_in is None else squares_in.shape[1]
    places = (x, x, x, x, x) if rotation is None else (
        rotation.cos_sin, _or(rotation.q_norm, x), _or(rotation.k_norm, x),
        words(rotation.kv_cache, rotation.kv_scales), rotation.kv_places,
    )  # fmt: skip
    if isinstance(weight, Coded):
        codes_or_floats, matrix, consts = weight.codes, pointers(weight), constants(weight)
        described = [TensorDescriptor.from_tensor(x, [rows, _ALIGNMENT])] * 2  # which are not used
    else:
        codes_or_floats, matrix, consts = weight, (x,) * 6, NO_CODES
        described = [
            TensorDescriptor.from_tensor(x, [rows, depth]),
            TensorDescriptor.from_tensor(weight, [outs, depth]),
        ]
    _few_rows_kernel[(num_tiles * num_splits,)](
        *described, x, codes_or_floats, matrix, _or(bias, x), _or(squares_in, x), _or(residual, x), norm.weight,
        out, _or(values, x), _or(squares, x), parts, counters(device), *places,
        num_rows, num_splits, num_squares, norm.eps, 0.0 if rotation is None else rotation.eps,
        *((0, 0, 0, 0) if rotation is None else places[3].stride()[:4]),
        kv_codes.scales(None if rotation is None else rotation.kv_scales, x),
        IN=size_in, OUT=size_out, ROWS=rows, OUTS=outs, DEPTH=depth, EPILOGUE=epilogue,
        NORMED=squares_in is not None, BIAS=bias is not None,
        HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2,
        QK_NORM=rotation is not None and rotation.q_norm is not None,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        KV_KIND=0 if rotation is None else kv_codes.kind_of(rotation.kv_cache, rotation.kv_scales),
        SQUARES=triton.next_power_of_2(num_squares), PREFETCH=prefetch, PDL=early,
        CODED=isinstance(weight, Coded), **consts,
        num_warps=4, num_stages=num_stages, launch_pdl=early,
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
