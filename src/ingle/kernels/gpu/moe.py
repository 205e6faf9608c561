"""A mixture of experts as Triton kernels: choose, sort tokens by expert, two grouped matrix products, sum.

Nothing here waits for the host, and every size follows from the number of tokens, so that a graph can capture it. A
"pair" is one token at one of its K experts: pair t * K + j. Pairs are sorted by expert, each expert's pairs are cut
into blocks of rows, and a block times a few columns is one program: it reads its tokens by way of the sorted order and
its expert's weights where they lie. With few tokens that is each chosen expert's weights once, and with so few that
they hardly share an expert, pairs are left unsorted; with many it is a tiled product.

Why not `torch.nn.functional.grouped_mm`: its CUDA kernel is for bfloat16 on compute capability 9.0 and 10.0 (and
cuBLASLt's, where PyTorch has it, for CUDA 13.3 and later); everywhere else it is a loop over the experts on the host,
which waits for the device and cannot be captured. It also wants the tokens copied into sorted order first and the
activation as a pass of its own, and its tiles are made for many rows an expert, where decoding brings one or two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ingle.kernels.flow import ExpertBiases
from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.elementwise import activate, swiglu_clamped
from ingle.kernels.options import Activation, RouterConfig

_ONE_HOT = 8192
"""Elements of the table [pairs, experts] that the sort looks at in one go."""
_GROUP = 8
"""Blocks of rows whose programs stand side by side, so that an expert's weights are still in the L2 cache."""


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, num_tokens, scaling,
    NUM_GROUPS: tl.constexpr, MEMBERS: tl.constexpr, TOP_K: tl.constexpr, TOPK_GROUP: tl.constexpr,
    GROUP_EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    TOKENS: tl.constexpr, GROUP_BLOCK: tl.constexpr, MEMBER_BLOCK: tl.constexpr, TOP_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    groups = tl.arange(0, GROUP_BLOCK)
    members = tl.arange(0, MEMBER_BLOCK)
    experts = (groups[:, None] * MEMBERS + members[None, :])[None, :, :]
    is_expert = ((groups < NUM_GROUPS)[:, None] & (members < MEMBERS)[None, :])[None, :, :]
    row = tokens.to(tl.int64)[:, None, None] * NUM_GROUPS * MEMBERS
    logits = tl.load(logits_ptr + row + experts, mask=is_token[:, None, None] & is_expert, other=0.0).to(tl.float32)
    if SIGMOID:
        scores = 1 / (1 + tl.exp(-logits))
    else:
        logits = tl.where(is_expert, logits, float("-inf"))
        exponentials = tl.exp(logits - tl.max(tl.max(logits, 2), 1)[:, None, None])
        scores = exponentials / tl.sum(tl.sum(exponentials, 2), 1)[:, None, None]
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + experts, mask=is_expert, other=0.0)
    # A token that is not a number still chooses experts that exist, and none twice.
    choice = tl.where(choice == choice, choice, -1e30)
    choice = tl.where(is_expert, choice, float("-inf"))
    if NUM_GROUPS > 1:
        left = choice
        goodness = tl.zeros([TOKENS, GROUP_BLOCK], tl.float32)
        for _ in range(GROUP_EXPERTS):
            best = tl.max(left, 2)
            goodness += best
            first = tl.min(tl.where(left == best[:, :, None], members[None, None, :], MEMBER_BLOCK), 2)
            left = tl.where(members[None, None, :] == first[:, :, None], float("-inf"), left)
        kept = tl.zeros([TOKENS, GROUP_BLOCK], tl.int32)
        for _ in range(TOPK_GROUP):
            best = tl.max(goodness, 1)
            first = tl.min(tl.where(goodness == best[:, None], groups[None, :], GROUP_BLOCK), 1)
            kept = tl.where(groups[None, :] == first[:, None], 1, kept)
            goodness = tl.where(groups[None, :] == first[:, None], float("-inf"), goodness)
        choice = tl.where((kept == 1)[:, :, None], choice, float("-inf"))
    ranks = tl.arange(0, TOP_BLOCK)
    ids = tl.zeros([TOKENS, TOP_BLOCK], tl.int32)
    weights = tl.zeros([TOKENS, TOP_BLOCK], tl.float32)
    for rank in range(TOP_K):
        best = tl.max(tl.max(choice, 2), 1)[:, None, None]
        chosen = tl.min(tl.min(tl.where(choice == best, experts, NUM_GROUPS * MEMBERS), 2), 1)
        is_chosen = experts == chosen[:, None, None]
        weight = tl.sum(tl.sum(tl.where(is_chosen, scores, 0.0), 2), 1)
        choice = tl.where(is_chosen, float("-inf"), choice)
        ids = tl.where(ranks[None, :] == rank, chosen[:, None], ids)
        weights = tl.where(ranks[None, :] == rank, weight[:, None], weights)
    if NORM:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    place = tokens[:, None] * TOP_K + ranks[None, :]
    mask = is_token[:, None] & (ranks < TOP_K)[None, :]
    tl.store(ids_ptr + place, ids, mask=mask)
    tl.store(weights_ptr + place, weights * scaling, mask=mask)


