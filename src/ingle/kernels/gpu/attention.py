"""Paged attention as Triton kernels: split decode attention and ragged prefill attention, both over the same pages.

The online softmax is that of FlashAttention (https://arxiv.org/abs/2205.14135); a decoding sequence's keys are split
over programs whose partial results a second kernel joins (https://pytorch.org/blog/flash-decoding). The query heads
that share a key head are handled together, so that keys and values are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.engine.batch import QUERY_BLOCK, Batch

_MIN_DOT = 16
"""Rows that the matrix units need at least."""
_KEYS = 64
"""Keys that one iteration of a kernel reads."""
_LOG2_E = 1.4426950408889634


def paged_attention(q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, scale: float) -> torch.Tensor:
    """As `ingle.kernels.reference.paged_attention`: q [T, Hq, D] to [T, Hq, D]."""
    out = torch.empty_like(q)
    if batch.num_decodes:
        _decode(q, kv_cache, batch, scale, out)
    if batch.query_blocks is not None and len(batch.query_blocks):
        _prefill(q, kv_cache, batch, scale, out)
    return out


@triton.jit
def _decode_kernel(
    q_ptr, kv_ptr, page_tables_ptr, slots_ptr, lengths_ptr, out_ptr, sums_ptr,
    scale, table_stride, v_offset,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, NUM_SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    length = tl.load(lengths_ptr + seq)
    per_split = tl.cdiv(tl.cdiv(length, KEYS), NUM_SPLITS) * KEYS
    first_key = split * per_split
    last_key = tl.minimum(first_key + per_split, length)

    rows = tl.arange(0, HEAD_BLOCK)
    heads = kv_head * GROUP + rows
    dims = tl.arange(0, DIM_BLOCK)
    in_group = rows < GROUP
    in_head = dims < HEAD_DIM
    q = tl.load(
        q_ptr + (seq * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :],
        mask=in_group[:, None] & in_head[None, :], other=0.0,
    )  # fmt: skip
    table = page_tables_ptr + tl.load(slots_ptr + seq) * table_stride
    best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    for start in range(first_key, last_key, KEYS):
        keys = start + tl.arange(0, KEYS)
        seen = keys < last_key
        page = tl.load(table + keys // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        row = ((page * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
        mask = seen[:, None] & in_head[None, :]
        k = tl.load(kv_ptr + row[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        v = tl.load(kv_ptr + v_offset + row[:, None] + dims[None, :], mask=mask, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        best = new_best
    mask = in_group[:, None] & in_head[None, :]
    if NUM_SPLITS == 1:
        place = out_ptr + (seq * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = (seq * NUM_HEADS + heads) * NUM_SPLITS + split
        safe_total = tl.where(total > 0, total, 1.0)
        tl.store(out_ptr + part[:, None] * HEAD_DIM + dims[None, :], acc / safe_total[:, None], mask=mask)
        tl.store(sums_ptr + part, tl.where(total > 0, best + tl.log2(safe_total), float("-inf")), mask=in_group)


@triton.jit
def _join_kernel(
    parts_ptr, sums_ptr, out_ptr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one head: each part weighs as much as the sum of its exponentials."""
    row = tl.program_id(0)
    splits = tl.arange(0, SPLIT_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    real = splits < NUM_SPLITS
    sums = tl.load(sums_ptr + row * NUM_SPLITS + splits, mask=real, other=float("-inf"))
    weights = tl.exp2(sums - tl.max(sums, 0))
    mask = real[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(
        parts_ptr + (row * NUM_SPLITS + splits[:, None]) * HEAD_DIM + dims[None, :], mask=mask, other=0.0
    )  # fmt: skip
    joined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + row * HEAD_DIM + dims, joined.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def num_splits(num_seqs: int, num_kv_heads: int, num_processors: int) -> int:
    """Programs per sequence and key head: enough to occupy the device about four times over, at most 32."""
    wanted = 4 * num_processors // (num_seqs * num_kv_heads)
    return min(triton.next_power_of_2(wanted + 1) // 2, 32) if wanted > 1 else 1


def _decode(q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, scale: float, out: torch.Tensor) -> None:
    n, (_, num_heads, head_dim) = batch.num_decodes, q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    splits = num_splits(n, num_kv_heads, _num_processors(q.device))
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(n, num_heads, splits, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(n, num_heads, splits, dtype=torch.float32, device=q.device)
    dim_block = triton.next_power_of_2(head_dim)
    _decode_kernel[(n, num_kv_heads, splits)](
        q, kv_cache, batch.page_tables, batch.slots, batch.kv_lengths, parts, sums,
        scale * _LOG2_E, batch.page_tables.stride(0), kv_cache.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIM_BLOCK=dim_block,
        HEAD_BLOCK=max(triton.next_power_of_2(num_heads // num_kv_heads), _MIN_DOT), PAGE_SIZE=page_size, KEYS=_KEYS,
        NUM_SPLITS=splits, PRECISION=_precision(q), num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(n * num_heads,)](
            parts, sums, out, HEAD_DIM=head_dim, DIM_BLOCK=dim_block, NUM_SPLITS=splits,
            SPLIT_BLOCK=triton.next_power_of_2(splits), num_warps=2,
        )  # fmt: skip


@triton.jit
def _prefill_kernel(
    q_ptr, kv_ptr, page_tables_ptr, slots_ptr, lengths_ptr, starts_ptr, blocks_ptr,
    out_ptr, scale, table_stride, v_offset,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # later blocks attend to more keys: start them first
    kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
    seq = tl.load(blocks_ptr + 2 * block)
    first_row = tl.load(blocks_ptr + 2 * block + 1)
    end_row = tl.load(starts_ptr + seq + 1)
    length = tl.load(lengths_ptr + seq)

    rows = first_row + tl.arange(0, QUERIES)
    positions = length - end_row + rows
    dims = tl.arange(0, DIM_BLOCK)
    in_head = dims < HEAD_DIM
    mask = (rows < end_row)[:, None] & in_head[None, :]
    place = (rows[:, None] * NUM_HEADS + head) * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    table = page_tables_ptr + tl.load(slots_ptr + seq) * table_stride
    best = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, DIM_BLOCK], tl.float32)
    first_position = length - end_row + first_row
    last_key = tl.minimum(first_position + QUERIES, length)
    # Keys before every query of the block need no causal mask.
    full = first_position // KEYS * KEYS
    for start in range(0, full, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start + tl.arange(0, KEYS), positions, last_key, dims, in_head, table, kv_ptr,
            v_offset, kv_head, scale, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, False, PRECISION,
        )  # fmt: skip
    for start in range(full, last_key, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start + tl.arange(0, KEYS), positions, last_key, dims, in_head, table, kv_ptr,
            v_offset, kv_head, scale, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, True, PRECISION,
        )  # fmt: skip
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, acc, total, best, keys, positions, last_key, dims, in_head,
    table, kv_ptr, v_offset, kv_head, scale,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration of the online softmax over the keys at positions `keys`."""
    seen = keys < last_key
    page = tl.load(table + keys // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
    row = ((page * PAGE_SIZE + keys % PAGE_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM
    mask = seen[:, None] & in_head[None, :]
    k = tl.load(kv_ptr + row[:, None] + dims[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    v = tl.load(kv_ptr + v_offset + row[:, None] + dims[None, :], mask=mask, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(weights, 1), new_best


def _prefill(q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, scale: float, out: torch.Tensor) -> None:
    assert batch.query_blocks is not None
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    _prefill_kernel[(num_heads, len(batch.query_blocks))](
        q, kv_cache, batch.page_tables, batch.slots, batch.kv_lengths, batch.query_starts, batch.query_blocks, out,
        scale * _LOG2_E, batch.page_tables.stride(0), kv_cache.stride(0),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim), QUERIES=QUERY_BLOCK, PAGE_SIZE=page_size, KEYS=_KEYS,
        PRECISION=_precision(q), num_warps=4, num_stages=3,
    )  # fmt: skip


def _precision(q: torch.Tensor) -> str:
    """float32 is multiplied as such, not rounded to tf32: it is what parity is measured in."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
