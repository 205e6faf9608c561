"""What a draw is told, per-slot tables and which of their parts a step needs, and what it brings back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ingle.request import MAX_LOGIT_BIAS

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
"""Columns of `SamplingTables.floats`; the last three are penalties."""
SEED, TOP_K, FIRST_END, NUM_BIASES = range(4)
"""Columns of `SamplingTables.ints`. FIRST_END is the first position at which an end token is possible."""
NEUTRAL_FLOATS = (0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
"""Greedy, without filters or penalties."""

PROMPT_FLAG = 1 << 24
"""Added to the count of a token that the prompt holds."""


class Features(NamedTuple):
    """What the rows of a step ask for, all together: what has to be computed. Part of a CUDA graph's key."""

    filtered: bool = False
    """Some row cuts the distribution: top-k, top-p or min-p."""
    adjusted: bool = False
    """Some row changes its logits: penalties, bias, or end tokens that are impossible as yet."""
    masked: bool = False
    """Some row has a mask of allowed tokens."""
    num_logprobs: int | None = None
    """Log probabilities of the drawn token and of this many most likely ones; None for none at all."""


@dataclass(slots=True)
class Adjustments:
    """What changes the logits of S slots before the draw."""

    counts: torch.Tensor
    """int32 [S, vocab]: occurrences in the output, plus PROMPT_FLAG for tokens of the prompt. Right for slots whose
    penalties are not neutral; the draw adds to them."""
    bias_ids: torch.Tensor
    """int32 [S, MAX_LOGIT_BIAS], of which a slot's first `NUM_BIASES` count: distinct token ids."""
    biases: torch.Tensor
    """float32 [S, MAX_LOGIT_BIAS]"""
    end_words: torch.Tensor
    """int32 [S, ceil(vocab / 32)]: bit i % 32 of word i // 32 is 0 for end tokens, impossible before `FIRST_END`."""

    @classmethod
    def allocate(cls, num_slots: int, vocab_size: int, device: torch.device) -> Adjustments:
        return cls(
            torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device),
            torch.zeros(num_slots, MAX_LOGIT_BIAS, dtype=torch.int32, device=device),
            torch.zeros(num_slots, MAX_LOGIT_BIAS, device=device),
            all_allowed(num_slots, vocab_size, device),
        )


@dataclass(slots=True)
class SamplingTables:
    """Sampling parameters of S slots. The large ones exist once a request came that needs them."""

    floats: torch.Tensor
    """float32 [S, 6]"""
    ints: torch.Tensor
    """int64 [S, 4]"""
    adjustments: Adjustments | None = None
    """Before the first step with `Features.adjusted`."""
    masks: torch.Tensor | None = None
    """int32 [S, ceil(vocab / 32)], before the first step with `Features.masked`: bit i % 32 of word i // 32 is 1 where
    token i is allowed. All ones is no mask."""

    @classmethod
    def allocate(cls, num_slots: int, vocab_size: int, device: torch.device) -> SamplingTables:
        """Every slot greedy."""
        floats = torch.tensor([NEUTRAL_FLOATS], device=device).repeat(num_slots, 1)
        return cls(floats, torch.tensor([[0, vocab_size, 0, 0]], device=device).repeat(num_slots, 1))


def all_allowed(num_slots: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    return torch.full((num_slots, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)


class Logprobs(NamedTuple):
    """Log probabilities at R positions. N alternatives, or as many as the vocabulary has."""

    token_ids: torch.Tensor
    """int32 [R, 1 + N]: the chosen token, then the most likely ones in falling order, the chosen before its equals."""
    values: torch.Tensor
    """float32 [R, 1 + N]"""
    ranks: torch.Tensor
    """int32 [R]: 1 where the chosen token is the most likely."""

    def to_host(self) -> Logprobs:
        """In pinned memory, where it has arrived when an event recorded after this has passed."""
        return Logprobs(*(tensor.to("cpu", non_blocking=True) for tensor in self))


class Samples(NamedTuple):
    """What a step drew for its R rows."""

    token_ids: torch.Tensor
    """int64 [R]"""
    finite: torch.Tensor
    """bool [R], False where the model's logits held NaN or infinity. A mask or a bias makes no row so."""
    logprobs: Logprobs | None = None
    """Of the logits as the model gave them, with `Features.num_logprobs`."""

    def to_host(self) -> Samples:
        """In pinned memory, where it has arrived when an event recorded after this has passed."""
        whole = self.token_ids.untyped_storage()
        if whole.data_ptr() == self.finite.untyped_storage().data_ptr():  # as `allocate` has them: one copy
            held = torch.empty(0, dtype=torch.uint8, device=self.finite.device).set_(whole)
            token_ids, finite = _apart(held.to("cpu", non_blocking=True))
        else:
            token_ids, finite = (each.to("cpu", non_blocking=True) for each in (self.token_ids, self.finite))
        return Samples(
            token_ids,
            finite,
            None if self.logprobs is None else self.logprobs.to_host(),
        )

    @staticmethod
    def allocate(num_rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for `token_ids` and `finite`, one behind the other."""
        return _apart(torch.empty(9 * num_rows, dtype=torch.uint8, device=device))


def _apart(held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [9 R]: int64 [R] and bool [R]."""
    num_bytes = len(held) // 9 * 8
    return held[:num_bytes].view(torch.int64), held[num_bytes:].view(torch.bool)
