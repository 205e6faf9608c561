"""Attention of decoding sequences to keys and values in codes, as a Triton kernel.

Half the bytes leave half the time, and what a tile of keys costs beside its bytes is the limit then: instructions, and
warps that wait for each other. So tiles are larger, and a sequence's keys are a loop of their own, before which its
queries are read and after which its results are written. How shares are cut and joined is as in `attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.batch import Batch, DecodeWork
from ingle.kernels.gpu.device import await_previous, pdl, shared_memory
from ingle.kernels.gpu.heads import (
    MIN_DOT,
    DecodeTiling,
    capped,
    dim_block,
    exp2,
    head_rows,
    load_sinks,
    precision,
    scale_and_cap,
    with_sinks,
)
from ingle.kernels.gpu.kv_codes import (
    add_values,
    kind_of,
    load_halves,
    load_scales,
    no_sums,
    over,
    products,
    scales,
    store_halves,
    words,
)  # fmt: skip
from ingle.kernels.gpu.shares import join_if_last, leave_sum
from ingle.kernels.options import AttentionOptions

_KEYS, _WARPS, _STAGES, _PROGRAMS, _REGISTERS = 128, 4, 2, 3, 168
"""Of a program whose queries are 16 rows of 128 dimensions; registers of a thread."""


@triton.jit
def _decode_codes_kernel(
    q_ptr, kv_ptr, page_tables_ptr, lengths_ptr, slots_ptr, starts_ptr, num_iterations_ptr, arrived_ptr, parts_ptr,
    sums_ptr, out_ptr, sinks_ptr, scale, cap, max_programs, table_stride, v_offset, page_stride, token_stride,
    head_stride, scales,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr, OLD: tl.constexpr,
    BESIDE: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """A program walks through its share of all sequences' keys, which may begin and end amid a sequence.

    Columns are the two halves of a head's; `scales`: what `kv_codes.scales` gives.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    WIDTH: tl.constexpr = HEAD_DIM // 2
    kv_head = tl.program_id(0)
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
    rows = tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    all_dims = tl.arange(0, 2 * DIM_BLOCK)
    keys = tl.arange(0, KEYS)
    in_group = rows < GROUP
    mask = in_group[:, None] & (dims < WIDTH)[None, :]
    all_mask = in_group[:, None] & (all_dims < HEAD_DIM)[None, :]
    in_words = (dims < WIDTH)[None, :]
    heads = kv_head * GROUP + rows
    own_ptr = kv_ptr + kv_head * head_stride
    scales_ptr, value_scales_at, scale_page_stride, scale_head_stride = scales
    own_scales_ptr = scales_ptr + kv_head * scale_head_stride
    if PDL and OLD and not BESIDE:
        await_previous()
    while iteration < end:  # of a sequence what is in the share; it has keys: sequences without come last
        first_seen = tl.maximum(length - WINDOW, 0) if WINDOW else 0
        from_start = key == first_seen
        first_iteration = iteration - (key - first_seen) // KEYS
        num_parts = tl.minimum(tl.cdiv(length - key, KEYS), end - iteration)
        row = seq * NUM_HEADS + heads
        q = load_halves(q_ptr + row[:, None] * HEAD_DIM + dims[None, :], mask, WIDTH, KIND)
        best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([HEAD_BLOCK], tl.float32)
        acc = no_sums(HEAD_BLOCK, DIM_BLOCK, KIND)
        table = page_tables_ptr + slot * table_stride
        page = tl.load(table + (key + keys) // PAGE_SIZE, mask=key + keys < length, other=0)
        for start in range(key, key + num_parts * KEYS, KEYS):
            at = start + keys
            # Without a mask: all codes are numbers, and a scale of 0 makes them nothing, in the reserved page too.
            place = (page.to(tl.int64) * page_stride + (at % PAGE_SIZE) * token_stride)[:, None] + dims[None, :]
            k = tl.load(own_ptr + place, mask=in_words, other=0)
            v = tl.load(own_ptr + v_offset + place, mask=in_words, other=0)
            scale_ptr = own_scales_ptr + page.to(tl.int64) * scale_page_stride + at % PAGE_SIZE
            key_scales, value_scales, more = load_scales(scale_ptr, value_scales_at, at < length, scale, KIND)
            # Where the next iteration's keys are is known before it starts, so its loads wait for nothing.
            page = tl.load(table + (at + KEYS) // PAGE_SIZE, mask=at + KEYS < length, other=0)
            scores = products(q, k, KIND, PRECISION, COMPILED) * key_scales[None, :]
            if CAPPED:
                scores = capped(scores, cap, COMPILED)
            scores += tl.where(at < length, 0.0, float("-inf"))[None, :]
            new_best = tl.maximum(best, tl.max(scores + more[None, :], 1))
            weights = exp2(scores - new_best[:, None], COMPILED)
            shrink = exp2(best - new_best, COMPILED)
            acc = add_values(acc, shrink, weights, v, value_scales, q[0].dtype, KIND, PRECISION, COMPILED)
            total = total * shrink + tl.sum(weights, 1)
            best = new_best
        key += num_parts * KEYS
        all_total = total
        if sinks_ptr is not None:  # once, where all of a sequence is there: else where its parts are joined
            sinks = load_sinks(sinks_ptr + heads, in_group)
            all_total = tl.where(from_start & (key >= length), with_sinks(total, best, sinks, COMPILED), total)
        result = over(acc, all_total, KIND)
        if from_start & (key >= length):
            store_halves(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], result, mask, WIDTH, KIND)
        else:  # a program leaves two parts at most: a sequence's later keys, then another's first ones
            part = (2 * program + from_start.to(tl.int32)) * NUM_HEADS + heads
            store_halves(parts_ptr + part[:, None] * HEAD_DIM + dims[None, :], result, mask, WIDTH, KIND)
            num_before = leave_sum(
                best + tl.log2(total), part, sums_ptr, arrived_ptr + seq * NUM_KV_HEADS + kv_head, in_group, COMPILED
            )  # fmt: skip
            join_if_last(
                num_before, seq, first_iteration, length, arrived_ptr, parts_ptr, sums_ptr, out_ptr, num_iterations,
                num_programs, kv_head, heads, in_group, all_dims, all_mask, sinks_ptr,
                NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_BLOCK, 2 * DIM_BLOCK, KEYS, WINDOW, COMPILED,
            )  # fmt: skip
        iteration += num_parts
        if iteration < end:
            seq += 1
            slot = tl.load(slots_ptr + seq)
            length = tl.load(lengths_ptr + seq).to(tl.int32)
            key = tl.maximum(length - WINDOW, 0) if WINDOW else 0


def tiling(q: torch.Tensor, kv_cache: torch.Tensor) -> DecodeTiling:
    """What an SM's registers and shared memory have room for: three programs, or fewer of wide or many heads."""
    row_bytes, rows = dim_block(kv_cache.shape[-1]), head_rows(q.shape[1], kv_cache.shape[3])
    size = max(rows * row_bytes // (MIN_DOT * 128), 1)  # of a row of queries, in what three programs have room for
    keys = max(_KEYS // size, MIN_DOT)
    num_bytes = ((_STAGES - 1) * 2 * keys + 2 * rows) * row_bytes + 2048
    by_registers = _PROGRAMS if pdl(kv_cache.device) and size == 1 else 2
    programs = min(max(shared_memory(kv_cache.device) // num_bytes, 1), by_registers)
    return DecodeTiling(keys, _WARPS, _STAGES, programs, _REGISTERS if programs == _PROGRAMS else None)


def decode(
    q: torch.Tensor,
    held: tuple[torch.Tensor, torch.Tensor],
    batch: Batch,
    work: DecodeWork,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    *,
    is_old: bool,
) -> None:
    """`held`: codes and their scales; `is_old`, and what is done beside a kernel that reads prompts: as
    `attention._decode` has it."""
    kv_cache, kv_scales = held
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    max_programs, codes, shape = len(work.starts), words(kv_cache, kv_scales), tiling(q, kv_cache)
    parts = torch.empty(2 * max_programs, num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(2 * max_programs, num_heads, dtype=torch.float32, device=q.device)
    early = pdl(q.device)
    beside = early and batch.num_blocks > 0
    _decode_codes_kernel[(num_kv_heads, max_programs + beside)](
        q, codes, batch.page_tables, batch.inputs.decode_lengths, batch.inputs.slots, work.starts,
        work.num_iterations, work.arrived, parts, sums, out, sinks,
        *scale_and_cap(options), max_programs, batch.page_tables.stride(0), *codes.stride()[:4], scales(kv_scales, q),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIM_BLOCK=dim_block(head_dim // 2),
        HEAD_BLOCK=head_rows(num_heads, num_kv_heads), PAGE_SIZE=page_size,
        KEYS=shape.keys, PRECISION=precision(q), WINDOW=options.window or 0, CAPPED=options.softcap is not None,
        KIND=kind_of(kv_cache, kv_scales), PDL=early, OLD=is_old, BESIDE=beside, COMPILED=q.is_cuda,
        num_warps=shape.warps, num_stages=shape.stages, launch_pdl=early, maxnreg=shape.registers,
    )  # fmt: skip
