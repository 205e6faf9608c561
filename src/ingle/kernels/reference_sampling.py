"""From logits to tokens in plain PyTorch: what is drawn, defined; and what the kernels are tested against.

R rows of logits, each of a slot whose parameters the tables hold. Order: penalties, logit bias, end tokens that are
impossible as yet, the mask of allowed tokens; then temperature, top-k, top-p, min-p and the draw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ingle.kernels.group import LogitsShare
from ingle.kernels.sampling import (
    FIRST_END,
    MIN_P,
    NUM_BIASES,
    PROMPT_FLAG,
    REPETITION,
    SEED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    Adjustments,
    Features,
    Logprobs,
    Samples,
    SamplingTables,
)

Greedy = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token of each row, ties to the lowest id, int64 [R], and whether the row is finite, bool [R]."""
    return logits.argmax(dim=-1), logits.sum(dim=-1, dtype=torch.float32).isfinite()


def sample(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SamplingTables,
    features: Features,
    greedy: Greedy = greedy,
) -> Samples:
    """The tokens at `positions` int64 [R] of the sequences in `slots` int64 [R]: logits [R, vocab] of any float type.

    Whatever a row of logits was, its token is one of the vocabulary. What `features` leaves out is not looked at; a row
    that wants nothing of what it names comes out as without. Tokens of slots with penalties are counted.

    The filters are thresholds on probability, so equally likely tokens stay or go together. The draw is the inverse of
    the cumulative distribution, in the order of token ids, at a number that only seed and position decide.
    """
    token_ids, finite = greedy(logits)
    adjusted = logits
    if features.adjusted or features.masked:
        adjusted = adjust(logits, slots, positions, tables, features)
        token_ids, _ = greedy(adjusted)
    _draw_into(token_ids, adjusted, slots, positions, tables, filtered=features.filtered)
    if features.adjusted and tables.adjustments is not None:
        rows = _penalized(tables.floats[slots]).nonzero()[:, 0]
        ones = torch.ones(len(rows), dtype=torch.int32, device=logits.device)
        tables.adjustments.counts.index_put_((slots[rows], token_ids[rows]), ones, accumulate=True)
    if features.num_logprobs is None:
        return Samples(token_ids, finite)
    return Samples(token_ids, finite, logprobs(logits, token_ids, features.num_logprobs))


def adjust(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables, features: Features
) -> torch.Tensor:
    """Logits [R, vocab] after penalties, bias, end tokens and masks, float32. What grew too large is the largest."""
    x = logits.to(torch.float32, copy=True)
    if features.adjusted and tables.adjustments is not None:
        x = _penalize(x, slots, tables.floats, tables.adjustments.counts)
        x = _add_biases(x, slots, tables.ints, tables.adjustments)
        early = (positions < tables.ints[slots, FIRST_END]).nonzero()[:, 0]
        x[early] = _forbid(x[early], tables.adjustments.end_words[slots[early]])
    if features.masked and tables.masks is not None:
        x = _forbid(x, tables.masks[slots])
    return torch.nan_to_num(x, neginf=-torch.inf)


def _penalized(floats: torch.Tensor) -> torch.Tensor:
    """bool [R] for rows of `SamplingTables.floats`."""
    repetition, presence, frequency = floats[:, REPETITION:].unbind(1)
    return (repetition != 1) | (presence != 0) | (frequency != 0)


