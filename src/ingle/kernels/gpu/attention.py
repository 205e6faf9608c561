"""Paged attention as Triton kernels: split decode attention and ragged prefill attention, both over the same pages.

The online softmax is that of FlashAttention (https://arxiv.org/abs/2205.14135); a decoding sequence's keys are split
over programs, whose partial results the last to arrive joins (https://pytorch.org/blog/flash-decoding). The heads
that share a key head are handled together, so that keys and values are read once. Those that are held in codes prompts
read here too, decoding sequences in `decode_codes`. On Hopper `decode_hopper` takes those that it knows.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.batch import Batch, DecodeWork, query_block
from ingle.kernels.gpu import decode_codes
from ingle.kernels.gpu.device import await_previous, has_warpgroups, num_sms, pdl, shared_memory
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
from ingle.kernels.gpu.shares import join_if_last, leave_part, share_decodes
from ingle.kernels.options import AttentionOptions

_DECODE_KEYS, _DECODE_KEY_BYTES, _DECODE_WARPS, _DECODE_STAGES = 64, 16384, 4, 2
"""Keys of an iteration, and one head's bytes of them, at most."""
_LONE_TILES = 3
"""That a program of a lone sequence reads: fewer programs leave other kernels room, and are joined sooner."""
_WIDE_DECODE_REGISTERS = 168
"""Of a thread, such that an SM's suffice for three programs. Where heads have up to 128 dimensions they need no
more of themselves, and would get slower by being told."""
_PREFILL_STAGES = 2
_MUCH_MEMORY = 128 << 10
"""Of an SM, shared by its programs: 32 keys of 256 dimensions, beside as wide queries, take 104 KiB."""
_LOWEST = tl.constexpr(-1e20)
"""What a prompt's highest score starts from: a number, for a query may see none of the first block's keys."""


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    kv_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `ingle.kernels.reference.paged_attention`: q [T, Hq, D] to [T, Hq, D]."""
    out = torch.empty_like(q)
    work = batch.decode_work.get(options.window)
    is_old = work is not None
    hopper = _hopper(q, kv_cache, kv_scales, options)
    if hopper is not None:
        tiling = hopper.tiling(q, kv_cache, kv_scales)
    else:
        tiling = _decode_tiling(q, kv_cache) if kv_scales is None else decode_codes.tiling(q, kv_cache)
    if batch.num_decodes and work is None:  # the first layer with this window makes it, the others find it
        num_kv_heads, sms = kv_cache.shape[3], num_sms(kv_cache.device)
        # A lone sequence's parts take longer to join than an SM gains by a second program: measured on Hopper.
        programs = 1 if hopper is not None and batch.num_decodes == 1 else tiling.programs
        max_programs = programs * sms // num_kv_heads
        if hopper is not None and batch.most_keys:
            max_programs = min(max_programs, triton.cdiv(batch.most_keys, _LONE_TILES * tiling.keys))
        work = share_decodes(batch, num_kv_heads, max_programs, tiling.keys, options.window)
        batch.decode_work[options.window] = work
    if batch.num_blocks:
        _prefill(q, kv_cache, kv_scales, batch, options, sinks, out)
    if work is not None and hopper is not None:
        hopper.decode(q, (kv_cache, kv_scales), batch, work, options, sinks, out, is_old=is_old)
    elif work is not None and kv_scales is not None:
        decode_codes.decode(q, (kv_cache, kv_scales), batch, work, options, sinks, out, is_old=is_old)
    elif work is not None:
        _decode(q, kv_cache, batch, work, options, sinks, out, is_old=is_old)
    return out


def _hopper(
    q: torch.Tensor, kv_cache: torch.Tensor, kv_scales: torch.Tensor | None, options: AttentionOptions
) -> ModuleType | None:
    """`decode_hopper`, imported where it is used alone: what takes these, or None."""
    if not has_warpgroups(q.device):
        return None
    from ingle.kernels.gpu import decode_hopper

    return decode_hopper if decode_hopper.fits(q, kv_cache, kv_scales, options.window) else None


def _decode_tiling(q: torch.Tensor, kv_cache: torch.Tensor) -> DecodeTiling:
    """An SM's registers suffice for three programs on Hopper, with up to 16 query heads to a key head, else for two."""
    row_bytes, head_block = _row_bytes(kv_cache), head_rows(q.shape[1], kv_cache.shape[3])
    keys = min(max(_DECODE_KEY_BYTES // row_bytes, MIN_DOT), _DECODE_KEYS)
    rows = (_DECODE_STAGES - 1) * (2 * keys + head_block) + 2 * head_block
    by_registers = 3 if pdl(kv_cache.device) and head_block == MIN_DOT else 2
    programs = min(max(shared_memory(kv_cache.device) // (rows * row_bytes + 1024), 1), by_registers)
    registers = _WIDE_DECODE_REGISTERS if q.shape[-1] > 128 else None
    return DecodeTiling(keys, _DECODE_WARPS, _DECODE_STAGES, programs, registers)


def _row_bytes(kv_cache: torch.Tensor) -> int:
    """Bytes of one head's key, as it lies in an SM's memory."""
    return dim_block(kv_cache.shape[-1]) * kv_cache.itemsize


@triton.jit
def _decode_kernel(
    q_ptr, kv_ptr, page_tables_ptr, lengths_ptr, slots_ptr, starts_ptr, num_iterations_ptr, arrived_ptr, parts_ptr,
    sums_ptr, out_ptr, sinks_ptr, scale, cap, max_programs, table_stride, v_offset, page_stride, token_stride,
    head_stride, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PDL: tl.constexpr, OLD: tl.constexpr, BESIDE: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """A program walks through its share of all sequences' keys, which may begin and end amid a sequence."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
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
    # Products of numbers of iterations need 64 bits; what is kept through the loop does not, and registers are scarce.
    begin = (program * num_iterations // num_programs).to(tl.int32)
    end = ((program + 1) * num_iterations // num_programs).to(tl.int32)
    rows = tl.arange(0, HEAD_BLOCK)
    dims = tl.arange(0, DIM_BLOCK)
    in_head = dims < HEAD_DIM
    in_group = rows < GROUP
    mask = in_group[:, None] & in_head[None, :]
    heads = kv_head * GROUP + rows
    if sinks_ptr is not None:
        sinks = load_sinks(sinks_ptr + heads, in_group)
    own_ptr = kv_ptr + kv_head * head_stride
    keys = tl.arange(0, KEYS)
    page = tl.load(page_tables_ptr + slot * table_stride + (key + keys) // PAGE_SIZE, mask=key + keys < length, other=0)
    # Of the sequence that it begins in, and that it is in: the iteration of all which reads its first keys; and how
    # many programs arrived at it before this one, or -1.
    key_in_sequence = key - tl.maximum(length - WINDOW, 0) if WINDOW else key
    from_start = key_in_sequence == 0
    seq_begin = begin - key_in_sequence // KEYS
    first_seq, first_length, first_begin = seq, length, seq_begin
    first_arrived = -1
    arrived = -1
    if PDL and OLD and not BESIDE:
        await_previous()
    best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    for iteration in range(begin, end):
        place = (page.to(tl.int64) * page_stride + ((key + keys) % PAGE_SIZE) * token_stride)[:, None] + dims[None, :]
        kv_mask = (key + keys < length)[:, None] & in_head[None, :]
        k = tl.load(own_ptr + place, mask=kv_mask, other=0.0)
        v = tl.load(own_ptr + v_offset + place, mask=kv_mask, other=0.0)
        q = tl.load(q_ptr + (seq * NUM_HEADS + heads[:, None]) * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if CAPPED:
            scores = capped(scores, cap, COMPILED)
        scores = tl.where((key + keys < length)[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        ends = key + KEYS >= length
        if ends | (iteration == end - 1):
            all_total = total
            if sinks_ptr is not None:  # once, where all of a sequence is there: else where its parts are joined
                all_total = tl.where(ends & from_start, with_sinks(total, new_best, sinks, COMPILED), total)
            result = acc / all_total[:, None]
            if ends & from_start:
                row = seq * NUM_HEADS + heads
                value = result.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], value, mask=mask)
            else:  # a program leaves two parts at most: a sequence's later keys, then another's first ones
                num_before = leave_part(
                    result, new_best + tl.log2(total), (2 * program + from_start.to(tl.int32)) * NUM_HEADS + heads,
                    parts_ptr, sums_ptr, arrived_ptr + seq * NUM_KV_HEADS + kv_head, in_group, dims, mask,
                    HEAD_DIM, COMPILED,
                )  # fmt: skip
                first_arrived = tl.where(from_start, first_arrived, num_before)
                arrived = tl.where(from_start, num_before, arrived)
        # Nothing of a sequence may reach the next one, and 0 times its NaN would.
        best = tl.where(ends, float("-inf"), new_best)
        total = tl.where(ends, 0.0, total)
        acc = tl.where(ends, 0.0, acc)
        if ends & (iteration < end - 1):  # the next sequence has keys, too: those without come last
            seq += 1
            seq_begin = iteration + 1
            slot = tl.load(slots_ptr + seq)
            length = tl.load(lengths_ptr + seq).to(tl.int32)
            key = tl.maximum(length - WINDOW, 0) if WINDOW else 0
            from_start = from_start | True  # of the type that it had
        else:
            key += KEYS
        # Where the next iteration's keys are is known before it starts, so its loads wait for nothing.
        page = tl.load(
            page_tables_ptr + slot * table_stride + (key + keys) // PAGE_SIZE, mask=key + keys < length, other=0
        )
    for is_last in tl.static_range(2):
        join_if_last(
            first_arrived if not is_last else arrived, first_seq if not is_last else seq,
            first_begin if not is_last else seq_begin, first_length if not is_last else length,
            arrived_ptr, parts_ptr, sums_ptr, out_ptr, num_iterations, num_programs, kv_head, heads, in_group, dims,
            mask, sinks_ptr, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HEAD_BLOCK, DIM_BLOCK, KEYS, WINDOW, COMPILED,
        )  # fmt: skip


def _decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    work: DecodeWork,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    *,
    is_old: bool,
) -> None:
    """`is_old`: another kernel ran since the one that made `work`.

    Beside a kernel that reads prompts this one starts while that is at its work, and has one more program a head: those
    do nothing but wait for it, so that whoever waits for this kernel has waited for both.
    """
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    max_programs = len(work.starts)
    parts = torch.empty(2 * max_programs, num_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(2 * max_programs, num_heads, dtype=torch.float32, device=q.device)
    early, tiling = pdl(q.device), _decode_tiling(q, kv_cache)
    beside = early and batch.num_blocks > 0
    _decode_kernel[(num_kv_heads, max_programs + beside)](
        q, kv_cache, batch.page_tables, batch.inputs.decode_lengths, batch.inputs.slots, work.starts,
        work.num_iterations, work.arrived, parts, sums, out, sinks,
        *scale_and_cap(options), max_programs, batch.page_tables.stride(0), *kv_cache.stride()[:4],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, DIM_BLOCK=dim_block(head_dim),
        HEAD_BLOCK=head_rows(num_heads, num_kv_heads), PAGE_SIZE=page_size,
        KEYS=tiling.keys, PRECISION=precision(q), WINDOW=options.window or 0,
        CAPPED=options.softcap is not None, PDL=early, OLD=is_old, BESIDE=beside, COMPILED=q.is_cuda,
        num_warps=tiling.warps, num_stages=tiling.stages, launch_pdl=early, maxnreg=tiling.registers,
    )  # fmt: skip


@triton.jit
def _prefill_kernel(
    q_ptr, kv_ptr, page_tables_ptr, slots_ptr, lengths_ptr, starts_ptr, blocks_ptr,
    num_blocks_ptr, out_ptr, sinks_ptr, scale, cap, table_stride, v_offset, page_stride, token_stride, head_stride,
    scales,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr, COMPILED: tl.constexpr,
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
    WIDTH: tl.constexpr = HEAD_DIM // 2 if KIND else HEAD_DIM
    in_head = dims < WIDTH
    mask = (rows < end_row)[:, None] & in_head[None, :]
    place = (rows[:, None] * NUM_HEADS + head) * HEAD_DIM + dims[None, :]
    q = load_halves(q_ptr + place, mask, WIDTH, KIND)
    scales_ptr, value_scales_at, scale_page_stride, scale_head_stride = scales
    scales_ptr += kv_head * scale_head_stride
    table = page_tables_ptr + tl.load(slots_ptr + seq) * table_stride
    best = tl.full([QUERIES], _LOWEST, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = no_sums(QUERIES, DIM_BLOCK, KIND)
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
                q, acc, total, best, start, positions, last_key, dims, in_head, table, kv_ptr, v_offset,
                page_stride, token_stride, kv_head * head_stride, scales_ptr, value_scales_at, scale_page_stride,
                scale, cap, PAGE_SIZE, KEYS, True, PRECISION, WINDOW, CAPPED, KIND, COMPILED,
            )  # fmt: skip
        begin = tl.maximum(begin, inside)
    for start in range(begin, full, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start, positions, last_key, dims, in_head, table, kv_ptr, v_offset,
            page_stride, token_stride, kv_head * head_stride, scales_ptr, value_scales_at, scale_page_stride,
            scale, cap, PAGE_SIZE, KEYS, False, PRECISION, WINDOW, CAPPED, KIND, COMPILED,
        )  # fmt: skip
    for start in range(full, last_key, KEYS):
        acc, total, best = _attend(
            q, acc, total, best, start, positions, last_key, dims, in_head, table, kv_ptr, v_offset,
            page_stride, token_stride, kv_head * head_stride, scales_ptr, value_scales_at, scale_page_stride,
            scale, cap, PAGE_SIZE, KEYS, True, PRECISION, WINDOW, CAPPED, KIND, COMPILED,
        )  # fmt: skip
    if sinks_ptr is not None:
        total = with_sinks(total, best, load_sinks(sinks_ptr + head, True), COMPILED)
    store_halves(out_ptr + place, over(acc, total, KIND), mask, WIDTH, KIND)


@triton.jit
def _attend(
    q, acc, total, best, start, positions, last_key, dims, in_head, table, kv_ptr,
    v_offset, page_stride, token_stride, head_offset, scales_ptr, value_scales_at, scale_page_stride, scale, cap,
    PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    CAPPED: tl.constexpr, KIND: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """One iteration of the online softmax over the KEYS keys from position `start` on, a multiple of KEYS."""
    index = tl.arange(0, KEYS)
    keys = start + index
    seen = keys < last_key
    if MASKED and WINDOW:  # what lies before every query's window may be anywhere
        seen = seen & (keys > tl.min(positions, 0) - WINDOW)
    if KEYS % PAGE_SIZE == 0:  # what differs from iteration to iteration is the pages alone
        page = tl.load(table + start // PAGE_SIZE + index // PAGE_SIZE, mask=seen | (not MASKED), other=0)
        within = index % PAGE_SIZE
    else:
        page = tl.load(table + keys // PAGE_SIZE, mask=seen | (not MASKED), other=0)
        within = keys % PAGE_SIZE
    place = (kv_ptr + head_offset + page.to(tl.int64) * page_stride)[:, None] + (
        (within * token_stride)[:, None] + dims[None, :]
    )
    mask = (seen[:, None] | (not MASKED)) & in_head[None, :]
    k = tl.load(place, mask=mask, other=0)
    scores = products(q, k, KIND, PRECISION, COMPILED)
    value_scales = 0.0
    if KIND:
        key_scales, value_scales, more = load_scales(
            scales_ptr + page.to(tl.int64) * scale_page_stride + within, value_scales_at, seen | (not MASKED), scale,
            KIND,
        )  # fmt: skip
        scores *= key_scales[None, :]
    elif CAPPED:
        scores *= scale
    if CAPPED:
        scores = capped(scores, cap, COMPILED)
    if MASKED:
        visible = keys[None, :] <= positions[:, None]
        if WINDOW:
            visible = visible & (keys[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    factor = 1.0 if CAPPED or KIND else scale  # multiplied as it is subtracted, in one instruction
    new_best = tl.maximum(best, tl.max(scores + more[None, :] if KIND else scores, 1) * factor)
    weights = exp2(scores * factor - new_best[:, None], COMPILED)
    shrink = exp2(best - new_best, COMPILED)
    v = tl.load(place + v_offset, mask=mask, other=0)
    acc = add_values(acc, shrink, weights, v, value_scales, q[0].dtype, KIND, PRECISION, COMPILED)
    return acc, total * shrink + tl.sum(weights, 1), new_best


class _PrefillTiling(NamedTuple):
    """How a block of `query_block` queries goes through its keys."""

    keys: int
    """That one iteration reads."""
    warps: int
    registers: int | None = None
    """That a thread may have at most."""


def _prefill_tiling(q: torch.Tensor, *, coded: bool) -> _PrefillTiling:
    """More programs side by side hide what each waits for; heads of 256 dimensions leave an SM room for one.

    Codes go through registers on their way to the tensor cores, as many as possible at once.
    """
    block = dim_block(q.shape[-1])
    hopper = pdl(q.device) and q.itemsize == 2
    if block > 128:
        fits = coded or shared_memory(q.device) >= _MUCH_MEMORY
        return _PrefillTiling(keys=64 if hopper else 32 if fits else 16, warps=8)
    if block == 128 and hopper and coded:
        return _PrefillTiling(keys=128, warps=4)
    if block == 128 and hopper:
        return _PrefillTiling(keys=32, warps=4, registers=128)
    return _PrefillTiling(keys=64, warps=4)


def _prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    kv_scales: torch.Tensor | None,
    batch: Batch,
    options: AttentionOptions,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    inputs = batch.inputs
    _, num_heads, head_dim = q.shape
    page_size, num_kv_heads = kv_cache.shape[2:4]
    early, tiling, held = pdl(q.device), _prefill_tiling(q, coded=kv_scales is not None), words(kv_cache, kv_scales)
    _prefill_kernel[(num_heads, batch.num_blocks)](
        q, held, batch.page_tables, inputs.slots, inputs.kv_lengths, inputs.query_starts, inputs.query_blocks,
        inputs.num_query_blocks, out, sinks,
        *scale_and_cap(options), batch.page_tables.stride(0), *held.stride()[:4], scales(kv_scales, q),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block(held.shape[-1]), QUERIES=query_block(head_dim), PAGE_SIZE=page_size,
        KEYS=tiling.keys, PRECISION=precision(q), WINDOW=options.window or 0, CAPPED=options.softcap is not None,
        KIND=kind_of(kv_cache, kv_scales), PDL=early, COMPILED=q.is_cuda,
        num_warps=tiling.warps, num_stages=_PREFILL_STAGES, launch_pdl=early, maxnreg=tiling.registers,
    )  # fmt: skip
