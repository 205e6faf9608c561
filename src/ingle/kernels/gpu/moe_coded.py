"""A mixture of experts whose matrices are codes in planes: sorted rows as in `moe`, tiles of weights as in `planes`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.flow import ExpertBiases
from ingle.kernels.gpu import moe_coded_vector, planes
from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.elementwise import gated
from ingle.kernels.gpu.moe import block_and_column, is_sorted, rows_of, sort_by_expert, sum_pairs
from ingle.kernels.options import Activation

_GROUP = 8
"""Blocks of rows whose programs stand side by side, so that an expert's weights are still in the L2 cache."""


@dataclass(frozen=True, slots=True)
class _Tiles:
    up_to: float
    """The most rows an expert may have on average, were all chosen alike, for these tiles to be taken."""
    rows: int
    outs: int
    blocks: int
    """Of 32 columns."""
    warps: int
    stages: int


_TILES = (
    _Tiles(10, 16, 32, 4, 4, 4),
    _Tiles(24, 32, 32, 4, 4, 4),
    _Tiles(128, 64, 64, 4, 4, 3),
    _Tiles(math.inf, 128, 64, 4, 8, 3),
)
_E2M1_TILES = (
    _Tiles(10, 16, 64, 4, 4, 3),
    _Tiles(24, 32, 64, 4, 4, 4),
    _Tiles(128, 64, 64, 4, 4, 3),
    _Tiles(math.inf, 128, 128, 2, 8, 4),
)
"""With fewer rows of weights to a warp, warps of Hopper decode the same numbers side by side."""
_FLOAT32_TILES = (_Tiles(math.inf, 16, 32, 2, 4, 2),)
"""float32 is for measuring parity, not for speed."""


def experts_coded(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: Sequence[Coded],
    down: Coded,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """As `ingle.kernels.reference.experts_coded`."""
    if not all(planes.suits(each) for each in (*gate_up, down)):
        return reference.experts_coded(x, expert_ids, weights, gate_up, down, activation, biases)
    (num_tokens, hidden), top_k = x.shape, expert_ids.shape[1]
    num_experts, num_pairs = down.num_rows // hidden, num_tokens * top_k
    choices = _E2M1_TILES if all(each.is_e2m1 for each in (*gate_up, down)) else _TILES
    choices = _FLOAT32_TILES if x.dtype == torch.float32 else choices
    tiles = next(each for each in choices if num_pairs / num_experts <= each.up_to)
    by_expert = is_sorted(num_pairs, num_experts, num_tokens)
    order = blocks = expert_ids
    if not by_expert and len(gate_up) == 1 and all(moe_coded_vector.suits(x, each) for each in (*gate_up, down)):
        both, last = (None, None) if biases is None else biases
        activated = moe_coded_vector.gated(x, expert_ids, num_experts, gate_up[0], both, activation)
        return sum_pairs(moe_coded_vector.down(activated, expert_ids, num_experts, down, last, weights), top_k)
    if by_expert:
        order, blocks = sort_by_expert(expert_ids, num_experts, tiles.rows)
    num_blocks, early = len(blocks) if by_expert else num_pairs, pdl(x.device)

    def multiply(
        given: torch.Tensor, coded: Coded, bias: torch.Tensor | None, out: torch.Tensor, *, is_last: bool
    ) -> None:
        size_out = coded.num_rows // num_experts
        num_columns = triton.cdiv(size_out, tiles.outs)
        _experts_kernel[(num_blocks * num_columns,)](
            given, order, blocks, planes.pointers(coded), coded.codes if coded.order is None else coded.order, weights,
            bias, out, num_blocks, num_columns, given.stride(0), out.stride(0), num_experts,
            None if bias is None else bias.stride(0),
            TOP_K=top_k, IN=coded.num_columns, OUT=size_out, ROWS=tiles.rows, OUTS=tiles.outs,
            BLOCKS=tiles.blocks, PROGRAMS=_GROUP, SORTED=by_expert, LAST=is_last, ORDERED=coded.order is not None,
            **planes.constants(coded), PDL=early, num_warps=tiles.warps, num_stages=tiles.stages, launch_pdl=early,
        )  # fmt: skip

    inner = sum(each.num_rows for each in gate_up) // num_experts
    both, first = x.new_empty(num_pairs, inner), 0
    for each in gate_up:
        last = first + each.num_rows // num_experts
        bias = None if biases is None else biases.gate_up[:, first:last]
        multiply(x, each, bias, both[:, first:last], is_last=False)
        first = last
    by_pair = x.new_empty(num_pairs, hidden)
    multiply(gated(both, activation), down, None if biases is None else biases.down, by_pair, is_last=True)
    return sum_pairs(by_pair, top_k)


@triton.jit
def _experts_kernel(
    x_ptr, order_ptr, blocks_ptr, matrix, columns_ptr, scales_ptr, bias_ptr, out_ptr, num_blocks, num_columns,
    x_stride, out_stride, num_experts, bias_stride,
    TOP_K: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr, BLOCKS: tl.constexpr, PROGRAMS: tl.constexpr, SORTED: tl.constexpr, LAST: tl.constexpr,
    ORDERED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    SPAN: tl.constexpr, MIDDLE: tl.constexpr, ZEROS: tl.constexpr, MINIMA: tl.constexpr, STEP: tl.constexpr,
    FACTOR_STEP: tl.constexpr, SHARED: tl.constexpr,
    TABLE: tl.constexpr, FLOAT8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x times an expert's rows of the matrix, and its bias if there is one, for one block of rows and OUTS columns, in
    sorted order; of the LAST product times the routing weight, to the place of its pair."""
    if PDL:
        await_previous()
    block, column = block_and_column(num_blocks, num_columns, PROGRAMS)
    expert, rows, is_row, pairs = rows_of(blocks_ptr, order_ptr, block, ROWS, SORTED)
    if expert >= num_experts:
        return
    outs = column * OUTS + tl.arange(0, OUTS)
    in_outs = outs < OUT
    x_rows = (rows if LAST else pairs // TOP_K).to(tl.int64) * x_stride
    total = tl.zeros([OUTS, ROWS], tl.float32)
    for first in range(0, IN // 32, BLOCKS):
        total = planes.add_tile(
            total, x_ptr, x_rows, is_row, matrix, expert * OUT + outs, in_outs, first, columns_ptr + expert * IN,
            BLOCKS, ORDERED, IN, LOW, HIGH, GROUP, GROUPS, SPAN, MIDDLE, ZEROS, MINIMA, STEP, FACTOR_STEP, SHARED,
            TABLE, FLOAT8,
        )  # fmt: skip
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * bias_stride + outs, mask=in_outs, other=0.0)
        total += bias.to(tl.float32)[:, None]
    if LAST:
        total *= tl.load(scales_ptr + pairs, mask=is_row, other=0.0)[None, :]
    to_rows = (pairs if LAST else rows).to(tl.int64) * out_stride
    place = out_ptr + to_rows[None, :] + outs[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=is_row[None, :] & in_outs[:, None])
