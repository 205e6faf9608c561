"""Log probabilities as Triton kernels: of chosen tokens and of the most likely ones, for a whole batch at once.

One pass over the logits gives each block its mass and each strip its largest logit; then a program for each row finds
the likeliest tokens, one after the other, by looking only at the strips they are in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.strips import _STRIPS_AT_ONCE, BLOCK, load_strips, strip_size, strips_above
from ingle.kernels.sampling import Logprobs


@triton.jit
def _mass_kernel(
    logits_ptr, best_ptr, mass_ptr, strips_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, STRIP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Of each block of a row its largest logit and its mass relative to that; of each strip its largest logit."""
    if PDL:
        await_previous()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    numbers = tl.arange(0, BLOCK // STRIP)
    ids = block * BLOCK + numbers[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
    logits = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    strips = tl.max(logits, 1)
    best = tl.max(strips, 0)
    anchor = tl.where(best == float("-inf"), 0.0, best)
    place = row * tl.num_programs(1) + block
    tl.store(strips_ptr + place * (BLOCK // STRIP) + numbers, strips)
    tl.store(best_ptr + place, best)
    tl.store(mass_ptr + place, tl.sum(tl.sum(tl.exp(logits - anchor), 1), 0))


@triton.jit
def _logprobs_kernel(
    logits_ptr, tokens_ptr, best_ptr, mass_ptr, strips_ptr, list_ptr, ids_ptr, values_ptr, ranks_ptr,
    VOCAB: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, NUM_STRIPS: tl.constexpr,
    STRIPS: tl.constexpr, STRIP: tl.constexpr, TOP: tl.constexpr, TOPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The chosen token, its rank, and the TOP most likely ones of a row."""
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * VOCAB
    blocks = tl.arange(0, BLOCKS)
    block_best = tl.load(best_ptr + row * NUM_BLOCKS + blocks, mask=blocks < NUM_BLOCKS, other=float("-inf"))
    mass = tl.load(mass_ptr + row * NUM_BLOCKS + blocks, mask=blocks < NUM_BLOCKS, other=0.0)
    best = tl.max(block_best, 0)
    log_mass = best + tl.log(tl.sum(tl.where(mass > 0, mass * tl.exp(block_best - best), 0.0), 0))

    token = tl.load(tokens_ptr + row).to(tl.int32)
    chosen = tl.load(row_ptr + token).to(tl.float32)
    numbers = tl.arange(0, STRIPS)
    strips = tl.load(strips_ptr + row * NUM_STRIPS + numbers, mask=numbers < NUM_STRIPS, other=float("-inf"))
    likelier = list_ptr + row * NUM_STRIPS
    num_listed = strips_above(strips, strips > chosen, likelier, STRIPS)
    rank = tl.full([], 1, tl.int32)
    for start in range(0, num_listed, _STRIPS_AT_ONCE):
        _, logits = load_strips(row_ptr, likelier, start, num_listed, VOCAB, STRIP)
        rank += tl.sum((logits > chosen).to(tl.int32), 0)

    # The tokens in falling order, of equals the lowest id first: each is the first of those that come after the last.
    places = tl.arange(0, TOPS)
    top_ids, top_values = tl.zeros([TOPS], tl.int32), tl.zeros([TOPS], tl.float32)
    for place in range(TOP):
        value = tl.max(strips, 0)
        number = tl.minimum(tl.min(tl.where(strips == value, numbers, STRIPS), 0), NUM_STRIPS - 1)
        ids = number * STRIP + tl.arange(0, STRIP)
        logits = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
        last = tl.max(tl.where(places == place - 1, top_ids, -1), 0)
        previous = tl.max(tl.where(places == place - 1, top_values, float("-inf")), 0)
        left = (place == 0) | (logits < previous) | ((logits == previous) & (ids > last))
        found = tl.minimum(tl.min(tl.where(left & (logits == value), ids, VOCAB), 0), VOCAB - 1)
        rest = left & ((logits < value) | ((logits == value) & (ids > found)))
        strips = tl.where(numbers == number, tl.max(tl.where(rest, logits, float("-inf")), 0), strips)
        top_ids = tl.where(places == place, found, top_ids)
        top_values = tl.where(places == place, value, top_values)

    # The chosen token comes before its equals, or in the place of one of them.
    if rank <= TOP:
        there = tl.max(tl.where(places == rank - 1, top_ids, -1), 0)
        top_ids = tl.where(places == rank - 1, token, tl.where(top_ids == token, there, top_ids))
    out = row * (TOP + 1)
    tl.store(ranks_ptr + row, rank)
    tl.store(ids_ptr + out, token)
    tl.store(values_ptr + out, chosen - log_mass)
    tl.store(ids_ptr + out + 1 + places, top_ids, mask=places < TOP)
    tl.store(values_ptr + out + 1 + places, top_values - log_mass, mask=places < TOP)


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: int) -> Logprobs:
    """Log probabilities of `token_ids` int64 [R] and of the most likely tokens under logits [R, vocab]."""
    num_rows, vocab_size = logits.shape
    device, early, strip = logits.device, pdl(logits.device), strip_size(vocab_size)
    top = min(num_alternatives, vocab_size)
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    num_strips = num_blocks * (BLOCK // strip)
    best, mass = (torch.empty(num_rows, num_blocks, device=device) for _ in range(2))
    strips = torch.empty(num_rows, num_strips, device=device)
    likelier = torch.empty(num_rows, num_strips, dtype=torch.int32, device=device)
    ids = torch.empty(num_rows, 1 + top, dtype=torch.int32, device=device)
    values = torch.empty(num_rows, 1 + top, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int32, device=device)
    _mass_kernel[num_rows, num_blocks](
        logits, best, mass, strips, VOCAB=vocab_size, BLOCK=BLOCK, STRIP=strip, PDL=early, num_warps=8,
        launch_pdl=early,
    )  # fmt: skip
    _logprobs_kernel[(num_rows,)](
        logits, token_ids, best, mass, strips, likelier, ids, values, ranks,
        VOCAB=vocab_size, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks), NUM_STRIPS=num_strips,
        STRIPS=triton.next_power_of_2(num_strips), STRIP=strip, TOP=top, TOPS=triton.next_power_of_2(max(top, 1)),
        PDL=early, num_warps=8, launch_pdl=early,
    )  # fmt: skip
    return Logprobs(ids, values, ranks)
