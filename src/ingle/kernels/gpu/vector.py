"""Products of one or two rows on the CUDA cores, with what stands before and after them in a decoder layer.

So few rows leave the tensor cores nothing to share. Each program multiplies whole rows of weights on its own: it asks
for its first weights before the kernel before it has ended (`pdl`), keeps them in registers, and passes no barrier
before its sums are complete. Programs are small and many; as one ends, the next, of the following kernel at last, asks
for its weights in its place, so that the memory has no pause between kernels.

Weights are of 16 bits, or FP8 with a scale for each row, which sums are multiplied with.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Norm, Rotation
from ingle.kernels.gpu.device import await_previous, has_warpgroups, multiplies_fp8, pdl
from ingle.kernels.gpu.elementwise import activate, rotate_and_store
from ingle.kernels.gpu.inboxes import half_of, inbox_of, sendable
from ingle.kernels.gpu.rotation import load_rotation, store_rotated
from ingle.kernels.group import Peers
from ingle.kernels.options import Activation

MAX_ROWS = 2
FP8_ROWS = 1
"""The same of FP8, where the device converts it; 0 for none. More are no slower on the tensor cores: another row costs
nothing there, while here the instructions that a weight takes are the limit."""
_ALIGNMENT = 8
"""Numbers of 16 bits in the 16 bytes to which a row has to be aligned."""
_FP8_ALIGNMENT = 16
_OUTS, _UNIT = 2, 4096
"""Rows of weights or pairs of them, and weights that one iteration takes, of a program."""
_FEW = 8192
"""Rows of weights up to which all programs run at once."""
_LONG = 4096
"""Inputs above which an iteration takes twice as many."""

_ADD, _ROTATE, _SILU, _GELU = 0, 1, 2, 3
"""What becomes of a product: see `add`, `project_and_store`, `gated`."""


Matrix = torch.Tensor | Coded


class Tiling(NamedTuple):
    """What a program computes."""

    outs: int
    """Rows of weights, or pairs of them: from both halves of a head, or from gate and up."""
    depth: int
    """Inputs that one iteration takes."""
    early: int = 1 << 14
    """Weights asked for before the kernel before has ended: 32 KiB in 16 bits, a quarter of a program's registers."""
    num_warps: int = 4
    ahead: bool = False
    """Whether as many are on their way until the end, in code without a loop."""


