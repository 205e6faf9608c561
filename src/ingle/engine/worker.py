"""Runs planned steps on a device: it owns the model, the KV pages and the per-slot tables, and knows slots, not requests."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from ingle.engine.batch import Batch, SlotTables
from ingle.engine.sampler import Sampler, Samples, token_logprobs
from ingle.engine.scheduler import Limits, Plan, StepResult
from ingle.model.decoder import Decoder
from ingle.request import SamplingParams, TokenLogprobs

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once: 64 x 150k x float32 is 40 MB."""


@dataclass(slots=True)
class LaunchedStep:
    """A step whose kernels are queued; `result` waits for them."""

    samples: Samples
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: dict[int, list[TokenLogprobs]]

    def result(self) -> StepResult:
        return StepResult(
            self.samples.token_ids.tolist(), self.samples.finite.tolist(), self.logprobs, self.prompt_logprobs
        )


class Worker:
    """One device's share of the engine."""

    def __init__(
        self, model: Decoder, limits: Limits, num_pages: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = model.config
        self.model = model
        self.device = device
        self.tables = SlotTables(limits.max_num_seqs, limits.max_model_len, limits.page_size, device)
        self.sampler = Sampler(limits.max_num_seqs, config.vocab_size, device)
        self.kv_cache = _zeros(
            (config.num_layers, 2, num_pages, limits.page_size, config.num_kv_heads, config.head_dim), dtype, device
        )
        self._sampling: dict[int, SamplingParams] = {}

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Applies the plan to the tables and queues its computation."""
        self._apply(plan)
        batch = self.tables.batch(plan)
        hidden = self.model.forward(batch, self.kv_cache)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        logits = self.model.logits(hidden[batch.sample_rows])
        sampled = [(index, chunk) for index, chunk in enumerate(batch.chunks) if chunk.samples]
        wanted = [self._sampling[chunk.slot].logprobs for _, chunk in sampled]
        raw = logits.clone() if any(count is not None for count in wanted) else None  # sampling overwrites logits
        samples = self.sampler.sample(
            logits, [chunk.slot for _, chunk in sampled], [chunk.start + chunk.count for _, chunk in sampled]
        )
        self.tables.token_ids[batch.sample_slots, batch.sample_positions] = samples.token_ids.int()
        logprobs: dict[int, TokenLogprobs] = {}
        if raw is not None:
            rows = [row for row, count in enumerate(wanted) if count is not None]
            counts = [count for count in wanted if count is not None]
            entries = token_logprobs(raw[rows], samples.token_ids[rows], counts)
            logprobs = {sampled[row][0]: entry for row, entry in zip(rows, entries, strict=True)}
        return LaunchedStep(samples, logprobs, prompt_logprobs)

    def _apply(self, plan: Plan) -> None:
        if plan.scrubbed:
            self.kv_cache[:, :, torch.tensor(plan.scrubbed, device=self.device)] = 0
        self.tables.grow(plan.grown)
        for admission in plan.admissions:
            self.tables.admit(admission)
            self.sampler.admit(admission)
            self._sampling[admission.slot] = admission.sampling

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        found: dict[int, list[TokenLogprobs]] = {}
        first = 0
        for index, chunk in enumerate(batch.chunks):
            if chunk.prompt_logprobs is not None:
                following = self.tables.token_ids[chunk.slot, chunk.start + 1 : chunk.start + chunk.count + 1].long()
                entries: list[TokenLogprobs] = []
                for low in range(0, chunk.count, _LOGIT_ROWS):
                    high = min(low + _LOGIT_ROWS, chunk.count)
                    logits = self.model.logits(hidden[first + low : first + high])
                    entries += token_logprobs(logits, following[low:high], [chunk.prompt_logprobs] * (high - low))
                found[index] = entries
            first += chunk.count
        return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what a padding row reads is multiplied by a zero weight, and must be finite for that to be nothing.

    On a CPU the system hands out zeroed memory when it is first touched, which NumPy leaves to it and PyTorch does not.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
