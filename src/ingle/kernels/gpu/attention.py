"""Paged attention as Triton kernels: split decode attention and ragged prefill attention, both over the same pages.

The online softmax is that of FlashAttention (https://arxiv.org/abs/2205.14135); a decoding sequence's keys are split
over programs whose partial results a second kernel joins (https://pytorch.org/blog/flash-decoding). The query heads
that share a key head are handled together, so that keys and values are read once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.batch import Batch, DecodeWork, query_block
from ingle.kernels.gpu.device import await_previous, num_processors, pdl
from ingle.model.architecture import AttentionOptions

_MIN_DOT = 16
"""Rows and columns that the matrix units need at least."""
_DECODE_STAGES = 2
_PREFILL_KEYS, _PREFILL_WARPS, _PREFILL_STAGES = 64, 4, 2
_WIDE_PREFILL_KEYS, _WIDE_PREFILL_WARPS = 32, 8
"""For heads of more than 128 dimensions, with which the registers of fewer warps would not suffice."""
_LOG2_E = 1.4426950408889634
_HIDDEN = tl.constexpr(-1e30)
"""Score of a key that is not seen. Finite: where a query sees none of a block's keys, the next block's outweigh it."""


class _Pieces(NamedTuple):
    """How the keys of decoding sequences are shared out."""

    keys: int
    """That one iteration reads; a piece's length is a multiple."""
    warps: int
    even: int
    """Pieces for each processor where sequences are about as long as each other,"""
    ragged: int
    """and where they are not: more of them, so that the last to end does not end late."""


_FEW_SEQUENCES = _Pieces(keys=64, warps=4, even=3, ragged=3)
"""Fewer sequences, times their key heads, than processors: what a piece costs beside its keys counts most."""
_MANY_SEQUENCES = _Pieces(keys=32, warps=2, even=4, ragged=18)
_MAX_ROW = 512
"""Bytes of one head's key up to which a processor's memory holds iterations of `_FEW_SEQUENCES`."""


def paged_attention(q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, options: AttentionOptions) -> torch.Tensor:
    """As `ingle.kernels.reference.paged_attention`: q [T, Hq, D] to [T, Hq, D]."""
    out = torch.empty_like(q)
    work = batch.decode_work.get(options.window)
    listed = work is not None
    if batch.num_decodes and work is None:  # the first layer with this window makes it, the others find it
        work = batch.decode_work[options.window] = split_decodes(batch, kv_cache, options.window)
    if batch.num_blocks:
        _prefill(q, kv_cache, batch, options, out)
    if work is not None:
        _decode(q, kv_cache, batch, work, options, out, listed=listed)
    return out