def _penalize(x: torch.Tensor, slots: torch.Tensor, floats: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    rows = _penalized(floats[slots]).nonzero()[:, 0]
    seen = counts[slots[rows]]
    count = (seen & (PROMPT_FLAG - 1)).float()
    repetition, presence, frequency = floats[slots[rows], REPETITION:].unsqueeze(-1).unbind(1)
    values = x[rows]
    values = torch.where(seen > 0, torch.where(values > 0, values / repetition, values * repetition), values)
    x[rows] = values - presence * (count > 0) - frequency * count
    return x


def _add_biases(x: torch.Tensor, slots: torch.Tensor, ints: torch.Tensor, adjustments: Adjustments) -> torch.Tensor:
    num_biases = ints[slots, NUM_BIASES]
    for row in num_biases.nonzero()[:, 0].tolist():
        slot, count = int(slots[row]), int(num_biases[row])
        x[row].index_add_(0, adjustments.bias_ids[slot, :count], adjustments.biases[slot, :count])
    return x


def _forbid(x: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """x [R, vocab], -inf where the bits of words, int32 [R, ceil(vocab / 32)], are 0."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
    return x.masked_fill(bits.flatten(1)[:, : x.shape[1]] == 0, -torch.inf)


def _draw_into(
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: SamplingTables,
    *,
    filtered: bool,
) -> None:
    """The part that is random: overwrites the token ids of rows with a temperature above 0."""
    drawn = (tables.floats[slots, TEMPERATURE] > 0).nonzero()[:, 0]
    if not len(drawn):
        return
    floats, ints = tables.floats[slots[drawn]], tables.ints[slots[drawn]]
    chosen = logits[drawn].float()
    # Relative to the largest, so that a tiny temperature cannot overflow.
    probs = torch.softmax((chosen - chosen.amax(dim=-1, keepdim=True)) / floats[:, TEMPERATURE, None], dim=-1)
    if filtered:
        least = _least_probability(probs, ints[:, TOP_K], floats[:, TOP_P], floats[:, MIN_P])
        probs = probs.masked_fill(probs < least[:, None], 0.0)
    cumulative = probs.double().cumsum(dim=-1)
    target = uniform(ints[:, SEED], positions[drawn]) * cumulative[:, -1]
    # The first token whose cumulative probability exceeds the target; such a token has a probability above 0.
    found = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    token_ids[drawn] = found.clamp_(max=logits.shape[1] - 1)


def _least_probability(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """The least probability [N] that passes top-k, then top-p of what that leaves, and min-p."""
    ordered = probs.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (top_k - 1)[:, None])[:, 0]
    kept = ordered.masked_fill(ordered < kth[:, None], 0.0)
    before = kept.double().cumsum(dim=-1) - kept  # mass of the likelier tokens
    num_kept = (before < (top_p * kept.sum(dim=-1))[:, None]).sum(dim=-1).clamp(min=1)
    nucleus = ordered.gather(1, (num_kept - 1)[:, None])[:, 0]
    return torch.maximum(torch.maximum(kth, nucleus), min_p * ordered[:, 0])


def sample_share(
    share: LogitsShare, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables, features: Features
) -> Samples:
    """`sample` of the logits of all ranks, which get the same tokens."""
    return sample(share.whole(), slots, positions, tables, features)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1) for each (seed, position), int64 [N]: SplitMix64's finalizer (Steele et al., 2014)."""
    x = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return _shift_right(x ^ _shift_right(x, 31), 11).double() * 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64, which PyTorch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: int) -> Logprobs:
    """Log probabilities of `token_ids` int64 [R] and of the most likely tokens under logits [R, vocab]."""
    x = logits.float()
    values = torch.log_softmax(x, dim=-1)
    chosen = token_ids[:, None]
    ranks = (x > x.gather(1, chosen)).sum(dim=-1, keepdim=True) + 1
    top_ids = x.topk(min(num_alternatives, x.shape[-1]), dim=-1).indices
    if top_ids.shape[1]:  # the chosen token comes before its equals, or in the place of one of them
        place = ranks.clamp(max=top_ids.shape[1]) - 1
        there = top_ids.gather(1, place)
        among = ranks <= top_ids.shape[1]
        top_ids = torch.where((top_ids == chosen) & among, there, top_ids)
        top_ids = top_ids.scatter(1, place, torch.where(among, chosen, there))
    ids = torch.cat((chosen, top_ids), dim=1)
    return Logprobs(ids.int(), values.gather(1, ids), ranks[:, 0].int())
