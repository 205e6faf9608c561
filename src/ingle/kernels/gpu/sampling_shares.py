"""Draws where each rank has the logits of a part of the vocabulary: without bringing them together.

Each rank gives every block of its part its largest logit and its mass, as `sampling` does. All ranks get those of all
blocks, and so agree on the block in which a token is drawn; whose block that is finds the token, and tells the others.
That is two sums of some numbers in place of a gather of all logits. The token is that of whole logits, but where blocks
begin elsewhere, by the rounding of their masses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.sampling import _FLOATS, _INTS, _mass, _pick, _relative, _share, _survey_kernel, _uniform, sample
from ingle.kernels.gpu.strips import BLOCK, strip_size
from ingle.kernels.group import LogitsShare
from ingle.kernels.sampling import Features, Samples, SamplingTables

_STATS = tl.constexpr(5)
"""Of a block, as float32 that a sum with zeros leaves exact: its largest logit, where that is in the rank's part, its
mass in two pieces, and its plain sum."""
_PIECE = tl.constexpr(1 << 21)


def sample_share(
    share: LogitsShare, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables, features: Features
) -> Samples:
    """As `ingle.kernels.reference_sampling.sample_share`."""
    if features != Features():
        return sample(share.whole(), slots, positions, tables, features)
    logits, group = share.own(), share.group
    stats = group.all_reduce(_survey(share, logits, slots, positions, tables))
    told, finite = _draw(share, logits, stats, slots, positions, tables)
    return Samples(group.all_reduce(told)[: len(logits)].long(), finite)


def _survey(
    share: LogitsShare, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """What this rank knows of the blocks of its part, and zeros for those of others."""
    (num_rows, size), width, device = logits.shape, share.logits.shape[1], logits.device
    num_blocks, early, group = triton.cdiv(width, BLOCK), pdl(device), share.group
    best, check = (torch.empty(num_rows, num_blocks, device=device) for _ in range(2))
    best_ids = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    mass = torch.empty(num_rows, num_blocks, dtype=torch.int64, device=device)
    _survey_kernel[num_rows, num_blocks](
        logits, slots, positions, tables.floats, tables.ints, *(best_ids,) * 5, logits, best, best_ids, mass, check,
        best, VOCAB=size, WORDS=triton.cdiv(size, 32), BLOCK=BLOCK, STRIP=strip_size(size),
        FILTERED=False, ADJUSTED=False, MASKED=False, PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    stats = torch.empty(_aligned(num_rows * group.size * _STATS.value * num_blocks), device=device)
    _tell_kernel[num_rows, group.size](
        best, best_ids, mass, check, slots, tables.floats, stats, NUM_BLOCKS=num_blocks,
        BLOCKS=triton.next_power_of_2(num_blocks), PLACE=group.place, PDL=early, num_warps=1, launch_pdl=early,
    )  # fmt: skip
    return stats


def _draw(
    share: LogitsShare,
    logits: torch.Tensor,
    stats: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SamplingTables,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 of each row, whose sum over the ranks is its token, and whether its logits were finite."""
    (num_rows, size), width, group, early = logits.shape, share.logits.shape[1], share.group, pdl(logits.device)
    num_blocks = triton.cdiv(width, BLOCK)
    told = torch.empty(_aligned(num_rows), device=logits.device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=logits.device)
    _draw_share_kernel[(num_rows,)](
        logits, slots, positions, tables.floats, tables.ints, stats, told, finite,
        SIZE=size, WIDTH=width, VOCAB=share.vocab_size, BLOCK=BLOCK, NUM_BLOCKS=num_blocks,
        BLOCKS=triton.next_power_of_2(group.size * num_blocks), PLACE=group.place, RANKS=group.size, PDL=early,
        num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return told, finite


def _aligned(count: int) -> int:
    """As the ranks' own kernels want it for a sum."""
    return -(-count // 4) * 4


@triton.jit
def _tell_kernel(
    best_ptr, best_id_ptr, mass_ptr, check_ptr, slots_ptr, floats_ptr, stats_ptr,
    NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, PLACE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What this rank knows of a row, and zeros in the places of others: [row, place, stat, block]."""
    if PDL:
        await_previous()
    row, place = tl.program_id(0), tl.program_id(1)
    blocks = tl.arange(0, BLOCKS)
    mask = blocks < NUM_BLOCKS
    known = mask & (place == PLACE)
    source = row * NUM_BLOCKS + blocks
    mass = tl.load(mass_ptr + source, mask=known, other=0)
    if tl.load(floats_ptr + tl.load(slots_ptr + row) * _FLOATS) <= 0:
        mass = mass * 0  # of a row that is not drawn there is none
    out = stats_ptr + (row * tl.num_programs(1) + place) * _STATS * NUM_BLOCKS + blocks
    tl.store(out, tl.load(best_ptr + source, mask=known, other=0.0), mask=mask)
    tl.store(out + NUM_BLOCKS, tl.load(best_id_ptr + source, mask=known, other=0).to(tl.float32), mask=mask)
    tl.store(out + 2 * NUM_BLOCKS, (mass // _PIECE).to(tl.float32), mask=mask)
    tl.store(out + 3 * NUM_BLOCKS, (mass % _PIECE).to(tl.float32), mask=mask)
    tl.store(out + 4 * NUM_BLOCKS, tl.load(check_ptr + source, mask=known, other=0.0), mask=mask)


@triton.jit
def _draw_share_kernel(
    logits_ptr, slots_ptr, positions_ptr, floats_ptr, ints_ptr, stats_ptr, told_ptr, finite_ptr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, PLACE: tl.constexpr, RANKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row's token by the rank that has it, 0 by others. The likeliest, which all know, is told by the first."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    temperature = tl.load(floats_ptr + slot * _FLOATS)
    blocks = tl.arange(0, BLOCKS)
    places, real = blocks // NUM_BLOCKS, blocks < RANKS * NUM_BLOCKS
    stats = stats_ptr + (row * RANKS + places) * _STATS * NUM_BLOCKS + blocks % NUM_BLOCKS
    check = tl.sum(tl.load(stats + 4 * NUM_BLOCKS, mask=real, other=0.0), 0)
    tl.store(finite_ptr + row, tl.abs(check) < float("inf"))  # not so for NaN either
    block_best = tl.load(stats, mask=real, other=float("-inf"))
    best = tl.max(block_best, 0)
    best_ids = places * WIDTH + tl.load(stats + NUM_BLOCKS, mask=real, other=0.0).to(tl.int32)
    likeliest = tl.min(tl.where((block_best == best) & real, best_ids, VOCAB), 0)
    likeliest = tl.where(likeliest < VOCAB, likeliest, 0)
    told = tl.where(PLACE == 0, likeliest, 0)
    if temperature > 0:
        number = _uniform(tl.load(ints_ptr + slot * _INTS), tl.load(positions_ptr + row))
        high = tl.load(stats + 2 * NUM_BLOCKS, mask=real, other=0.0).to(tl.int64)
        block_mass = high * _PIECE + tl.load(stats + 3 * NUM_BLOCKS, mask=real, other=0.0).to(tl.int64)
        masses = _relative(block_best, block_mass, best, temperature)
        cumulative = tl.cumsum(masses, 0)
        target = _share(number, tl.sum(masses, 0))
        block = tl.minimum(tl.sum((cumulative <= target).to(tl.int32), 0), RANKS * NUM_BLOCKS - 1)
        chosen = blocks == block
        told = tl.zeros_like(likeliest)
        if block // NUM_BLOCKS == PLACE:
            left = target - tl.max(tl.where(blocks < block, cumulative, 0), 0)
            share = left.to(tl.float64) / tl.maximum(tl.max(tl.where(chosen, masses, 0), 0), 1).to(tl.float64)
            ids = block % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * SIZE + ids, mask=ids < SIZE, other=float("-inf")).to(tl.float32)
            anchor = tl.max(tl.where(chosen, block_best, float("-inf")), 0)
            own = _pick(ids, _mass(x, anchor, temperature), share)
            token = PLACE * WIDTH + own
            told = tl.where((own >= 0) & (token < VOCAB), token, likeliest)  # of a row that is not finite
    tl.store(told_ptr + row, told.to(tl.float32))