@triton.jit
def _split_kernel(
    lengths_ptr, slots_ptr, items_ptr, head_ptr, num_seqs, wanted_even, wanted_ragged,
    SEQS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Cuts the keys of all sequences into items of equal length; each program lists those of its own sequence."""
    if PDL:
        await_previous()
    seq = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    if WINDOW:
        lengths = tl.minimum(lengths, WINDOW)
    total = tl.maximum(tl.sum(lengths, 0), 1)
    is_even = 4 * tl.max(lengths, 0) * tl.sum((lengths > 0).to(tl.int64), 0) <= 5 * total
    split = tl.cdiv(tl.cdiv(total, tl.where(is_even, wanted_even, wanted_ragged)), KEYS) * KEYS
    counts = tl.cdiv(lengths, split)
    first = tl.sum(tl.where(seqs < seq, counts, 0), 0)
    count = tl.sum(tl.where(seqs == seq, counts, 0), 0)
    slot, length = tl.load(slots_ptr + seq), tl.load(lengths_ptr + seq)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        item = items_ptr + (first + index) * 4
        tl.store(item, seq, mask=index < count)
        tl.store(item + 1, index, mask=index < count)
        tl.store(item + 2, slot, mask=index < count)
        tl.store(item + 3, length, mask=index < count)
    if seq == 0:
        tl.store(head_ptr, tl.sum(counts, 0))
        tl.store(head_ptr + 1, split)


def split_decodes(batch: Batch, kv_cache: torch.Tensor, window: int | None = None) -> DecodeWork:
    """Equal pieces of the keys that a batch's decoding sequences see, for a device to spread over its processors."""
    lengths = batch.inputs.decode_lengths[: batch.num_decodes]
    num_seqs, num_kv_heads, device = len(lengths), kv_cache.shape[3], lengths.device
    pieces = _pieces(num_seqs, kv_cache)
    even, ragged = (max(n * num_processors(device) // num_kv_heads, 1) for n in (pieces.even, pieces.ragged))
    items = torch.empty(num_seqs + max(even, ragged), 4, dtype=torch.int32, device=device)
    head = torch.empty(2, dtype=torch.int64, device=device)
    arrived = torch.zeros(num_seqs, num_kv_heads, dtype=torch.int32, device=device)
    early = pdl(device)
    _split_kernel[(num_seqs,)](
        lengths, batch.inputs.slots, items, head, num_seqs, even, ragged,
        SEQS=triton.next_power_of_2(num_seqs), KEYS=pieces.keys, BLOCK=128, WINDOW=window or 0, PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return DecodeWork(items, head, arrived)


def _pieces(num_seqs: int, kv_cache: torch.Tensor) -> _Pieces:
    _, _, _, num_kv_heads, head_dim = kv_cache.shape
    is_few = num_seqs * num_kv_heads < num_processors(kv_cache.device)
    return _FEW_SEQUENCES if is_few and head_dim * kv_cache.itemsize <= _MAX_ROW else _MANY_SEQUENCES


@triton.jit
def _capped(scores, cap):
    """cap * tanh(x), given log2(e) * 2 x: in powers of 2, as everything here."""
    return cap - 2 * cap / (tl.exp2(scores) + 1)


@triton.jit
def _decode_kernel(
    q_ptr, kv_ptr, page_tables_ptr, items_ptr, head_ptr, arrived_ptr, parts_ptr, sums_ptr, out_ptr, scale, cap,
    table_stride, v_offset, page_stride, token_stride, head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PDL: tl.constexpr, LISTED: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    if PDL and BESIDE:
        # The kernel before reads prompts, which is none of this one's business, but for its end.
        if item == tl.num_programs(1) - 1:
            await_previous()
            return
    elif PDL and not LISTED:  # the very kernel before this one lists the items
        await_previous()
    if item >= tl.load(head_ptr):
        return
    split = tl.load(head_ptr + 1)
    rows = tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    in_head = dims < HEAD_DIM
    mask = (rows < GROUP)[:, None] & in_head[None, :]
    seq = tl.load(items_ptr + item * 4)
    index = tl.load(items_ptr + item * 4 + 1)
    table = page_tables_ptr + tl.load(items_ptr + item * 4 + 2) * table_stride
    length = tl.load(items_ptr + item * 4 + 3)
    first_seen = 0
    if WINDOW:
        first_seen = tl.maximum(length - WINDOW, 0)
    num_parts = tl.cdiv(length - first_seen, split)
    # Its pieces are no longer than `split`, and as equal as whole iterations allow.
    own = tl.cdiv(tl.cdiv(length - first_seen, num_parts), KEYS) * KEYS
    first_key = first_seen + index * own
    last_key = tl.minimum(first_key + own, length)
    heads = kv_head * GROUP + rows
    place = (seq * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
    if PDL and LISTED and not BESIDE:
        await_previous()
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    for start in range(first_key, last_key, KEYS):
        keys = start + tl.arange(0, KEYS)
        seen = keys < last_key
        page = tl.load(table + keys // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
        row = page * page_stride + (keys % PAGE_SIZE) * token_stride + kv_head * head_stride
        kv_mask = seen[:, None] & in_head[None, :]
        k = tl.load(kv_ptr + row[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            scores = _capped(scores, cap)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        v = tl.load(kv_ptr + v_offset + row[:, None] + dims[None, :], mask=kv_mask, other=0.0)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        best = new_best
    if num_parts == 1:
        tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        part = (item * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :]
        tl.store(parts_ptr + part, acc / total[:, None], mask=mask)
        tl.store(sums_ptr + item * NUM_HEADS + heads, best + tl.log2(total), mask=rows < GROUP)
        tl.debug_barrier()  # the whole program's stores come before its arrival
        arrived = tl.atomic_add(arrived_ptr + seq * NUM_KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == num_parts - 1:  # the last to arrive joins the parts, and leaves the counter as it was
            _join(
                parts_ptr, sums_ptr, out_ptr, item - index, num_parts, heads, rows < GROUP, dims, place, mask,
                NUM_HEADS, HEAD_DIM, HEAD_BLOCK, DIM_BLOCK,
            )  # fmt: skip
            tl.store(arrived_ptr + seq * NUM_KV_HEADS + kv_head, 0)


@triton.jit
def _join(
    parts_ptr, sums_ptr, out_ptr, first_item, num_parts, heads, in_group, dims, place, mask,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
):  # fmt: skip
    """Joins a sequence's parts, each weighing the sum of its exponentials. Other programs wrote them: not from L1."""
    best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    for index in range(num_parts):
        row = (first_item + index) * NUM_HEADS + heads
        log_sum = tl.load(sums_ptr + row, mask=in_group, other=0.0, cache_modifier=".cg")
        part = tl.load(parts_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        new_best = tl.maximum(best, log_sum)
        shrink = tl.exp2(best - new_best)
        weight = tl.exp2(log_sum - new_best)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        best = new_best
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def _decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    work: DecodeWork,
    options: AttentionOptions,
    out: torch.Tensor,
    *,
    listed: bool,
) -> None:
    """`listed`: another kernel ran since the one that made `work`.

    Beside a kernel that reads prompts this one starts while that is at its work, and has one more program a head: those
    do nothing but wait for it, so that whoever waits for this kernel has waited for both.
    """
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    parts = torch.empty(len(work.items), num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(len(work.items), num_heads, dtype=torch.float32, device=q.device)
    early, pieces = pdl(q.device), _pieces(batch.num_decodes, kv_cache)
    beside = early and batch.num_blocks > 0
    _decode_kernel[(num_kv_heads, len(work.items) + beside)](
        q, kv_cache, batch.page_tables, work.items, work.head, work.arrived, parts, sums, out,
        *_scale_and_cap(options), batch.page_tables.stride(0), *_kv_strides(kv_cache),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIM_BLOCK=_dim_block(head_dim),
        HEAD_BLOCK=max(triton.next_power_of_2(num_heads // num_kv_heads), _MIN_DOT), PAGE_SIZE=page_size,
        KEYS=pieces.keys,
        PRECISION=_precision(q), WINDOW=options.window or 0, CAPPED=options.softcap is not None,
        PDL=early, LISTED=listed, BESIDE=beside, num_warps=pieces.warps, num_stages=_DECODE_STAGES, launch_pdl=early,
    )  # fmt: skip


def _scale_and_cap(options: AttentionOptions) -> tuple[float, float]:
    """Factor on the products, and the cap, such that scores are exponents of 2; see `_capped`."""
    if options.softcap is None:
        return options.scale * _LOG2_E, 0.0
    return 2 * options.scale / options.softcap * _LOG2_E, options.softcap * _LOG2_E


def _kv_strides(kv_cache: torch.Tensor) -> tuple[int, int, int, int]:
    """Elements from keys to values, and from one page, token and head to the next."""
    values, page, token, head, _ = kv_cache.stride()
    return values, page, token, head


@triton.jit
def _prefill_kernel(
    q_ptr, kv_ptr, page_tables_ptr, slots_ptr, lengths_ptr, starts_ptr, blocks_ptr,
    num_blocks_ptr, out_ptr, scale, cap, table_stride, v_offset, page_stride, token_stride, head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # later blocks attend to more keys: start them first
    if block >= tl.load(num_blocks_ptr):
        return
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
    begin = 0
    if WINDOW:
        # Keys before [begin, ..) are out of every query's window, those before [inside, ..) of the last query's.
        begin = tl.maximum(first_position - WINDOW + 1, 0) // KEYS * KEYS
        inside = tl.minimum(tl.cdiv(tl.maximum(first_position + QUERIES - WINDOW, 0), KEYS) * KEYS, full)
        for start in range(begin, inside, KEYS):
            acc, total, best = _attend(
                q, acc, total, best, start + tl.arange(0, KEYS), positions, last_key, dims, in_head, table, kv_ptr,
                v_offset, page_stride, token_stride, kv_head * head_stride, scale, cap, PAGE_SIZE, True, PRECISION,
                WINDOW, CAPPED,
            )  # fmt: skip
        begin = tl.maximum(begin, inside)
    for start in range(begin, full, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start + tl.arange(0, KEYS), positions, last_key, dims, in_head, table, kv_ptr,
            v_offset, page_stride, token_stride, kv_head * head_stride, scale, cap, PAGE_SIZE, False, PRECISION,
            WINDOW, CAPPED,
        )  # fmt: skip
    for start in range(full, last_key, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start + tl.arange(0, KEYS), positions, last_key, dims, in_head, table, kv_ptr,
            v_offset, page_stride, token_stride, kv_head * head_stride, scale, cap, PAGE_SIZE, True, PRECISION,
            WINDOW, CAPPED,
        )  # fmt: skip
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, acc, total, best, keys, positions, last_key, dims, in_head, table, kv_ptr,
    v_offset, page_stride, token_stride, head_offset, scale, cap,
    PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One iteration of the online softmax over the keys at positions `keys`."""
    seen = keys < last_key
    page = tl.load(table + keys // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
    row = page * page_stride + (keys % PAGE_SIZE) * token_stride + head_offset
    mask = (seen[:, None] | (not MASKED)) & in_head[None, :]
    k = tl.load(kv_ptr + row[:, None] + dims[None, :], mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        scores = _capped(scores, cap)
    if MASKED:
        visible = keys[None, :] <= positions[:, None]
        if WINDOW:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, _HIDDEN)
    new_best = tl.maximum(best, tl.max(scores, 1))
    weights = tl.exp2(scores - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    v = tl.load(kv_ptr + v_offset + row[:, None] + dims[None, :], mask=mask, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(weights, 1), new_best


def _prefill(
    q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, options: AttentionOptions, out: torch.Tensor
) -> None:
    inputs = batch.inputs
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    early, wide = pdl(q.device), _dim_block(head_dim) > 128
    _prefill_kernel[(num_heads, batch.num_blocks)](
        q, kv_cache, batch.page_tables, inputs.slots, inputs.kv_lengths, inputs.query_starts, inputs.query_blocks,
        inputs.num_query_blocks, out,
        *_scale_and_cap(options), batch.page_tables.stride(0), *_kv_strides(kv_cache),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        DIM_BLOCK=_dim_block(head_dim), QUERIES=query_block(head_dim), PAGE_SIZE=page_size,
        KEYS=_WIDE_PREFILL_KEYS if wide else _PREFILL_KEYS,
        PRECISION=_precision(q), WINDOW=options.window or 0, CAPPED=options.softcap is not None,
        PDL=early, num_warps=_WIDE_PREFILL_WARPS if wide else _PREFILL_WARPS, num_stages=_PREFILL_STAGES,
        launch_pdl=early,
    )  # fmt: skip


def _dim_block(head_dim: int) -> int:
    return max(int(triton.next_power_of_2(head_dim)), _MIN_DOT)


def _precision(q: torch.Tensor) -> str:
    """float32 is multiplied as such, not rounded to tf32: it is what parity is measured in."""
    return "ieee" if q.dtype == torch.float32 else "tf32"