def route(
    logits: torch.Tensor, selection_bias: torch.Tensor | None, config: RouterConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, members = len(logits), config.num_experts // config.num_groups
    expert_ids = torch.empty(num_tokens, config.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(num_tokens, config.top_k, dtype=torch.float32, device=logits.device)
    tokens, early = 1 if num_tokens < 256 else 8, pdl(logits.device)
    _route_kernel[(triton.cdiv(num_tokens, tokens),)](
        logits, logits if selection_bias is None else selection_bias, expert_ids, weights, num_tokens,
        config.routed_scaling_factor,
        NUM_GROUPS=config.num_groups, MEMBERS=members, TOP_K=config.top_k, TOPK_GROUP=config.topk_group,
        GROUP_EXPERTS=config.group_experts, SIGMOID=config.scoring == "sigmoid", BIAS=selection_bias is not None,
        NORM=config.norm_topk_prob, TOKENS=tokens, GROUP_BLOCK=triton.next_power_of_2(config.num_groups),
        MEMBER_BLOCK=triton.next_power_of_2(members), TOP_BLOCK=triton.next_power_of_2(config.top_k),
        PDL=early, num_warps=1 if tokens == 1 else 4, launch_pdl=early,
    )  # fmt: skip
    return expert_ids, weights


@triton.jit
def _count(ids_ptr, first, end, columns, counts, PAIRS: tl.constexpr):
    """counts and how often each expert in `columns` occurs among the pairs [first, end)."""
    for start in range(first, end, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        expert = tl.load(ids_ptr + pairs, mask=pairs < end, other=-1)
        counts += tl.sum((expert[:, None] == columns[None, :]).to(tl.int32), 0)
    return counts


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, num_pairs,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    chunk = tl.program_id(0)
    columns = tl.arange(0, EXPERT_BLOCK)
    end = tl.minimum((chunk + 1) * CHUNK, num_pairs)
    counts = _count(ids_ptr, chunk * CHUNK, end, columns, tl.zeros([EXPERT_BLOCK], tl.int32), PAIRS)
    tl.store(counts_ptr + chunk * EXPERT_BLOCK + columns, counts)


@triton.jit
def _sort_kernel(
    ids_ptr, counts_ptr, order_ptr, blocks_ptr, num_pairs, num_chunks, num_blocks,
    CHUNK: tl.constexpr, PAIRS: tl.constexpr, EXPERT_BLOCK: tl.constexpr, ROWS: tl.constexpr, LISTED: tl.constexpr,
    SINGLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Puts a chunk of pairs into their places in the order by expert, and writes its share of the list of blocks."""
    if PDL:
        await_previous()
    chunk = tl.program_id(0)
    columns = tl.arange(0, EXPERT_BLOCK)
    before = tl.zeros([EXPERT_BLOCK], tl.int32)
    total = tl.zeros([EXPERT_BLOCK], tl.int32)
    if SINGLE:
        total = _count(ids_ptr, 0, num_pairs, columns, total, PAIRS)
    else:
        for other in range(num_chunks):
            counts = tl.load(counts_ptr + other * EXPERT_BLOCK + columns)
            total += counts
            before += tl.where(other < chunk, counts, 0)
    starts = tl.cumsum(total, 0) - total
    cursor = starts + before
    end = tl.minimum((chunk + 1) * CHUNK, num_pairs)
    for start in range(chunk * CHUNK, end, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        expert = tl.load(ids_ptr + pairs, mask=pairs < end, other=-1)
        one_hot = (expert[:, None] == columns[None, :]).to(tl.int32)
        # How many pairs of the same expert come before: those of earlier tables, and those above in this one.
        places = cursor[None, :] + tl.cumsum(one_hot, 0) - one_hot
        tl.store(order_ptr + tl.sum(places * one_hot, 1), pairs, mask=pairs < end)
        cursor += tl.sum(one_hot, 0)
    blocks_of = tl.cdiv(total, ROWS)
    last_blocks = tl.cumsum(blocks_of, 0)
    for first in range(chunk * LISTED, num_blocks, num_chunks * LISTED):
        blocks = first + tl.arange(0, LISTED)
        expert = tl.sum((last_blocks[None, :] <= blocks[:, None]).to(tl.int32), 1)  # EXPERT_BLOCK past the last one
        here = (expert[:, None] == columns[None, :]).to(tl.int32)
        index = blocks - tl.sum((last_blocks - blocks_of)[None, :] * here, 1)
        row = tl.sum(starts[None, :] * here, 1) + index * ROWS
        row_end = tl.minimum(row + ROWS, tl.sum((starts + total)[None, :] * here, 1))
        entry = blocks_ptr + blocks * 3
        tl.store(entry, expert, mask=blocks < num_blocks)
        tl.store(entry + 1, row, mask=blocks < num_blocks)
        tl.store(entry + 2, row_end, mask=blocks < num_blocks)


def sort_by_expert(expert_ids: torch.Tensor, num_experts: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The P pairs of expert_ids [T, K] in the order of their experts, cut into blocks of up to `rows` of one expert.

    int32 [P], the order, and int32 [B, 3]: of each block its expert and its rows [first, end) of the order. B is an
    upper bound: the expert of a block that is not needed is beyond the last.
    """
    num_pairs, device = expert_ids.numel(), expert_ids.device
    early = pdl(device)
    expert_block = max(triton.next_power_of_2(num_experts), 2)
    pairs = min(max(_ONE_HOT // expert_block, 16), max(triton.next_power_of_2(num_pairs), 16))
    chunk = max(256 if num_pairs <= 4096 else 1024, pairs)
    num_chunks = triton.cdiv(num_pairs, chunk)
    # An expert that is chosen at all leaves at most rows - 1 rows of its last block empty.
    num_blocks = (num_pairs + min(num_experts, num_pairs) * (rows - 1)) // rows
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    blocks = torch.empty(num_blocks, 3, dtype=torch.int32, device=device)
    counts = order
    if num_chunks > 1:
        counts = torch.empty(num_chunks, expert_block, dtype=torch.int32, device=device)
        _count_kernel[(num_chunks,)](
            expert_ids, counts, num_pairs,
            CHUNK=chunk, PAIRS=pairs, EXPERT_BLOCK=expert_block, PDL=early, launch_pdl=early,
        )  # fmt: skip
    _sort_kernel[(num_chunks,)](
        expert_ids, counts, order, blocks, num_pairs, num_chunks, num_blocks,
        CHUNK=chunk, PAIRS=pairs, EXPERT_BLOCK=expert_block, ROWS=rows, LISTED=16, SINGLE=num_chunks == 1,
        PDL=early, launch_pdl=early,
    )  # fmt: skip
    return order, blocks


@triton.jit
def block_and_column(num_blocks, num_columns, GROUP: tl.constexpr):
    """This program's block and column: GROUP blocks go through all columns before the next ones begin."""
    program = tl.program_id(0)
    group = program // (GROUP * num_columns)
    height = tl.minimum(num_blocks - group * GROUP, GROUP)
    within = program % (GROUP * num_columns)
    return group * GROUP + within % height, within // height


@triton.jit
def rows_of(blocks_ptr, order_ptr, block, ROWS: tl.constexpr, SORTED: tl.constexpr):
    """Of a block: its expert, its rows of the order, which of them there are, and the pair of each."""
    rows = tl.arange(0, ROWS)
    if SORTED:
        expert = tl.load(blocks_ptr + block * 3)
        rows += tl.load(blocks_ptr + block * 3 + 1)
        is_row = rows < tl.load(blocks_ptr + block * 3 + 2)
        pairs = tl.load(order_ptr + rows, mask=is_row, other=0)
    else:  # every pair is a block, and blocks_ptr has their experts
        expert = tl.load(blocks_ptr + block)
        is_row = rows == 0
        rows += block
        pairs = rows
    return expert, rows.to(tl.int64), is_row, pairs.to(tl.int64)


@triton.jit
def _gate_up_kernel(
    x_ptr, order_ptr, blocks_ptr, weight_ptr, bias_ptr, out_ptr, num_blocks, num_columns, x_stride, num_experts,
    TOP_K: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr, PRECISION: tl.constexpr, GELU_TANH: tl.constexpr,
    CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """activation(x @ gate.T) * (x @ up.T), each with its bias if there is one, for one block of rows, written in sorted
    order, and COLUMNS columns."""
    if PDL:
        await_previous()
    block, column = block_and_column(num_blocks, num_columns, GROUP)
    expert, rows, is_row, pairs = rows_of(blocks_ptr, order_ptr, block, ROWS, SORTED)
    if expert >= num_experts:
        return
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < INNER
    depth = tl.arange(0, DEPTH)
    x = x_ptr + (pairs // TOP_K)[:, None] * x_stride + depth[None, :]
    gate = weight_ptr + expert.to(tl.int64) * 2 * INNER * HIDDEN + columns[None, :] * HIDDEN + depth[:, None]
    gate_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HIDDEN, DEPTH):
        in_depth = start + depth < HIDDEN
        a = tl.load(x + start, mask=is_row[:, None] & in_depth[None, :], other=0.0)
        mask = in_depth[:, None] & is_column[None, :]
        gate_sum += tl.dot(a, tl.load(gate + start, mask=mask, other=0.0), input_precision=PRECISION)
        up = tl.load(gate + INNER * HIDDEN + start, mask=mask, other=0.0)
        up_sum += tl.dot(a, up, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = bias_ptr + expert * 2 * INNER + columns
        gate_sum += tl.load(bias, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up_sum += tl.load(bias + INNER, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if CLAMPED:  # noqa: SIM108 (either is compiled)
        out = swiglu_clamped(gate_sum, up_sum)
    else:
        out = activate(gate_sum, GELU_TANH) * up_sum
    place = out_ptr + rows[:, None] * INNER + columns[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _down_kernel(
    x_ptr, order_ptr, blocks_ptr, weight_ptr, bias_ptr, scales_ptr, out_ptr, num_blocks, num_columns, num_experts,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, SORTED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x @ down.T, and its bias if there is one, times the routing weight for one block of sorted rows; each is written
    to the place of its pair."""
    if PDL:
        await_previous()
    block, column = block_and_column(num_blocks, num_columns, GROUP)
    expert, rows, is_row, pairs = rows_of(blocks_ptr, order_ptr, block, ROWS, SORTED)
    if expert >= num_experts:
        return
    columns = column * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < HIDDEN
    depth = tl.arange(0, DEPTH)
    x = x_ptr + rows[:, None] * INNER + depth[None, :]
    weight = weight_ptr + expert.to(tl.int64) * HIDDEN * INNER + columns[None, :] * INNER + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        in_depth = start + depth < INNER
        a = tl.load(x + start, mask=is_row[:, None] & in_depth[None, :], other=0.0)
        w = tl.load(weight + start, mask=in_depth[:, None] & is_column[None, :], other=0.0)
        total += tl.dot(a, w, input_precision=PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + expert * HIDDEN + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total *= tl.load(scales_ptr + pairs, mask=is_row, other=0.0)[:, None]
    place = out_ptr + pairs[:, None] * HIDDEN + columns[None, :]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _sum_kernel(pairs_ptr, out_ptr, TOP_K: tl.constexpr, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        await_previous()
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < HIDDEN
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        given = tl.load(pairs_ptr + (token * TOP_K + rank) * HIDDEN + columns, mask=mask, other=0.0)
        total += given.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a program cuts the products."""

    up_to: float
    """The most rows an expert may have on average, were all chosen alike, for these tiles to be taken."""
    rows: int
    inner_columns: int
    """Of the gate, and as many of the up projection."""
    hidden_columns: int
    depth: int
    warps: int
    stages: int


_TILES = (
    # While the bytes of the weights are the limit, rows that hold an expert's tokens at once, and many bytes in flight.
    _Tiles(10, 16, 32, 64, 128, 4, 4),
    _Tiles(24, 32, 32, 64, 128, 4, 4),
    # Beyond, few rows left empty in an expert's last block, then tiles that keep the tensor cores busy.
    _Tiles(128, 64, 64, 128, 64, 4, 4),
    _Tiles(math.inf, 128, 64, 128, 64, 8, 4),
)
_FLOAT32_TILES = (_Tiles(math.inf, 16, 32, 32, 32, 4, 2),)
"""float32 is for measuring parity, not for speed."""


def _tiles(dtype: torch.dtype, rows_per_expert: float) -> _Tiles:
    choices = _FLOAT32_TILES if dtype == torch.float32 else _TILES
    return next(tiles for tiles in choices if rows_per_expert <= tiles.up_to)


def experts(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> torch.Tensor:
    """As `ingle.kernels.reference.experts`."""
    num_experts, hidden, inner = down.shape
    num_tokens, top_k = expert_ids.shape
    early = pdl(x.device)
    tiles = _tiles(x.dtype, num_tokens * top_k / num_experts)
    by_expert = is_sorted(num_tokens * top_k, num_experts, num_tokens)
    order = blocks = expert_ids
    if by_expert:
        order, blocks = sort_by_expert(expert_ids, num_experts, tiles.rows)
    num_blocks = len(blocks) if by_expert else num_tokens * top_k
    common = {
        "HIDDEN": hidden, "INNER": inner, "ROWS": tiles.rows, "DEPTH": tiles.depth, "GROUP": _GROUP,
        "SORTED": by_expert, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "PDL": early, "num_warps": tiles.warps, "num_stages": tiles.stages, "launch_pdl": early,
    }  # fmt: skip
    activated = torch.empty(num_tokens * top_k, inner, dtype=x.dtype, device=x.device)
    num_columns = triton.cdiv(inner, tiles.inner_columns)
    _gate_up_kernel[(num_blocks * num_columns,)](
        x, order, blocks, gate_up, None if biases is None else biases.gate_up, activated, num_blocks, num_columns,
        x.stride(0), num_experts,
        TOP_K=top_k, COLUMNS=tiles.inner_columns, GELU_TANH=activation == "gelu_tanh",
        CLAMPED=activation == "swiglu_clamped", **common,
    )  # fmt: skip
    by_pair = torch.empty(num_tokens * top_k, hidden, dtype=x.dtype, device=x.device)
    num_columns = triton.cdiv(hidden, tiles.hidden_columns)
    _down_kernel[(num_blocks * num_columns,)](
        activated, order, blocks, down, None if biases is None else biases.down, weights, by_pair, num_blocks,
        num_columns, num_experts,
        COLUMNS=tiles.hidden_columns, **common,
    )  # fmt: skip
    return sum_pairs(by_pair, top_k)


def sum_pairs(by_pair: torch.Tensor, top_k: int) -> torch.Tensor:
    """[T * K, E] to [T, E]"""
    num_pairs, hidden = by_pair.shape
    num_tokens, early = num_pairs // top_k, pdl(by_pair.device)
    out = by_pair.new_empty(num_tokens, hidden)
    block = min(triton.next_power_of_2(hidden), 1024)
    _sum_kernel[(num_tokens, triton.cdiv(hidden, block))](
        by_pair, out, TOP_K=top_k, HIDDEN=hidden, BLOCK=block, PDL=early, num_warps=4, launch_pdl=early
    )
    return out


def is_sorted(num_pairs: int, num_experts: int, num_tokens: int) -> bool:
    """Whether pairs are sorted by expert: so few seldom share one, and where they do, its weights are read from the
    cache the second time."""
    return num_pairs > num_experts // 4 and num_tokens > 1
