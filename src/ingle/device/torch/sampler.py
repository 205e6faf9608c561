"""Sampling parameters of the slots, on the device, and the draw by the device's kernels.

Parameters are written when a sequence is admitted. A step that draws brings nothing but slots and positions, and which
features its rows ask for: so any step can be captured, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ingle import kernels
from ingle.device.torch.tables import to_device
from ingle.kernels.batch import StepInputs
from ingle.kernels.group import LogitsShare
from ingle.kernels.sampling import (
    PROMPT_FLAG,
    Adjustments,
    Features,
    Samples,
    SamplingTables,
    all_allowed,
)
from ingle.request import MAX_LOGPROBS, Sampling
from ingle.step import Admission, Chunk, Masks

_FILTERED, _ADJUSTED = 1, 2
_LOGPROB_SIZES = (0, 5, MAX_LOGPROBS)
"""Numbers of alternatives that a step computes: each is a graph of its own."""
_NEVER = 1 << 62
"""A position that no sequence reaches."""


class Sampler:
    """Sampling parameters of S slots and one more for padding rows, which are greedy."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.tables = SamplingTables.allocate(num_slots + 1, vocab_size, device)
        self._features = np.zeros(num_slots + 1, np.uint8)
        self._masked: set[int] = set()
        """Slots whose masks are not all ones."""

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Takes in the parameters of slots that start or restart."""
        if not admissions:
            return
        slots = np.array([admission.slot for admission in admissions], np.int64)
        self._features[slots] = [_features(admission.sampling) for admission in admissions]
        rows = to_device(slots, self.device)
        floats = np.array([_floats(admission.sampling) for admission in admissions], np.float32)
        ints = np.array([self._ints(admission) for admission in admissions], np.int64)
        self.tables.floats[rows] = to_device(floats, self.device)
        self.tables.ints[rows] = to_device(ints, self.device)
        self._adjust([admission for admission in admissions if _features(admission.sampling) & _ADJUSTED])

    def _ints(self, admission: Admission) -> tuple[int, int, int, int]:
        params = admission.sampling
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        first_end = min(admission.num_prompt_tokens + params.min_tokens, _NEVER) if params.min_tokens else 0
        return admission.seed, top_k, first_end, len(params.logit_bias or {})

    def _adjust(self, admissions: Sequence[Admission]) -> None:
        if not admissions:
            return
        if self.tables.adjustments is None:
            self.tables.adjustments = Adjustments.allocate(len(self.tables.ints), self.vocab_size, self.device)
        tables = self.tables.adjustments
        for admission in admissions:
            slot, params = admission.slot, admission.sampling
            if params.penalized:
                self._count(tables.counts[slot], admission)
            if params.logit_bias:
                count = len(params.logit_bias)
                ids, biases = np.array(list(params.logit_bias.items()), np.float64).reshape(count, 2).T
                tables.bias_ids[slot, :count] = to_device(ids.astype(np.int32), self.device)
                tables.biases[slot, :count] = to_device(biases.astype(np.float32), self.device)
            if params.min_tokens:
                tables.end_words[slot] = to_device(self._all_but(admission.end_token_ids), self.device)

    def _count(self, counts: torch.Tensor, admission: Admission) -> None:
        """Writes a slot's row of `Adjustments.counts`."""
        tokens = to_device(np.array(admission.token_ids, np.int64), self.device)
        prompt, output = tokens[: admission.num_prompt_tokens], tokens[admission.num_prompt_tokens :]
        counts.zero_()
        counts[prompt] = PROMPT_FLAG
        counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    def _all_but(self, token_ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """Bits of all tokens but these, as `SamplingTables.masks` has them."""
        allowed = np.ones(-(-self.vocab_size // 32) * 32, np.bool_)
        allowed[list(token_ids)] = False
        return np.packbits(allowed, bitorder="little").view("<i4")

    def set_masks(self, masks: Masks) -> None:
        """What the next draw may give, by slot; all tokens for others."""
        if masks.slots and self.tables.masks is None:
            self.tables.masks = all_allowed(len(self.tables.ints), self.vocab_size, self.device)
        table, freed = self.tables.masks, sorted(self._masked.difference(masks.slots))
        if table is not None and freed:
            table[to_device(np.array(freed, np.int64), self.device)] = -1
        if table is not None and masks.slots:
            words = np.frombuffer(masks.words, "<i4").reshape(len(masks.slots), -1)
            table[to_device(np.array(masks.slots, np.int64), self.device)] = to_device(words, self.device)
        self._masked = set(masks.slots)

    def features(self, chunks: Sequence[Chunk], masks: Masks) -> Features:
        """What a step has to compute for the chunks that it draws for."""
        drawing = [chunk for chunk in chunks if chunk.samples]
        bits = int(np.bitwise_or.reduce(self._features[np.array([chunk.slot for chunk in drawing], np.int64)]))
        most = max((chunk.logprobs for chunk in drawing if chunk.logprobs is not None), default=None)
        return Features(
            filtered=bool(bits & _FILTERED),
            adjusted=bool(bits & _ADJUSTED),
            masked=bool(masks.slots),
            num_logprobs=None if most is None else padded_alternatives(most),
        )

    def sample(self, logits: torch.Tensor | LogitsShare, inputs: StepInputs, features: Features) -> Samples:
        """The tokens of logits [R, vocab]. Runs on the device alone, so a step can be captured with it."""
        told = inputs.sample_slots, inputs.sample_positions, self.tables, features
        if isinstance(logits, LogitsShare):
            return kernels.of(logits.logits).sample_share(logits, *told)
        return kernels.of(logits).sample(logits, *told)


def padded_alternatives(count: int) -> int:
    """For how many the kernels run where so many are wanted: one of few sizes."""
    return next(size for size in _LOGPROB_SIZES if size >= count)


def _features(params: Sampling) -> int:
    filtered = not params.greedy and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    adjusted = params.penalized or bool(params.logit_bias) or params.min_tokens > 0
    return filtered * _FILTERED | adjusted * _ADJUSTED


def _floats(params: Sampling) -> tuple[float, float, float, float, float, float]:
    return (
        0.0 if params.greedy else params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
