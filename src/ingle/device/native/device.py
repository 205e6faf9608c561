"""Runs planned steps of a `HostDecoder`: `worker` and `tables` without PyTorch. A step is done when it is launched."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import numpy as np

from ingle.device.native.decoder import Floats, HostBatch, HostDecoder, HostKv
from ingle.device.native.sampler import HostSampler, row_logprobs
from ingle.engine.pages import RESERVED_PAGE
from ingle.engine.scheduler import Limits, Plan, StepResult
from ingle.kernels.cpu.library import KV_ITEMSIZES
from ingle.request import TokenLogprobs

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once."""


@dataclass(frozen=True, slots=True)
class HostStep:
    """A step that has been computed."""

    results: StepResult

    def result(self) -> StepResult:
        return self.results


class HostWorker:
    """The engine's share of work that a CPU computes."""

    on_gpu = False

    def __init__(self, model: HostDecoder, limits: Limits, num_pages: int, kv_dtype: str) -> None:
        self.model = model
        self.sampler = HostSampler(model.config.vocab_size)
        self.token_ids = np.zeros((limits.max_num_seqs, limits.max_model_len + 1), np.int32)
        pages_per_seq = -(-limits.max_model_len // limits.page_size)
        self.page_tables = np.full((limits.max_num_seqs, pages_per_seq), RESERVED_PAGE, np.int32)
        self.kv_itemsize = KV_ITEMSIZES[kv_dtype]
        page_bytes = limits.page_size * model.config.kv_size * self.kv_itemsize
        self.kv = HostKv(_zeros((model.config.num_layers, 2, num_pages, page_bytes)), limits.page_size, kv_dtype)

    def usable(self) -> bool:
        """A step that fails leaves nothing behind that the next would not write anew."""
        return True

    def capture_next(self) -> bool:
        """There are no graphs to capture."""
        return False

    def launch(self, plan: Plan) -> HostStep:
        """Applies the plan to the tables and computes it."""
        if plan.scrubbed:
            self.kv.data[:, :, plan.scrubbed] = 0
        self._apply(plan)
        self.sampler.admit(plan.admissions)
        hidden = self.forward(plan)
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        sampled = [(index, chunk) for index, chunk in enumerate(plan.chunks) if chunk.samples]
        if not sampled:
            return HostStep(StepResult([], [], {}, prompt_logprobs))
        last_rows = np.cumsum([chunk.count for chunk in plan.chunks]) - 1
        logits = self.model.logits(hidden[last_rows[[index for index, _ in sampled]]])
        slots, positions = [chunk.slot for _, chunk in sampled], [chunk.start + chunk.count for _, chunk in sampled]
        token_ids, finite = self.sampler.sample(logits, slots, positions)
        self.token_ids[slots, positions] = token_ids
        logprobs = {}
        for row, (index, chunk) in enumerate(sampled):
            wanted = self.sampler.num_logprobs(chunk.slot)
            if wanted is not None:
                logprobs[index] = row_logprobs(logits[row], token_ids[row], wanted)
        return HostStep(StepResult(token_ids, finite, logprobs, prompt_logprobs))

    def _apply(self, plan: Plan) -> None:
        """Writes the tokens and pages of sequences that start or restart, and the pages that others gained."""
        for admission in plan.admissions:
            self.token_ids[admission.slot, : len(admission.token_ids)] = admission.token_ids
            self.page_tables[admission.slot, : len(admission.page_ids)] = admission.page_ids
        for slot, index, page in plan.grown:
            self.page_tables[slot, index] = page

    def forward(self, plan: Plan) -> Floats:
        """Hidden states [T, E] of a plan that the tables know."""
        fields = np.array([(chunk.slot, chunk.start, chunk.count) for chunk in plan.chunks], np.int64)
        slots, starts, counts = fields.T.copy()
        query_starts = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
        row_slots = np.repeat(slots, counts)
        # Row t of a chunk has the position start + (t - first row of the chunk).
        positions = np.arange(plan.num_tokens) + np.repeat(starts - query_starts[:-1], counts)
        page_size = self.kv.page_size
        pages = self.page_tables[row_slots, positions // page_size].astype(np.int64)
        batch = HostBatch(
            token_ids=self.token_ids[row_slots, positions].astype(np.int64),
            positions=positions,
            kv_slots=pages * page_size + positions % page_size,
            slots=slots,
            kv_lengths=starts + counts,
            query_starts=query_starts,
            page_tables=self.page_tables,
        )
        return self.model.forward(batch, self.kv)

    def _prompt_logprobs(self, plan: Plan, hidden: Floats) -> dict[int, list[TokenLogprobs]]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        found: dict[int, list[TokenLogprobs]] = {}
        first = 0
        for index, chunk in enumerate(plan.chunks):
            if chunk.prompt_logprobs is not None:
                following = self.token_ids[chunk.slot, chunk.start + 1 : chunk.start + chunk.count + 1].tolist()
                entries = found[index] = []
                for low in range(0, chunk.count, _LOGIT_ROWS):
                    rows = slice(first + low, first + min(low + _LOGIT_ROWS, chunk.count))
                    for logits, token_id in zip(self.model.logits(hidden[rows]), following[low:], strict=False):
                        entries.append(row_logprobs(logits, token_id, chunk.prompt_logprobs))
            first += chunk.count
        return found


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that the system hands out, zeroed, when they are first touched.

    They are asked for as small pages: of large ones, a first token would touch one in every layer, and wait until they
    are zeroed.
    """
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
