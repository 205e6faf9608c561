"""Runs planned steps on a device: owns the model, the KV pages and the per-slot tables; knows slots, not requests."""

from __future__ import annotations

import math
import mmap
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ingle.device.torch.graphs import StepGraphs
from ingle.device.torch.sampler import LogprobRows, Sampler, Samples, logprob_rows
from ingle.device.torch.tables import SlotTables, to_device, unpack
from ingle.engine.scheduler import Limits, Plan, StepResult
from ingle.kernels.batch import Batch, Layout, StepInputs, query_block
from ingle.kernels.cpu.threads import pytorch_on_one
from ingle.model.interface import Model

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once: 64 x 150k x float32 is 40 MB."""


@dataclass(slots=True)
class LaunchedStep:
    """A step whose kernels are queued; `result` waits for them, and only then do numbers come to the host."""

    token_ids: torch.Tensor
    finite: torch.Tensor
    done: torch.cuda.Event | None
    logprobs: dict[int, LogprobRows]
    prompt_logprobs: dict[int, list[LogprobRows]]

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        return StepResult(
            self.token_ids.tolist(),
            self.finite.tolist(),
            {index: rows.entries()[0] for index, rows in self.logprobs.items()},
            {
                index: [entry for rows in parts for entry in rows.entries()]
                for index, parts in self.prompt_logprobs.items()
            },
        )


class Worker:
    """One device's share of the engine."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        num_pages: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        use_graphs: bool = False,
        own_threads: bool = False,
    ) -> None:
        """`own_threads`: the model's weights are multiplied by ingle's CPU kernels, on threads of their own."""
        config, layout = model.config, model.config.kv_layout
        self.model = model
        self.device = device
        self.tables = SlotTables(
            limits.max_num_seqs, limits.max_model_len, limits.page_size, query_block(layout.dim), device
        )
        self.sampler = Sampler(limits.max_num_seqs, config.vocab_size, device)
        self.kv_cache = _zeros(
            (config.num_layers, layout.sides, num_pages, limits.page_size, layout.heads, layout.dim), dtype, device
        )
        self._threads = pytorch_on_one if own_threads else nullcontext
        self._graphs = StepGraphs(self._step, self.tables, limits) if use_graphs and model.capturable else None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def kv_itemsize(self) -> int:
        return self.kv_cache.itemsize

    @torch.inference_mode()
    def launch(self, plan: Plan) -> LaunchedStep:
        """Applies the plan to the tables and queues its computation."""
        with self._threads():
            return self._launch(plan)

    def _launch(self, plan: Plan) -> LaunchedStep:
        if plan.scrubbed:
            self.kv_cache[:, :, torch.tensor(plan.scrubbed, device=self.device)] = 0
        self.tables.apply(plan)
        self.sampler.admit(plan.admissions)
        slots = [chunk.slot for chunk in plan.chunks if chunk.samples]
        if self._graphs is not None and self._is_plain(plan, slots):
            return self._launched(self._graphs.run(plan, len(slots), filtered=self.sampler.filters(slots)))
        return self._launch_eagerly(plan, slots)

    def usable(self) -> bool:
        """After a fault in a kernel a GPU refuses all that comes later; other errors leave it as it was."""
        try:
            if self.on_gpu:
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Captures one more CUDA graph that is likely to be needed; False when there is none left."""
        return self._graphs is not None and self._graphs.capture_next()

    def _is_plain(self, plan: Plan, slots: list[int]) -> bool:
        """Whether forward, draw and write-back are all there is to the step."""
        return (
            not self.sampler.adjusts(slots)
            and all(count is None for count in self.sampler.num_logprobs(slots))
            and all(chunk.prompt_logprobs is None for chunk in plan.chunks[plan.num_decodes :])
        )

    def _step(self, inputs: StepInputs, layout: Layout, filtered: bool) -> Samples:
        """A plain step of padded inputs: what graphs capture."""
        batch = self.tables.batch(inputs, layout.num_seqs, layout.num_blocks, [])
        hidden = self.model.forward(batch, self.kv_cache)
        samples = self.sampler.draw(self.model.logits(hidden[inputs.sample_rows]), inputs, filtered=filtered)
        self.tables.token_ids[inputs.sample_slots, inputs.sample_positions] = samples.token_ids.int()
        return samples

    def _launch_eagerly(self, plan: Plan, slots: list[int]) -> LaunchedStep:
        layout = self.tables.layout(plan)
        inputs = unpack(to_device(self.tables.pack(plan, layout), self.device), layout)
        batch = self.tables.batch(inputs, plan.num_decodes, layout.num_blocks, plan.chunks)
        hidden = self.model.forward(batch, self.kv_cache)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        if not slots:
            empty = torch.empty(0, dtype=torch.int64)
            return LaunchedStep(empty, empty, None, {}, prompt_logprobs)
        logits = self.model.logits(hidden[inputs.sample_rows])
        positions = [chunk.start + chunk.count for chunk in plan.chunks if chunk.samples]
        samples = self.sampler.sample(logits, inputs, slots, positions)
        self.tables.token_ids[inputs.sample_slots, inputs.sample_positions] = samples.token_ids.int()
        logprobs = self._logprobs(plan, logits, samples, slots)
        return self._launched(samples, logprobs, prompt_logprobs)

    def _launched(
        self,
        samples: Samples,
        logprobs: dict[int, LogprobRows] | None = None,
        prompt_logprobs: dict[int, list[LogprobRows]] | None = None,
    ) -> LaunchedStep:
        """Starts the copy of the tokens to the host."""
        if self.device.type == "cpu":
            return LaunchedStep(samples.token_ids, samples.finite, None, logprobs or {}, prompt_logprobs or {})
        token_ids = samples.token_ids.to("cpu", non_blocking=True)
        finite = samples.finite.to("cpu", non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return LaunchedStep(token_ids, finite, done, logprobs or {}, prompt_logprobs or {})

    def _logprobs(self, plan: Plan, logits: torch.Tensor, samples: Samples, slots: list[int]) -> dict[int, LogprobRows]:
        """By index of the chunk in the plan, for the rows that want them: of the logits as the model gave them."""
        wanted = self.sampler.num_logprobs(slots)
        sampled = [index for index, chunk in enumerate(plan.chunks) if chunk.samples]
        return {
            sampled[row]: logprob_rows(logits[row : row + 1], samples.token_ids[row : row + 1], [count])
            for row, count in enumerate(wanted)
            if count is not None
        }

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> dict[int, list[LogprobRows]]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        found: dict[int, list[LogprobRows]] = {}
        first = 0
        for index, chunk in enumerate(batch.chunks):
            if chunk.prompt_logprobs is not None:
                following = self.tables.token_ids[chunk.slot, chunk.start + 1 : chunk.start + chunk.count + 1].long()
                found[index] = [
                    logprob_rows(
                        self.model.logits(hidden[first + low : first + low + _LOGIT_ROWS][: chunk.count - low]),
                        following[low : low + _LOGIT_ROWS],
                        [chunk.prompt_logprobs] * min(_LOGIT_ROWS, chunk.count - low),
                    )
                    for low in range(0, chunk.count, _LOGIT_ROWS)
                ]
            first += chunk.count
        return found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what a padding row reads is multiplied by a zero weight, and must be finite for that to be nothing.

    On a CPU the system hands out zeroed memory when it is first touched. It is asked for small pages: of large ones, a
    first token would touch one in every layer, and wait until they are zeroed.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
