"""Runs planned steps on a device: owns the model, the KV pages and the per-slot tables; knows slots, not requests."""

from __future__ import annotations

import math
import mmap
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.device.torch.graphs import StepGraphs
from ingle.device.torch.sampler import Sampler, entries, padded_alternatives
from ingle.device.torch.tables import SlotTables, to_device, unpack
from ingle.engine.scheduler import Limits, Plan, StepResult
from ingle.kernels.batch import Batch, Layout, StepInputs, query_block
from ingle.kernels.cpu.threads import pytorch_on_one
from ingle.kernels.sampling import Features, Logprobs, Samples
from ingle.model.interface import Model

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once: 64 x 150k x float32 is 40 MB."""


@dataclass(slots=True)
class LaunchedStep:
    """A step whose kernels are queued; `result` waits for them, and only then do numbers come to the host."""

    num_samples: int
    """R. Further rows are padding."""
    samples: Samples
    done: torch.cuda.Event | None
    wanted: list[tuple[int, int, int]]
    """Of samples whose log probabilities are wanted: the chunk's index in the plan, the row, how many alternatives."""
    prompt_logprobs: dict[int, list[tuple[Logprobs, int]]]
    """By index of the chunk in the plan, with how many alternatives."""

    def result(self) -> StepResult:
        if self.done is not None:
            self.done.synchronize()
        rows = slice(self.num_samples)
        logprobs = {}
        if self.samples.logprobs is not None:
            found = entries(self.samples.logprobs, [(row, count) for _, row, count in self.wanted])
            logprobs = {index: entry for (index, _, _), entry in zip(self.wanted, found, strict=True)}
        return StepResult(
            self.samples.token_ids[rows].tolist(),
            self.samples.finite[rows].tolist(),
            logprobs,
            {
                index: [
                    entry
                    for part, count in parts
                    for entry in entries(part, [(row, count) for row in range(len(part.ranks))])
                ]
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
        config = model.config
        self.model = model
        self.device = device
        self.tables = SlotTables(
            limits.max_num_seqs, limits.max_model_len, limits.page_size, query_block(config.head_dim), device
        )
        self.sampler = Sampler(limits.max_num_seqs, config.vocab_size, device)
        self.kv_cache = _zeros(
            (config.num_layers, 2, num_pages, limits.page_size, config.num_kv_heads, config.head_dim), dtype, device
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
        features = self.sampler.features(slots)
        scores_prompts = any(chunk.prompt_logprobs is not None for chunk in plan.chunks[plan.num_decodes :])
        if self._graphs is None or scores_prompts:
            return self._launch_eagerly(plan, slots, features)
        return self._launched(plan, self._graphs.run(plan, features), {})

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

    def _step(self, inputs: StepInputs, layout: Layout, features: Features) -> Samples:
        """A step of padded inputs: what graphs capture."""
        batch = self.tables.batch(inputs, layout.num_seqs, layout.num_blocks, [])
        return self._sample(self.model.forward(batch, self.kv_cache), inputs, features)

    def _sample(self, hidden: torch.Tensor, inputs: StepInputs, features: Features) -> Samples:
        samples = self.sampler.sample(self.model.logits(hidden[inputs.sample_rows]), inputs, features)
        self.tables.token_ids[inputs.sample_slots, inputs.sample_positions] = samples.token_ids.int()
        return samples

    def _launch_eagerly(self, plan: Plan, slots: list[int], features: Features) -> LaunchedStep:
        layout = self.tables.layout(plan)
        inputs = unpack(to_device(self.tables.pack(plan, layout), self.device), layout)
        batch = self.tables.batch(inputs, plan.num_decodes, layout.num_blocks, plan.chunks)
        hidden = self.model.forward(batch, self.kv_cache)
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        if not slots:
            nothing = torch.empty(0, dtype=torch.int64, device=self.device)
            return self._launched(plan, Samples(nothing, nothing.bool()), prompt_logprobs)
        return self._launched(plan, self._sample(hidden, inputs, features), prompt_logprobs)

    def _launched(
        self, plan: Plan, samples: Samples, prompt_logprobs: dict[int, list[tuple[Logprobs, int]]]
    ) -> LaunchedStep:
        """Starts the copy of what was drawn to the host."""
        sampled = [(index, chunk.slot) for index, chunk in enumerate(plan.chunks) if chunk.samples]
        counts = self.sampler.num_logprobs([slot for _, slot in sampled])
        wanted = [
            (index, row, count)
            for row, ((index, _), count) in enumerate(zip(sampled, counts, strict=True))
            if count is not None
        ]
        if self.device.type == "cpu":
            return LaunchedStep(len(sampled), samples, None, wanted, prompt_logprobs)
        samples = samples.to_host()
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return LaunchedStep(len(sampled), samples, done, wanted, prompt_logprobs)

    def _prompt_logprobs(self, batch: Batch, hidden: torch.Tensor) -> dict[int, list[tuple[Logprobs, int]]]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        found: dict[int, list[tuple[Logprobs, int]]] = {}
        first = 0
        for index, chunk in enumerate(batch.chunks):
            if chunk.prompt_logprobs is not None:
                following = self.tables.token_ids[chunk.slot, chunk.start + 1 : chunk.start + chunk.count + 1].long()
                parts = found[index] = []
                for low in range(0, chunk.count, _LOGIT_ROWS):
                    high = min(low + _LOGIT_ROWS, chunk.count)
                    logits = self.model.logits(hidden[first + low : first + high])
                    count = padded_alternatives(chunk.prompt_logprobs)
                    scored = kernels.of(logits).logprobs(logits, following[low:high], count)
                    parts.append((scored if self.device.type == "cpu" else scored.to_host(), chunk.prompt_logprobs))
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
