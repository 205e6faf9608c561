"""Attention to cached latents as Triton kernels; what they compute is `ingle.kernels.reference_latent`'s.

All heads attend to the same R + P numbers of a token, of which the first R are its value as well. So a token's heads
are the rows of a decode's tile, and a latent is read once for all of them, and lies once in shared memory for both
products. A prompt's tile is tokens of one head. R and P are tiles of their own: 512 and 64 fill them, 576 would not.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.batch import Batch, DecodeWork, query_block
from ingle.kernels.gpu.device import await_previous, num_sms, pdl, shared_memory
from ingle.kernels.gpu.shares import join_if_last, leave_part, share_decodes

_MIN_DOT = 16
"""Rows and columns that tensor cores need at least."""
_HOPPER_ROWS = 64
"""Of a tile: what Hopper's tensor cores multiply at once."""
_SPARE_BYTES = 2048
"""Of shared memory, for what a program holds beside queries and keys, and what the device keeps of each."""
_STORE_HEADS = 8
_LOG2_E = 1.4426950408889634
_LOWEST = tl.constexpr(-1e20)
"""What a prompt's highest score starts from: a number, for a row of padding may see no key."""


@triton.jit
def _store_kernel(
    down_ptr, q_rope_ptr, norm_ptr, cos_sin_ptr, cache_ptr, kv_places_ptr, out_ptr,
    eps, down_stride, q_token_stride, q_head_stride, page_stride, token_stride,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A token's latent and key are written by one program, beside the first of its queries; the key is a head more."""
    dims = tl.arange(0, RANK_BLOCK)
    weight = tl.load(norm_ptr + dims, mask=dims < RANK, other=0.0)
    if PDL:
        await_previous()
    token = tl.program_id(0).to(tl.int64)
    place = tl.load(kv_places_ptr + token)
    down_row = down_ptr + token * down_stride
    cache_row = cache_ptr + place // PAGE_SIZE * page_stride + place % PAGE_SIZE * token_stride
    if tl.program_id(1) == 0:
        latent = tl.load(down_row + dims, mask=dims < RANK, other=0.0)
        wide = latent.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
        normed = ((wide * scale).to(weight.dtype) * weight).to(latent.dtype)
        tl.store(cache_row + dims, normed, mask=dims < RANK)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    half = tl.arange(0, HALF_BLOCK)[None, :]
    in_half = half < HALF
    is_q, is_k = (heads < NUM_HEADS) & in_half, (heads == NUM_HEADS) & in_half
    first_at, step = (2 * half, 1) if INTERLEAVED else (half, HALF)
    q_row, k_row = q_rope_ptr + token * q_token_stride + heads * q_head_stride, down_row + RANK
    first = tl.load(q_row + first_at, mask=is_q, other=0.0) + tl.load(k_row + first_at, mask=is_k, other=0.0)
    second = tl.load(q_row + first_at + step, mask=is_q, other=0.0)
    second += tl.load(k_row + first_at + step, mask=is_k, other=0.0)
    cos = tl.load(cos_sin_ptr + token * 2 * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + token * 2 * HALF + HALF + half, mask=in_half, other=0.0)
    rotated_first = (first * cos - second * sin).to(first.dtype)
    rotated_second = (second * cos + first * sin).to(first.dtype)
    out_row = out_ptr + (token * NUM_HEADS + heads) * 2 * HALF + half
    tl.store(out_row, rotated_first, mask=is_q)
    tl.store(out_row + HALF, rotated_second, mask=is_q)
    key = cache_row + RANK + half + tl.zeros_like(heads)
    tl.store(key, rotated_first, mask=is_k)
    tl.store(key + HALF, rotated_second, mask=is_k)


def store_latent(
    down: torch.Tensor,
    q_rope: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    kv_places: torch.Tensor,
    *,
    interleaved: bool,
) -> torch.Tensor:
    num_tokens, num_heads, rope = q_rope.shape
    out = torch.empty(q_rope.shape, dtype=q_rope.dtype, device=q_rope.device)
    early = pdl(down.device)
    _store_kernel[(num_tokens, triton.cdiv(num_heads + 1, _STORE_HEADS))](
        down, q_rope, norm, cos_sin, cache, kv_places, out,
        eps, down.stride(0), q_rope.stride(0), q_rope.stride(1), cache.stride(0), cache.stride(1),
        NUM_HEADS=num_heads, RANK=len(norm), RANK_BLOCK=triton.next_power_of_2(len(norm)), HALF=rope // 2,
        HALF_BLOCK=triton.next_power_of_2(rope // 2), HEAD_BLOCK=_STORE_HEADS, PAGE_SIZE=cache.shape[1],
        INTERLEAVED=interleaved, PDL=early, num_warps=2, launch_pdl=early,
    )  # fmt: skip
    return out


def latent_attention(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float
) -> torch.Tensor:
    out = torch.empty_like(q_latent)
    work = batch.decode_work.get(None)
    is_old = work is not None
    if batch.num_decodes and work is None:  # the first layer makes it, the others find it
        work = batch.decode_work[None] = _share(q_latent, q_rope, batch)
    if batch.num_blocks:
        _prefill(q_latent, q_rope, cache, batch, scale, out)
    if work is not None:
        _decode(q_latent, q_rope, cache, batch, work, scale, out, is_old=is_old)
    return out


class _Tiling(NamedTuple):
    rows: int
    """Heads of a token, or tokens of a head."""
    keys: int
    """That one iteration reads."""
    warps: int
    stages: int
    num_bytes: int
    """Of shared memory that a program takes, about."""


def _tiling(q_latent: torch.Tensor, q_rope: torch.Tensor, most_rows: int) -> _Tiling:
    """Tiles of at most so many rows: as many as registers and shared memory have room for.

    A program holds its rows' results in registers, R float32 numbers a row. Two iterations' keys are read ahead where
    there is room for them beside the queries.
    """
    device, itemsize = q_latent.device, q_latent.itemsize
    fitting = _MIN_DOT if itemsize > 2 else _HOPPER_ROWS if _is_hopper(device) else _HOPPER_ROWS // 2
    rows, keys = min(_block(most_rows), fitting), _MIN_DOT if itemsize > 2 else 2 * _MIN_DOT
    row_bytes = (_block(q_latent.shape[2]) + _block(q_rope.shape[2])) * itemsize
    stages = 3 if (rows + 2 * keys) * row_bytes + _SPARE_BYTES <= shared_memory(device) else 2
    num_bytes = (rows + (stages - 1) * keys) * row_bytes + _SPARE_BYTES
    return _Tiling(rows, keys, 8 if rows > _MIN_DOT else 4, stages, num_bytes)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _share(q_latent: torch.Tensor, q_rope: torch.Tensor, batch: Batch) -> DecodeWork:
    """For as many programs as run side by side: an SM's registers suffice for two of the narrowest tiles."""
    num_heads, device = q_latent.shape[1], q_latent.device
    tiling = _tiling(q_latent, q_rope, num_heads)
    head_blocks = triton.cdiv(num_heads, tiling.rows)
    side_by_side = 2 if tiling.rows == _MIN_DOT and 2 * tiling.num_bytes <= shared_memory(device) else 1
    return share_decodes(batch, head_blocks, side_by_side * num_sms(device) // head_blocks, tiling.keys, None)


@triton.jit
def _decode_kernel(
    q_ptr, q_rope_ptr, cache_ptr, page_tables_ptr, lengths_ptr, slots_ptr, starts_ptr, num_iterations_ptr, arrived_ptr,
    parts_ptr, sums_ptr, out_ptr, scale, max_programs, table_stride, page_stride, token_stride,
    NUM_HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, HEAD_BLOCK: tl.constexpr, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr, OLD: tl.constexpr, BESIDE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """A program walks through its share of all sequences' keys, which may begin and end amid one, for some heads."""
    head_block = tl.program_id(0)
    program = tl.program_id(1)
    if PDL and BESIDE:
        # The kernel before reads prompts, which is none of this one's business, but for its end.
        if program == tl.num_programs(1) - 1:
            await_previous()
            return
    elif PDL and not OLD:  # the very kernel before this one shares out
        await_previous()
    seq = tl.load(starts_ptr + program * 4)
    key = tl.load(starts_ptr + program * 4 + 1)
    slot = tl.load(starts_ptr + program * 4 + 2).to(tl.int64)
    length = tl.load(starts_ptr + program * 4 + 3)
    num_iterations = tl.load(num_iterations_ptr)
    num_programs = tl.minimum(num_iterations, max_programs)
    if program >= num_programs:
        if PDL and OLD and not BESIDE:
            await_previous()  # there may be none that does anything
        return
    iteration = (program * num_iterations // num_programs).to(tl.int32)
    end = ((program + 1) * num_iterations // num_programs).to(tl.int32)
    heads = head_block * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, RANK_BLOCK)
    rope_dims = tl.arange(0, ROPE_BLOCK)
    in_group = heads < NUM_HEADS
    mask = in_group[:, None] & (dims < RANK)[None, :]
    if PDL and OLD and not BESIDE:
        await_previous()
    while iteration < end:  # of a sequence what is in the share; it has keys: sequences without come last
        first_key, first_iteration = key, iteration - key // KEYS
        num_parts = tl.minimum(tl.cdiv(length - key, KEYS), end - iteration)
        row = seq * NUM_HEADS + heads
        q = tl.load(q_ptr + (row * RANK)[:, None] + dims[None, :], mask=mask, other=0.0)
        q_rope = tl.load(
            q_rope_ptr + (row * ROPE)[:, None] + rope_dims[None, :],
            mask=in_group[:, None] & (rope_dims < ROPE)[None, :], other=0.0,
        )  # fmt: skip
        best = tl.full([HEAD_BLOCK], _LOWEST, tl.float32)
        total = tl.zeros([HEAD_BLOCK], tl.float32)
        acc = tl.zeros([HEAD_BLOCK, RANK_BLOCK], tl.float32)
        table, last = page_tables_ptr + slot * table_stride, tl.zeros([HEAD_BLOCK], tl.int32) + length - 1
        page = _pages(table, key, length, PAGE_SIZE, KEYS)
        for start in range(key, key + num_parts * KEYS, KEYS):
            acc, total, best, page = _attend(
                q, q_rope, acc, total, best, page, start, last, length, dims, rope_dims, table, cache_ptr,
                page_stride, token_stride, scale, RANK, ROPE, PAGE_SIZE, KEYS, True, PRECISION,
            )  # fmt: skip
        key += num_parts * KEYS
        result = acc / total[:, None]
        if (first_key == 0) & (key >= length):
            tl.store(out_ptr + (row * RANK)[:, None] + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=mask)
        else:  # a program leaves two parts at most: a sequence's later keys, then another's first ones
            num_before = leave_part(
                result, best + tl.log2(total), (2 * program + (first_key == 0).to(tl.int32)) * NUM_HEADS + heads,
                parts_ptr, sums_ptr, arrived_ptr + seq * HEAD_BLOCKS + head_block, in_group, dims, mask,
                RANK, COMPILED,
            )  # fmt: skip
            join_if_last(
                num_before, seq, first_iteration, length, arrived_ptr, parts_ptr, sums_ptr, out_ptr, num_iterations,
                num_programs, head_block, heads, in_group, dims, mask, None,
                NUM_HEADS, HEAD_BLOCKS, RANK, HEAD_BLOCK, RANK_BLOCK, KEYS, 0, COMPILED,
            )  # fmt: skip
        iteration += num_parts
        if iteration < end:
            seq += 1
            slot = tl.load(slots_ptr + seq)
            length = tl.load(lengths_ptr + seq).to(tl.int32)
            key = 0


def _decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    work: DecodeWork,
    scale: float,
    out: torch.Tensor,
    *,
    is_old: bool,
) -> None:
    """`is_old`, and what is done beside a kernel that reads prompts: as `attention._decode` has it."""
    _, num_heads, rank = q_latent.shape
    rope, tiling, max_programs = q_rope.shape[2], _tiling(q_latent, q_rope, num_heads), len(work.starts)
    parts = torch.empty(2 * max_programs, num_heads, rank, dtype=torch.float32, device=out.device)
    sums = torch.empty(2 * max_programs, num_heads, dtype=torch.float32, device=out.device)
    head_blocks = triton.cdiv(num_heads, tiling.rows)
    early = pdl(out.device)
    beside = early and batch.num_blocks > 0
    _decode_kernel[(head_blocks, max_programs + beside)](
        q_latent, q_rope, cache, batch.page_tables, batch.inputs.decode_lengths, batch.inputs.slots, work.starts,
        work.num_iterations, work.arrived, parts, sums, out,
        scale * _LOG2_E, max_programs, batch.page_tables.stride(0), cache.stride(0), cache.stride(1),
        NUM_HEADS=num_heads, HEAD_BLOCKS=head_blocks, HEAD_BLOCK=tiling.rows, RANK=rank, RANK_BLOCK=_block(rank),
        ROPE=rope, ROPE_BLOCK=_block(rope), PAGE_SIZE=cache.shape[1], KEYS=tiling.keys, PRECISION=_precision(out),
        PDL=early, OLD=is_old, BESIDE=beside, COMPILED=out.is_cuda,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=early,
    )  # fmt: skip


@triton.jit
def _prefill_kernel(
    q_ptr, q_rope_ptr, cache_ptr, page_tables_ptr, slots_ptr, lengths_ptr, starts_ptr, blocks_ptr, num_blocks_ptr,
    out_ptr, scale, table_stride, page_stride, token_stride,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr, TILES: tl.constexpr, QUERIES: tl.constexpr, PAGE_SIZE: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one of a block's TILES, of QUERIES tokens each."""
    if PDL:
        await_previous()
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later ones attend to more keys: start them first
    block = tile // TILES
    if block >= tl.load(num_blocks_ptr):
        return
    seq = tl.load(blocks_ptr + 2 * block)
    first_row = tl.load(blocks_ptr + 2 * block + 1) + tile % TILES * QUERIES
    end_row = tl.load(starts_ptr + seq + 1)
    if first_row >= end_row:
        return
    length = tl.load(lengths_ptr + seq)
    rows = first_row + tl.arange(0, QUERIES)
    positions = length - end_row + rows
    dims = tl.arange(0, RANK_BLOCK)
    rope_dims = tl.arange(0, ROPE_BLOCK)
    mask = (rows < end_row)[:, None] & (dims < RANK)[None, :]
    place = ((rows * NUM_HEADS + head) * RANK)[:, None] + dims[None, :]
    q = tl.load(q_ptr + place, mask=mask, other=0.0)
    q_rope = tl.load(
        q_rope_ptr + ((rows * NUM_HEADS + head) * ROPE)[:, None] + rope_dims[None, :],
        mask=(rows < end_row)[:, None] & (rope_dims < ROPE)[None, :], other=0.0,
    )  # fmt: skip
    table = page_tables_ptr + tl.load(slots_ptr + seq) * table_stride
    best = tl.full([QUERIES], _LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, RANK_BLOCK], tl.float32)
    first_position = length - end_row + first_row
    last_key = tl.minimum(first_position + QUERIES, length)
    # Keys before every query of the tile need no causal mask.
    full = first_position // KEYS * KEYS
    page = _pages(table, 0, last_key, PAGE_SIZE, KEYS)
    for start in range(0, full, KEYS):
        acc, total, best, page = _attend(
            q, q_rope, acc, total, best, page, start, positions, last_key, dims, rope_dims, table, cache_ptr,
            page_stride, token_stride, scale, RANK, ROPE, PAGE_SIZE, KEYS, False, PRECISION,
        )  # fmt: skip
    for start in range(full, last_key, KEYS):
        acc, total, best, page = _attend(
            q, q_rope, acc, total, best, page, start, positions, last_key, dims, rope_dims, table, cache_ptr,
            page_stride, token_stride, scale, RANK, ROPE, PAGE_SIZE, KEYS, True, PRECISION,
        )  # fmt: skip
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pages(table, start, last_key, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Where the KEYS keys from position `start` on are."""
    keys = start + tl.arange(0, KEYS)
    return tl.load(table + keys // PAGE_SIZE, mask=keys < last_key, other=0)


@triton.jit
def _attend(
    q, q_rope, acc, total, best, page, start, positions, last_key, dims, rope_dims, table, cache_ptr,
    page_stride, token_stride, scale, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration of the online softmax over the KEYS keys from position `start` on, a multiple of KEYS, in `page`.

    Where the next iteration's keys are is known before it starts, so its loads wait for nothing.
    """
    keys = start + tl.arange(0, KEYS)
    seen = (keys < last_key) | (not MASKED)
    place = (page.to(tl.int64) * page_stride + keys % PAGE_SIZE * token_stride)[:, None]
    latent = tl.load(cache_ptr + place + dims[None, :], mask=seen[:, None] & (dims < RANK)[None, :], other=0.0)
    k_rope = tl.load(
        cache_ptr + place + (RANK + rope_dims)[None, :], mask=seen[:, None] & (rope_dims < ROPE)[None, :], other=0.0
    )
    scores = tl.dot(q_rope, tl.trans(k_rope), input_precision=PRECISION)
    scores = tl.dot(q, tl.trans(latent), scores, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_best[:, None])
    shrink = tl.exp2(best - new_best)
    acc = acc * shrink[:, None] + tl.dot(weights.to(latent.dtype), latent, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(weights, 1), new_best, _pages(table, start + KEYS, last_key, PAGE_SIZE, KEYS)


def _prefill(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float, out: torch.Tensor
) -> None:
    inputs = batch.inputs
    _, num_heads, rank = q_latent.shape
    rope, queries, early = q_rope.shape[2], query_block(cache.shape[2]), pdl(out.device)
    tiling = _tiling(q_latent, q_rope, queries)
    tiles = queries // tiling.rows
    _prefill_kernel[(num_heads, batch.num_blocks * tiles)](
        q_latent, q_rope, cache, batch.page_tables, inputs.slots, inputs.kv_lengths, inputs.query_starts,
        inputs.query_blocks, inputs.num_query_blocks, out,
        scale * _LOG2_E, batch.page_tables.stride(0), cache.stride(0), cache.stride(1),
        NUM_HEADS=num_heads, RANK=rank, RANK_BLOCK=_block(rank), ROPE=rope, ROPE_BLOCK=_block(rope), TILES=tiles,
        QUERIES=tiling.rows, PAGE_SIZE=cache.shape[1], KEYS=tiling.keys, PRECISION=_precision(out),
        PDL=early, num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=early,
    )  # fmt: skip


def _block(size: int) -> int:
    return max(int(triton.next_power_of_2(size)), _MIN_DOT)


def _precision(q: torch.Tensor) -> str:
    """float32 is multiplied as such, not rounded to tf32: it is what parity is measured in."""
    return "ieee" if q.dtype == torch.float32 else "tf32"