@triton.jit
def _vector_kernel(
    x_ptr, norm_ptr, weight_ptr, scales_ptr, bias_ptr, residual_ptr, out_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    eps, v_offset, page_stride, token_stride, head_stride, sent,
    ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, OUTS: tl.constexpr, DEPTH: tl.constexpr,
    EARLY: tl.constexpr, WIDTH: tl.constexpr, EPILOGUE: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, HALF: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SCALED: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr,
    PLACE: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ADD: tl.constexpr = EPILOGUE == 0
    ROTATE: tl.constexpr = EPILOGUE == 1
    LINES: tl.constexpr = OUTS if ADD else 2 * OUTS
    tile = tl.program_id(0)
    lines = tl.arange(0, LINES)
    if ADD:
        outs = tile * OUTS + lines
    elif ROTATE:
        outs = tile * OUTS // HALF * 2 * HALF + tile * OUTS % HALF + lines % OUTS + lines // OUTS * HALF
    else:
        outs = tile * OUTS + lines % OUTS + lines // OUTS * (OUT // 2)
    line_ptr = weight_ptr + outs.to(tl.int64)[:, None] * IN
    in_lines = (outs < OUT)[:, None]
    if RUN and OUT % LINES == 0:
        in_lines = tl.full([1, 1], True, tl.int1)
    early = ()
    for index in tl.static_range(EARLY):
        early += (_weights(line_ptr, in_lines, index * DEPTH, IN, DEPTH, RUN),)
    if SCALED:
        of_outs = tl.load(scales_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32)
    # What sums end in was there before the kernel before this one began.
    bias = tl.load(bias_ptr + outs, mask=outs < OUT, other=0.0).to(tl.float32) if BIAS else 0.0
    ends = ()
    block = tl.arange(0, OUTS)
    for row in tl.static_range(ROWS):
        if RESIDUAL:
            ends += (bias + tl.load(residual_ptr + row * OUT + outs, mask=outs < OUT, other=0.0).to(tl.float32),)
        elif ROTATE:
            own, there = tl.full([1, 1], row, tl.int32), tl.full([1, 1], True, tl.int1)
            ends += (
                load_rotation(own, (tile * OUTS % HALF + block)[:, None], there, cos_sin_ptr, kv_places_ptr, HALF),
            )
        else:
            ends += (bias,)
    if PDL:
        await_previous()
    if RANKS:
        slot = half_of(sent[0]) * sent[1] + PLACE * ROWS * OUT  # behind these are the inboxes
    scales = ()
    sums = ()
    squares = ()
    for row in tl.static_range(ROWS):
        scales += (_scale(x_ptr + row * IN, eps, IN, WIDTH, NORMED and not RUN),)
        sums += (tl.zeros([LINES, DEPTH], tl.float32),)
        squares += (tl.zeros([DEPTH], tl.float32),)
    if AHEAD:
        for index in tl.static_range((IN + DEPTH - 1) // DEPTH):
            if (index + EARLY) * DEPTH < IN:
                early += (_weights(line_ptr, in_lines, (index + EARLY) * DEPTH, IN, DEPTH, RUN),)
            sums, squares = _accumulate(
                sums, squares, early[index], x_ptr, norm_ptr, index * DEPTH, ROWS, IN, DEPTH, NORMED, RUN
            )
    else:
        for index in tl.static_range(EARLY):
            sums, squares = _accumulate(
                sums, squares, early[index], x_ptr, norm_ptr, index * DEPTH, ROWS, IN, DEPTH, NORMED, RUN
            )
        for k in tl.range(EARLY * DEPTH, IN, DEPTH, loop_unroll_factor=2):
            weights = _weights(line_ptr, in_lines, k, IN, DEPTH, RUN)
            sums, squares = _accumulate(sums, squares, weights, x_ptr, norm_ptr, k, ROWS, IN, DEPTH, NORMED, RUN)
    dtype = out_ptr.dtype.element_ty
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], 1) * scales[row]
        if NORMED and RUN:
            total *= tl.rsqrt(tl.sum(squares[row], 0) / IN + eps)
        if SCALED:
            total *= of_outs
        total += ends[row] if RESIDUAL else bias
        if ADD:
            if RANKS:
                bits = sendable(total.to(dtype))
                for place in tl.static_range(RANKS):
                    tl.store(inbox_of(sent, 2 + place, False) + slot + row * OUT + outs, bits, mask=outs < OUT)
            else:
                tl.store(out_ptr + row * OUT + outs, total.to(dtype), mask=outs < OUT)
        else:
            first, other = tl.split(tl.trans(tl.reshape(total, [2, OUTS])))
            if ROTATE:
                store_rotated(
                    first[:, None], other[:, None], tile * OUTS // HALF, tl.full([1, 1], row, tl.int32),
                    (tile * OUTS % HALF + block)[:, None], tl.full([1, 1], True, tl.int1),
                    out_ptr, cos_sin_ptr, x_ptr, x_ptr, kv_ptr, kv_places_ptr,
                    eps, v_offset, page_stride, token_stride, head_stride, kv_ptr,
                    HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0, ends[row],
                )  # fmt: skip
            else:
                place = tile * OUTS + block
                out = activate(first, EPILOGUE == 3) * other
                tl.store(out_ptr + row * (OUT // 2) + place, out.to(dtype), mask=place < OUT // 2)


@triton.jit
def _columns(k, DEPTH: tl.constexpr, RUN: tl.constexpr):
    """The DEPTH columns from `k` on. A thread takes RUN neighbours, of weights as of inputs, which so are where they
    are needed; 0: as many as it loads at once."""
    index = tl.arange(0, DEPTH)
    if RUN:  # which the compiler does not see through
        index = index // RUN * RUN + index % RUN
    return k + index


@triton.jit
def _weights(line_ptr, in_lines, k, IN: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr):
    ks = _columns(k, DEPTH, RUN)[None, :]
    mask = in_lines if RUN and IN % DEPTH == 0 else in_lines & (ks < IN)
    return tl.load(line_ptr + ks, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _scale(x_ptr, eps, IN: tl.constexpr, WIDTH: tl.constexpr, NORMED: tl.constexpr):
    """One over the root mean square of a row."""
    scale = 1.0
    if NORMED:
        ks = tl.arange(0, WIDTH)
        x = tl.load(x_ptr + ks, mask=ks < IN, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 0) / IN + eps)
    return scale


@triton.jit
def _accumulate(
    sums, squares, weights, x_ptr, norm_ptr, k,
    ROWS: tl.constexpr, IN: tl.constexpr, DEPTH: tl.constexpr, NORMED: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Adds weights [LINES, DEPTH] times each row's inputs from `k` on, times those of the norm."""
    ks = _columns(k, DEPTH, RUN)
    if NORMED:
        norm = tl.load(norm_ptr + ks, mask=ks < IN, other=0.0).to(tl.float32)
    wide = weights.to(tl.float32)
    more = ()
    more_squares = ()
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * IN + ks, mask=ks < IN, other=0.0).to(tl.float32)
        more_squares += (squares[row] + x * x if NORMED and RUN else squares[row],)
        if NORMED:
            x *= norm
        more += (sums[row] + wide * x[None, :],)
    return more, more_squares


def suits(x: torch.Tensor, weight: Matrix) -> bool:
    """Whether these kernels may, and should, multiply x [M, K] by such a weight."""
    if not 0 < x.shape[0] <= MAX_ROWS or x.itemsize != 2 or not x.is_contiguous():
        return False
    if isinstance(weight, torch.Tensor):
        return x.dtype == weight.dtype and weight.shape[1] % _ALIGNMENT == 0 and weight.is_contiguous()
    held = (
        (x.shape[0] <= FP8_ROWS or _hopper(x, weight) is not None)
        and weight.kind == "fp8"
        and weight.scales.shape[1] == 1
        and weight.num_columns % _FP8_ALIGNMENT == 0
    )
    return held and multiplies_fp8(x.device) and weight.codes.is_contiguous()


def _hopper(x: torch.Tensor, weight: Matrix) -> ModuleType | None:
    """`few_rows_fp8`, imported where it is used alone: what takes these, or None."""
    if isinstance(weight, torch.Tensor) or weight.kind != "fp8" or not has_warpgroups(x.device):
        return None
    from ingle.kernels.gpu import few_rows_fp8

    return few_rows_fp8 if few_rows_fp8.suits(x, weight) else None


def add(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """residual + x @ weight.T + bias, for x [M, K] and residual [M, E]."""
    out = x.new_empty(len(x), _num_rows(weight))
    _run(x, None, weight, bias, _ADD, out, residual=residual)
    return out


def send(x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, peers: Peers) -> None:
    """Leaves x @ weight.T + bias, for x [M, K], with all ranks: what comes next is in `sums.multiply_add_rms_norm`."""
    _run(x, None, weight, bias, _ADD, x, peers=peers)


def gated(
    x: torch.Tensor, norm: Norm | None, weight: Matrix, bias: torch.Tensor | None, activation: Activation
) -> torch.Tensor:
    """activation(gate) * up for x [M, E], or its norm, times weight [2 * I, E], the gate in the first half: [M, I]."""
    out = x.new_empty(len(x), _num_rows(weight) // 2)
    _run(x, norm, weight, bias, _GELU if activation == "gelu_tanh" else _SILU, out)
    return out


def project_and_store(
    x: torch.Tensor, norm: Norm | None, weight: Matrix, bias: torch.Tensor | None, rotation: Rotation
) -> torch.Tensor:
    """The queries [M, Hq, D] of x, or its norm, rotated; keys and values, of weight's later rows, go to the cache."""
    if rotation.q_norm is not None or rotation.kv_scales is not None:  # of whole heads, which no program has
        qkv = x.new_empty(len(x), _num_rows(weight))
        _run(x, norm, weight, bias, _ADD, qkv)
        return rotate_and_store(qkv, *rotation)
    q = x.new_empty(len(x), rotation.num_heads, rotation.kv_cache.shape[-1])
    _run(x, norm, weight, bias, _ROTATE, q, rotation=rotation)
    return q


def _num_rows(weight: Matrix) -> int:
    return len(weight) if isinstance(weight, torch.Tensor) else weight.num_rows


def tiling(size_in: int, *, paired: bool) -> Tiling:
    """Larger iterations where a row has many inputs: fewer of them, which run ahead of each other."""
    num_weights = _UNIT if size_in <= _LONG else 2 * _UNIT
    return Tiling(_OUTS, min(triton.next_power_of_2(size_in), num_weights // (_OUTS * (1 + paired))))


def sent_tiling(size_in: int) -> Tiling:
    """Of a share of a matrix' columns: programs that have asked for all of their weights before they wait, and more
    rows of few inputs, so that all programs run at once. The kernels between two sums are short, and all wait while a
    rank's last program does."""
    outs = 2 * _OUTS if size_in <= _UNIT // _OUTS else _OUTS
    return Tiling(outs, min(triton.next_power_of_2(size_in), _UNIT // outs), early=5 << 12)


def fp8_tiling(size_in: int, size_out: int, *, paired: bool) -> Tiling:
    """Programs that have asked for all of their weights before they wait; of long rows, for some all the time. Of few
    rows of weights each has more of them, so that all programs run at once."""
    depth = min(triton.next_power_of_2(size_in), 512)
    if paired:
        return Tiling(4, depth) if size_out <= _FEW else Tiling(2, depth, num_warps=2)
    if size_in > _LONG:
        return Tiling(4, min(triton.next_power_of_2(size_in), 1024), ahead=True)
    return Tiling(4, depth, num_warps=2)


def _run(
    x: torch.Tensor,
    norm: Norm | None,
    weight: Matrix,
    bias: torch.Tensor | None,
    epilogue: int,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    rotation: Rotation | None = None,
    peers: Peers | None = None,
) -> None:
    hopper = _hopper(x, weight)
    if hopper is not None and peers is None:
        hopper.run(x, norm, weight, bias, epilogue, out, residual=residual, rotation=rotation)
        return
    if isinstance(weight, torch.Tensor):
        numbers, scales = weight, x
    else:
        numbers, scales = weight.codes.view(torch.float8_e4m3fn), weight.scales
    size_out, size_in = numbers.shape
    scaled = numbers is not weight
    paired, early = epilogue != _ADD, pdl(x.device)
    if scaled:
        shape = fp8_tiling(size_in, size_out, paired=paired)
    else:
        shape = tiling(size_in, paired=paired) if peers is None else sent_tiling(size_in)
    outs, depth, most_early, num_warps, ahead = shape
    num_early = max(most_early // (outs * (1 + paired) * depth), 1)
    places = (x, x, x) if rotation is None else (rotation.cos_sin, rotation.kv_cache, rotation.kv_places)
    _vector_kernel[(triton.cdiv(size_out, outs * (1 + paired)),)](
        x, x if norm is None else norm.weight, numbers, scales, x if bias is None else bias,
        x if residual is None else residual, out, *places,
        0.0 if norm is None else norm.eps, *((0, 0, 0, 0) if rotation is None else rotation.kv_cache.stride()[:4]),
        1 if peers is None else (peers.state, peers.half_bytes // x.itemsize, *peers.inboxes),
        ROWS=len(x), IN=size_in, OUT=size_out, OUTS=outs, DEPTH=depth,
        EARLY=min(num_early, triton.cdiv(size_in, depth)), WIDTH=triton.next_power_of_2(size_in),
        EPILOGUE=epilogue, NORMED=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        HALF=1 if rotation is None else rotation.kv_cache.shape[-1] // 2,
        NUM_HEADS=0 if rotation is None else rotation.num_heads,
        NUM_KV_HEADS=0 if rotation is None else rotation.kv_cache.shape[3],
        PAGE_SIZE=0 if rotation is None else rotation.kv_cache.shape[2],
        PLACE=0 if peers is None else peers.place, RANKS=0 if peers is None else len(peers.inboxes),
        SCALED=scaled, RUN=min(depth // (32 * num_warps), 8) if scaled else 0,
        AHEAD=ahead,
        PDL=early, num_warps=num_warps, launch_pdl=early,
    )  # fmt: skip
