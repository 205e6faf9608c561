"""The native CPU device: a `NativeDecoder`, its KV pages and tables in NumPy. A step is done when it is launched."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ingle.device import LogprobRows, Report
from ingle.device.inputs import Inputs, inputs_of
from ingle.device.native.decoder import NativeBatch, NativeDecoder, NativeKv, Wanted
from ingle.device.native.parts import Floats
from ingle.device.native.sampler import NativeSampler, logprob_rows
from ingle.device.pages import HostPages
from ingle.heap import give_back_memory
from ingle.kernels.cpu import library
from ingle.step import RESERVED_PAGE, Limits, Masks, Step

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once."""


class NativeDevice:
    """A CPU with ingle's kernels."""

    def __init__(self, model: NativeDecoder, limits: Limits, num_pages: int, kv_dtype: str) -> None:
        self.model = model
        self.sampler = NativeSampler(model.config.vocab_size)
        self.token_ids = np.zeros((limits.max_num_seqs, limits.max_model_len + 1), np.int32)
        pages_per_seq = -(-limits.max_model_len // limits.page_size)
        spec = model.config.kv_spec(kv_dtype)
        self.page_tables = np.full((len(spec.groups), limits.max_num_seqs, pages_per_seq), RESERVED_PAGE, np.int32)
        data = _zeros((spec.num_places, spec.sides, num_pages, spec.side_bytes(limits.page_size)))
        self.kv = NativeKv(data, limits.page_size, spec, np.array(spec.located, np.int32))

    def pages(self) -> HostPages:
        return HostPages(self.kv.data)

    def usable(self) -> bool:
        """A step that fails leaves nothing behind that the next would not write anew."""
        return True

    def relieve(self) -> None:
        give_back_memory()

    def progress(self) -> int:
        return library.num_jobs()

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        pass

    def close(self) -> None:
        pass

    def capture_next(self) -> bool:
        """There are no graphs to capture."""
        return False

    def apply(self, step: Step) -> None:
        if step.scrubbed:
            self.kv.data[:, :, step.scrubbed] = 0
        for group, slot, index, page in step.page_entries:
            self.page_tables[group, slot, index] = page
        for admission in step.admissions:
            self.token_ids[admission.slot, : len(admission.token_ids)] = admission.token_ids
            for table, page_ids in zip(self.page_tables, admission.page_ids, strict=True):
                table[admission.slot, : len(page_ids)] = page_ids
        for chunk in step.chunks:
            if brought := chunk.drafts or chunk.told:
                self.token_ids[chunk.slot, chunk.end - len(brought) : chunk.end] = brought
        self.sampler.admit(step.admissions)

    def forward(self, step: Step) -> NativeStep:
        inputs = inputs_of(step, query_block=step.num_tokens)
        wanted = _wanted(step, inputs)
        hidden = self.hidden(inputs, wanted)
        return NativeStep(self, step, inputs, hidden, hidden if wanted is not None else hidden[inputs.sample_rows])

    def hidden(self, inputs: Inputs, wanted: Wanted | None = None) -> Floats:
        """Hidden states [T, E] of a step that was applied, or [W, E] of the tokens that are wanted."""
        slots, positions, page_size = inputs.row_slots, inputs.positions, self.kv.page_size
        pages = self.page_tables[:, slots, positions // page_size].astype(np.int64, order="C")
        batch = NativeBatch(
            token_ids=self.token_ids[slots, positions].astype(np.int64),
            positions=positions,
            kv_places=pages * page_size + positions % page_size,
            slots=inputs.slots,
            kv_lengths=inputs.kv_lengths,
            query_starts=inputs.query_starts,
            page_tables=self.page_tables,
            wanted=wanted,
        )
        return self.model.forward(batch, self.kv)

    def prompt_logprobs(self, step: Step, hidden: Floats) -> dict[int, LogprobRows]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        found: dict[int, LogprobRows] = {}
        first = 0
        for index, chunk in enumerate(step.chunks):
            if chunk.prompt_logprobs is not None:
                following = self.token_ids[chunk.slot, chunk.start + 1 : chunk.end + 1].astype(np.int64)
                rows = hidden[first : first + chunk.count]
                parts = [
                    logprob_rows(
                        self.model.logits(rows[low : low + _LOGIT_ROWS]),
                        following[low : low + _LOGIT_ROWS].tolist(),
                        chunk.prompt_logprobs,
                    )
                    for low in range(0, chunk.count, _LOGIT_ROWS)
                ]
                found[index] = LogprobRows(*map(np.concatenate, zip(*parts, strict=True)))
            first += chunk.count
        return found

    def pooled(self, step: Step, inputs: Inputs, hidden: Floats) -> dict[int, Floats]:
        """For each chunk that asks: one vector of its hidden states."""
        found: dict[int, Floats] = {}
        scored: dict[int, int] = {}
        for index, chunk in enumerate(step.chunks):
            first, last = int(inputs.query_starts[index]), int(inputs.query_starts[index + 1]) - 1
            match None if chunk.pooling is None else chunk.pooling.kind:
                case "last":
                    found[index] = hidden[last].copy()
                case "mean":
                    found[index] = hidden[first : last + 1].sum(axis=0)
                case "cls":
                    found[index] = hidden[first] + hidden[last] * np.float32(0)  # NaN of any token is to be seen
                case "logits":
                    scored[index] = last
        if scored:
            logits = self.model.logits(hidden[list(scored.values())])
            for (index, pooling), row in zip(((i, step.chunks[i].pooling) for i in scored), logits, strict=True):
                assert pooling is not None
                found[index] = row[list(pooling.token_ids)]
        return found


@dataclass(slots=True)
class NativeStep:
    """A step whose hidden states are there."""

    device: NativeDevice
    step: Step
    inputs: Inputs
    hidden: Floats
    """[T, E]; of a step that nobody asks for more than draws, as `drawn`."""
    drawn: Floats
    """[R, E], of the tokens after which one is drawn."""
    reported: Report | None = None

    def logits(self, start: int, stop: int) -> Floats:
        return self.device.model.logits(self.hidden[start:stop])

    def sample(self, masks: Masks) -> None:
        device, inputs = self.device, self.inputs
        prompt_logprobs = device.prompt_logprobs(self.step, self.hidden)
        pooled = device.pooled(self.step, inputs, self.hidden)
        if not len(inputs.sample_rows):
            nothing = np.zeros(0, np.int64)
            self.reported = Report(nothing, nothing.astype(np.bool_), None, prompt_logprobs, pooled)
            return
        logits = device.model.logits(self.drawn)
        device.sampler.set_masks(masks)
        slots, positions = inputs.sample_slots.tolist(), inputs.sample_positions.tolist()
        token_ids, finite = device.sampler.sample(logits, slots, positions)
        device.token_ids[slots, positions] = token_ids
        wanted = [chunk.logprobs for chunk in self.step.chunks if chunk.logprobs is not None]
        logprobs = logprob_rows(logits, token_ids, max(wanted)) if wanted else None
        self.reported = Report(np.array(token_ids), np.array(finite), logprobs, prompt_logprobs, pooled)

    def report(self) -> Report:
        assert self.reported is not None, "a step is reported before it is sampled"
        return self.reported


def _wanted(step: Step, inputs: Inputs) -> Wanted | None:
    """The tokens after which one is drawn, where nobody asks for anything of the others."""
    if len(inputs.sample_rows) == step.num_tokens:
        return None
    if any(chunk.prompt_logprobs is not None or chunk.pooling is not None for chunk in step.chunks):
        return None
    starts = np.cumsum([0, *(chunk.num_samples for chunk in step.chunks)])
    return Wanted(np.ascontiguousarray(inputs.sample_rows, np.int64), starts.astype(np.int64))


def _zeros(shape: tuple[int, ...]) -> np.ndarray:
    """Bytes that the system hands out, zeroed, when they are first touched.

    They are asked for as small pages: of large ones, a first token would touch one in every layer, and wait until they
    are zeroed.
    """
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)
