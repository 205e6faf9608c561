"""Equal shares of all decoding sequences' keys: where a program's share starts, and how parts of a sequence are joined.

A sequence's keys are split over programs, whose partial results the last to arrive joins
(https://pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.batch import Batch, DecodeWork
from ingle.kernels.gpu.device import arrivals, await_previous, barrier, pdl
from ingle.kernels.gpu.heads import load_sinks, with_sinks


@triton.jit
def _share_kernel(
    lengths_ptr, slots_ptr, starts_ptr, num_iterations_ptr, num_seqs, max_programs,
    SEQS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Writes where the programs of a decode kernel start; each program here does those that start in its sequence."""
    if PDL:
        await_previous()
    seq = tl.program_id(0)
    seqs = tl.arange(0, SEQS)
    lengths = tl.load(lengths_ptr + seqs, mask=seqs < num_seqs, other=0)
    if WINDOW:
        lengths = tl.minimum(lengths, WINDOW)
    counts = tl.cdiv(lengths, KEYS)
    num_iterations = tl.sum(counts, 0)
    before = tl.sum(tl.where(seqs < seq, counts, 0), 0)
    after = before + tl.sum(tl.where(seqs == seq, counts, 0), 0)
    slot, length = tl.load(slots_ptr + seq), tl.load(lengths_ptr + seq)
    first_key = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    if seq == 0:
        tl.store(num_iterations_ptr, num_iterations)
    if after > before:
        num_programs = tl.minimum(num_iterations, max_programs)
        begin, end = tl.cdiv(before * num_programs, num_iterations), tl.cdiv(after * num_programs, num_iterations)
        for start in range(begin, end, BLOCK):
            program = start + tl.arange(0, BLOCK)
            key = first_key + (program * num_iterations // num_programs - before) * KEYS
            place = starts_ptr + program * 4
            tl.store(place, seq, mask=program < end)
            tl.store(place + 1, key, mask=program < end)
            tl.store(place + 2, slot, mask=program < end)
            tl.store(place + 3, length, mask=program < end)


def share_decodes(batch: Batch, num_kv_heads: int, max_programs: int, keys: int, window: int | None) -> DecodeWork:
    """Equal shares of the keys that a batch's decoding sequences see, for at most `max_programs` for each key head.

    An iteration of a program reads `keys` of them.
    """
    lengths = batch.inputs.decode_lengths[: batch.num_decodes]
    num_seqs, device = len(lengths), lengths.device
    max_programs = max(max_programs, 1)
    starts = torch.empty(max_programs, 4, dtype=torch.int32, device=device)
    num_iterations = torch.empty(1, dtype=torch.int64, device=device)
    size = num_seqs * num_kv_heads
    arrived = arrivals(device, max(triton.next_power_of_2(size), 1 << 12))[:size].view(num_seqs, num_kv_heads)
    early = pdl(device)
    _share_kernel[(num_seqs,)](
        lengths, batch.inputs.slots, starts, num_iterations, num_seqs, max_programs,
        SEQS=triton.next_power_of_2(num_seqs), KEYS=keys, BLOCK=128, WINDOW=window or 0, PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return DecodeWork(starts, num_iterations, arrived)


@triton.jit
def leave_part(
    result, log_sum, place, parts_ptr, sums_ptr, arrived_ptr, in_group, dims, mask,
    HEAD_DIM: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Writes a part, and returns how many of its sequence's parts are done already."""
    tl.store(parts_ptr + place[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
    return leave_sum(log_sum, place, sums_ptr, arrived_ptr, in_group, COMPILED)


@triton.jit
def leave_sum(log_sum, place, sums_ptr, arrived_ptr, in_group, COMPILED: tl.constexpr):
    """The end of `leave_part`, for who wrote the part."""
    tl.store(sums_ptr + place, log_sum, mask=in_group)
    barrier(COMPILED)  # the whole program's stores come before its arrival
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel")


@triton.jit
def join_if_last(
    arrived, seq, seq_begin, length, arrived_ptr, parts_ptr, sums_ptr, out_ptr, num_iterations, num_programs, kv_head,
    heads, in_group, dims, mask, sinks_ptr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """Where all programs with a part of a sequence arrived before this one: joins them, and resets their counter.

    sinks_ptr: `ingle.kernels.reference.paged_attention`'s, which are in no part; or None.
    """
    if arrived > 0:
        num_keys = tl.minimum(length, WINDOW) if WINDOW else length
        seq_end = seq_begin + tl.cdiv(num_keys, KEYS)
        first_program = tl.cdiv((seq_begin + 1).to(tl.int64) * num_programs, num_iterations) - 1
        last_program = tl.cdiv(seq_end.to(tl.int64) * num_programs, num_iterations) - 1
        if arrived == last_program - first_program:
            _join(
                parts_ptr, sums_ptr, out_ptr, first_program, last_program, seq * NUM_HEADS + heads, heads, in_group,
                dims, mask, sinks_ptr, NUM_HEADS, HEAD_DIM, HEAD_BLOCK, DIM_BLOCK, COMPILED,
            )  # fmt: skip
            tl.store(arrived_ptr + seq * NUM_KV_HEADS + kv_head, 0)


@triton.jit
def _join(
    parts_ptr, sums_ptr, out_ptr, first_program, last_program, row, heads, in_group, dims, mask, sinks_ptr,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    """Joins a sequence's parts, each weighing the sum of its exponentials. Other programs wrote them: not from L1."""
    best = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    for program in range(first_program, last_program + 1):
        place = (2 * program + (program == first_program).to(tl.int64)) * NUM_HEADS + heads
        log_sum = tl.load(sums_ptr + place, mask=in_group, other=0.0, cache_modifier=".cg")
        part = tl.load(
            parts_ptr + place[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        new_best = tl.maximum(best, log_sum)
        shrink = tl.exp2(best - new_best)
        weight = tl.exp2(log_sum - new_best)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        best = new_best
    if sinks_ptr is not None:
        total = with_sinks(total, best, load_sinks(sinks_ptr + heads, in_group), COMPILED)
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + dims[None, :], result, mask=mask)
