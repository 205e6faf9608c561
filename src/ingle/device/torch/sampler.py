"""From logits to tokens, each row by its own parameters.

Order: penalties, logit bias, forbidden end tokens; then temperature, filters and the draw, by the device's kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ingle import kernels
from ingle.device.torch.tables import to_device
from ingle.kernels.batch import StepInputs
from ingle.request import SamplingParams
from ingle.step import Admission, Masks

_PROMPT_FLAG = 1 << 24


@dataclass(slots=True)
class Samples:
    """What a step drew for its R rows, still on the device."""

    token_ids: torch.Tensor
    """int64 [R]"""
    finite: torch.Tensor
    """bool [R], False where the model's logits held NaN or infinity."""


class Sampler:
    """Sampling parameters of S slots, and the draw. The penalties' table exists once a request came that needs it."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        rows = num_slots + 1  # the last is for padding rows, which are greedy
        # temperature, top_p, min_p
        self.floats = torch.tensor([[0.0, 1.0, 0.0]], device=device).repeat(rows, 1)
        # seed, top_k
        self.ints = torch.tensor([[0, vocab_size]], device=device).repeat(rows, 1)
        # repetition, presence and frequency penalty
        self._penalties = torch.tensor([[1.0, 0.0, 0.0]], device=device).repeat(rows, 1)
        # int32 [S, vocab]: occurrences in the output, plus _PROMPT_FLAG for tokens of the prompt
        self._seen: torch.Tensor | None = None
        self._params: dict[int, SamplingParams] = {}
        self._admissions: dict[int, Admission] = {}
        self._allowed: dict[int, torch.Tensor] = {}

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Takes in the parameters of slots that start or restart."""
        if not admissions:
            return
        for admission in admissions:
            self._params[admission.slot] = admission.sampling
            self._admissions[admission.slot] = admission
        slots = np.array([admission.slot for admission in admissions], np.int64)
        params = [admission.sampling for admission in admissions]
        ints = np.array(
            [(admission.seed, self._top_k(admission.sampling)) for admission in admissions], np.int64
        )  # fmt: skip
        rows = to_device(slots, self.device)
        self.ints[rows] = to_device(ints, self.device)
        floats = np.array([(0.0 if p.greedy else p.temperature, p.top_p, p.min_p) for p in params], np.float32)
        self.floats[rows] = to_device(floats, self.device)
        if any(p.penalized for p in params):
            self._admit_penalties([admission for admission in admissions if admission.sampling.penalized])

    def _top_k(self, params: SamplingParams) -> int:
        return params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size

    def _admit_penalties(self, admissions: Sequence[Admission]) -> None:
        if self._seen is None:
            self._seen = torch.zeros(len(self.ints), self.vocab_size, dtype=torch.int32, device=self.device)
        for admission in admissions:
            slot, params = admission.slot, admission.sampling
            penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
            self._penalties[slot] = to_device(np.array(penalties, np.float32), self.device)
            tokens = to_device(np.array(admission.token_ids, np.int64), self.device)
            prompt, output = tokens[: admission.num_prompt_tokens], tokens[admission.num_prompt_tokens :]
            seen = self._seen[slot].zero_()
            seen[prompt] = _PROMPT_FLAG
            seen.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def filters(self, slots: Sequence[int]) -> bool:
        """Whether any of the slots cuts the distribution: top-k, top-p or min-p."""
        params = [self._params[slot] for slot in slots]
        return any(not p.greedy and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params)

    def adjusts(self, slots: Sequence[int]) -> bool:
        """Whether any of the slots changes its logits before the draw: penalties, bias, or min_tokens."""
        params = [self._params[slot] for slot in slots]
        return any(p.penalized or p.logit_bias or p.min_tokens for p in params) or bool(self._allowed)

    def set_masks(self, masks: Masks) -> None:
        """What the next draw may give, by slot; all tokens for others."""
        self._allowed = {
            slot: torch.from_numpy(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")).bool()
            for slot, mask in masks.items()
        }

    def draw(self, logits: torch.Tensor, inputs: StepInputs, *, filtered: bool) -> Samples:
        """The tokens of unadjusted logits [R, vocab]. Runs on the device alone, so a step can be captured with it."""
        kernel = kernels.of(logits).sample
        token_ids, finite = kernel(
            logits, inputs.sample_slots, inputs.sample_positions, self.floats, self.ints, filtered=filtered
        )
        return Samples(token_ids, finite)

    def sample(self, logits: torch.Tensor, inputs: StepInputs, slots: list[int], positions: list[int]) -> Samples:
        """The tokens of logits [R, vocab] whose rows have `slots` and `positions`."""
        if not self.adjusts(slots):
            return self.draw(logits, inputs, filtered=self.filters(slots))
        finite = logits.sum(dim=-1, dtype=torch.float32).isfinite()
        adjusted = self._adjust(logits.to(torch.float32, copy=True), slots, positions)
        samples = self.draw(torch.nan_to_num(adjusted, neginf=-torch.inf), inputs, filtered=self.filters(slots))
        samples.finite = finite
        if self._seen is not None:
            rows = inputs.sample_slots
            ones = torch.ones_like(rows, dtype=torch.int32)
            self._seen.view(-1).index_add_(0, rows * self.vocab_size + samples.token_ids, ones)
        return samples

    def _adjust(self, logits: torch.Tensor, slots: list[int], positions: list[int]) -> torch.Tensor:
        params = [self._params[slot] for slot in slots]
        penalized = [i for i, p in enumerate(params) if p.penalized]
        if penalized:
            logits = self._penalize(logits, penalized, slots)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            bias, admission = params[row].logit_bias, self._admissions[slot]
            if bias:
                ids = to_device(np.array(list(bias), np.int64), self.device)
                logits[row].index_add_(0, ids, to_device(np.array(list(bias.values()), np.float32), self.device))
            if position - admission.num_prompt_tokens < params[row].min_tokens and admission.end_token_ids:
                logits[row, to_device(np.array(admission.end_token_ids, np.int64), self.device)] = -torch.inf
            if slot in self._allowed:
                logits[row, ~self._allowed[slot][: self.vocab_size].to(self.device)] = -torch.inf
        return logits

    def _penalize(self, logits: torch.Tensor, indices: list[int], slots: list[int]) -> torch.Tensor:
        assert self._seen is not None
        index = to_device(np.array(indices, np.int64), self.device)
        rows = to_device(np.array([slots[i] for i in indices], np.int64), self.device)
        seen = self._seen[rows]
        count = (seen & (_PROMPT_FLAG - 1)).float()
        repetition, presence, frequency = self._penalties[rows].unsqueeze(-1).unbind(1)
        x = logits[index]
        x = torch.where(seen > 0, torch.where(x > 0, x / repetition, x * repetition), x)
        logits[index] = x - presence * (count > 0) - frequency * count
        return logits


class LogprobTensors(NamedTuple):
    """`ingle.device.LogprobRows`, still on the device."""

    token_ids: torch.Tensor
    chosen: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def logprob_rows(logits: torch.Tensor, token_ids: torch.Tensor, num_alternatives: int) -> LogprobTensors:
    """Log probabilities of `token_ids` [R] and of the most likely tokens under logits [R, vocab]."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    top = logprobs.topk(min(num_alternatives, logits.shape[-1]), dim=-1)
    return LogprobTensors(token_ids, chosen[:, 0], ranks, top.indices, top.values)
