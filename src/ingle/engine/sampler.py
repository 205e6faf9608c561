"""Draws tokens from logits, each row by its own parameters.

Order: penalties, logit bias, forbidden end tokens, temperature, then the filters. All filters are thresholds on
probability, so equally likely tokens stay or go together and no order among them matters. The draw is the inverse of
the cumulative distribution at a number that depends on nothing but the request's seed and the position: the same seed
gives the same text whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ingle.engine.scheduler import Admission
from ingle.request import SamplingParams, TokenLogprobs

_PROMPT_FLAG = 1 << 24


@dataclass(slots=True)
class Samples:
    """What a step drew for its R rows, still on the device."""

    token_ids: torch.Tensor
    """int64 [R]"""
    finite: torch.Tensor
    """bool [R], False where the model's logits held NaN or infinity."""


class Sampler:
    """Sampling parameters of S slots, and the draw. Tables that only some requests need exist once one of them came."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._temperature = torch.zeros(num_slots, device=device)
        self._top_p = torch.ones(num_slots, device=device)
        self._min_p = torch.zeros(num_slots, device=device)
        self._top_k = torch.full((num_slots,), vocab_size, dtype=torch.int64, device=device)
        self._seed = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # [S, 3]: repetition, presence and frequency penalty
        self._penalties = torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(num_slots, 1)
        # int32 [S, vocab]: occurrences in the output, plus _PROMPT_FLAG for tokens of the prompt
        self._seen: torch.Tensor | None = None
        self._params: dict[int, SamplingParams] = {}
        self._first_position: dict[int, int] = {}  # of the output, by slot
        self._end_token_ids: dict[int, tuple[int, ...]] = {}

    def admit(self, admission: Admission) -> None:
        """Takes in the parameters of a slot that starts or restarts."""
        slot, params = admission.slot, admission.sampling
        self._params[slot] = params
        self._first_position[slot] = admission.num_prompt_tokens
        self._end_token_ids[slot] = admission.end_token_ids
        self._temperature[slot] = params.temperature
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self._seed[slot] = admission.seed
        if params.penalized:
            self._admit_penalties(admission)

    def _admit_penalties(self, admission: Admission) -> None:
        slot, params = admission.slot, admission.sampling
        if self._seen is None:
            self._seen = torch.zeros(len(self._seed), self.vocab_size, dtype=torch.int32, device=self.device)
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._penalties[slot] = torch.tensor(penalties, device=self.device)
        tokens = torch.tensor(admission.token_ids, device=self.device)
        prompt, output = tokens[: admission.num_prompt_tokens], tokens[admission.num_prompt_tokens :]
        seen = self._seen[slot].zero_()
        seen[prompt] = _PROMPT_FLAG
        seen.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def sample(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> Samples:
        """Draws the token at `positions` of each of `slots` from float32 logits [R, vocab], which it may overwrite."""
        rows = torch.tensor(slots, dtype=torch.int64, device=self.device)
        finite = logits.sum(dim=-1).isfinite()
        params = [self._params[slot] for slot in slots]
        if any(p.penalized for p in params):
            self._penalize(logits, [i for i, p in enumerate(params) if p.penalized], slots)
        self._adjust(logits, slots, positions)
        token_ids = logits.argmax(dim=-1)
        drawn = [i for i, p in enumerate(params) if not p.greedy]
        if drawn:
            index = torch.tensor(drawn, device=self.device)
            drawn_positions = torch.tensor([positions[i] for i in drawn], device=self.device)
            filtered = any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params)
            token_ids[index] = self._draw(logits[index], rows[index], drawn_positions, filtered)
        # Whatever a broken row drew, the next step must be able to look it up.
        token_ids = torch.where(finite, token_ids, 0)
        if self._seen is not None:
            self._seen.view(-1).index_add_(
                0, rows * self.vocab_size + token_ids, torch.ones_like(rows, dtype=torch.int32)
            )
        return Samples(token_ids, finite)

    def _penalize(self, logits: torch.Tensor, indices: list[int], slots: list[int]) -> None:
        assert self._seen is not None
        index = torch.tensor(indices, device=self.device)
        rows = torch.tensor([slots[i] for i in indices], device=self.device)
        seen = self._seen[rows]
        count = (seen & (_PROMPT_FLAG - 1)).float()
        repetition, presence, frequency = self._penalties[rows].unsqueeze(-1).unbind(1)
        x = logits[index]
        x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        logits[index] = x - presence * (count > 0) - frequency * count

    def _adjust(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> None:
        """Adds logit biases, and forbids end tokens to sequences shorter than their min_tokens."""
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            params = self._params[slot]
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=self.device)
                logits[row].index_add_(0, ids, torch.tensor(list(params.logit_bias.values()), device=self.device))
            if position - self._first_position[slot] < params.min_tokens and self._end_token_ids[slot]:
                logits[row, torch.tensor(self._end_token_ids[slot], device=self.device)] = -torch.inf

    def _draw(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, filtered: bool) -> torch.Tensor:
        """Token ids int64 [N] for the rows whose temperature is above 0."""
        # Relative to the largest, so that a tiny temperature cannot overflow.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self._temperature[slots, None]
        probs = torch.softmax(scaled, dim=-1)
        if filtered:
            threshold = _threshold(probs, self._top_k[slots], self._top_p[slots], self._min_p[slots])
            probs = probs.masked_fill(probs < threshold[:, None], 0.0)
        cumulative = probs.double().cumsum(dim=-1)
        target = uniform(self._seed[slots], positions) * cumulative[:, -1]
        # The first token whose cumulative probability exceeds the target; such a token has a probability above 0.
        drawn = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        return drawn.clamp_(max=self.vocab_size - 1)


def _threshold(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """The least probability [N] that passes top-k, then top-p of what that leaves, and min-p."""
    ordered = probs.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (top_k - 1)[:, None])[:, 0]
    kept = ordered.masked_fill(ordered < kth[:, None], 0.0)
    before = kept.double().cumsum(dim=-1) - kept  # mass of the likelier tokens
    num_kept = (before < (top_p * kept.sum(dim=-1))[:, None]).sum(dim=-1).clamp(min=1)
    nucleus = ordered.gather(1, (num_kept - 1)[:, None])[:, 0]
    return torch.maximum(torch.maximum(kth, nucleus), min_p * ordered[:, 0])


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 in [0, 1) for each (seed, position), int64 [N]: SplitMix64's finalizer (Steele et al., 2014)."""
    x = seeds + (positions + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return _shift_right(x ^ _shift_right(x, 31), 11).double() * 2.0**-53


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64, which PyTorch shifts arithmetically."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: list[int]) -> list[TokenLogprobs]:
    """Log probabilities of `token_ids` [R] and of the most likely tokens under float32 logits [R, vocab]."""
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(max(num_alternatives), dim=-1)
    rows = zip(
        token_ids.tolist(), chosen[:, 0].tolist(), ranks.tolist(), top.indices.tolist(), top.values.tolist(),
        num_alternatives, strict=True,
    )  # fmt: skip
    return [
        TokenLogprobs([token_id, *ids[:count]], [logprob, *values[:count]], rank)
        for token_id, logprob, rank, ids, values, count in rows
    ]
