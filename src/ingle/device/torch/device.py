"""PyTorch's device: a model, its KV pages and tables as tensors, on a GPU or a CPU."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ingle import kernels, progress
from ingle.device import LogprobRows, PageCopies, Report
from ingle.device.inputs import Layout
from ingle.device.pages import HostPages
from ingle.device.torch.graphs import CapturedForward, Ranks, StepGraphs
from ingle.device.torch.pages import GpuPages
from ingle.device.torch.sampler import Sampler, padded_alternatives
from ingle.device.torch.tables import SlotTables
from ingle.heap import give_back_memory
from ingle.kernels.batch import Batch, KvCache, StepInputs, query_block
from ingle.kernels.group import Border
from ingle.kernels.sampling import Features, Logprobs, Samples
from ingle.kv import KvSpec
from ingle.model.interface import Model
from ingle.step import Chunk, Limits, Masks, Step

_LOGIT_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities take at once: 64 x 150k x float32 is 40 MB."""


class TorchDevice:
    """A device that PyTorch drives."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        num_pages: int,
        device: torch.device,
        kv: KvSpec,
        *,
        use_graphs: bool = False,
        among: Ranks | None = None,
        in_halves: bool = False,
    ) -> None:
        """`kv`: the model's; `among`, `in_halves`: as `StepGraphs` has them."""
        config = model.config
        self.model = model
        self.device = device
        self.tables = SlotTables(
            limits.max_num_seqs,
            limits.max_model_len,
            limits.page_size,
            query_block(kv.dim),
            device,
            len(kv.groups),
        )
        self.sampler = Sampler(limits.max_num_seqs, config.vocab_size, device)
        shape = (kv.num_places, kv.sides, num_pages, kv.side_bytes(limits.page_size))
        self.kv_cache = KvCache.over(kv, _zeros(shape, device), limits.page_size)
        self.graphs, self._in_halves = None, in_halves
        if use_graphs and model.capturable:
            self.graphs = StepGraphs(self, self.tables, limits, among, in_halves=in_halves)

    @torch.inference_mode()
    def apply(self, step: Step) -> None:
        if step.scrubbed:
            self.kv_cache.raw[:, :, torch.tensor(step.scrubbed, device=self.device)] = 0
        self.tables.apply(step)
        self.sampler.admit(step.admissions)

    @torch.inference_mode()
    def forward(self, step: Step) -> TorchStep:
        """Queues the forward of a step, and its draw too where both are in one CUDA graph."""
        launched = TorchStep(self, step)
        if self.graphs is not None and not any(map(_leaves_graph, step.chunks)):
            if step.masked or self._in_halves:
                launched.captured = self.graphs.forward(step)
            elif (samples := self.graphs.run(step, self.sampler.features(step.chunks, Masks()))) is not None:
                launched.take(samples)
            if launched.queued:
                return launched
        launched.batch = self.tables.batch_of(step)
        launched.hidden = self.model.forward(launched.batch, self.kv_cache)
        return launched

    def pages(self) -> PageCopies:
        if self.device.type == "cuda":
            return GpuPages(self.kv_cache.raw, threading.Lock() if self.graphs is None else self.graphs.capturing)
        return HostPages(self.kv_cache.raw.numpy())

    def usable(self) -> bool:
        """After a fault in a kernel a GPU refuses all that comes later; other errors leave it as it was."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    def relieve(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            give_back_memory()

    def progress(self) -> int:
        return progress.num_layers()

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        pass

    def close(self) -> None:
        if self.graphs is not None:
            self.graphs.reset()

    @torch.inference_mode()
    def capture_next(self) -> bool:
        return self.graphs is not None and self.graphs.capture_next()

    @property
    def border(self) -> Border | None:
        return self.model.border

    def hidden_rows(self, inputs: StepInputs, layout: Layout) -> torch.Tensor:
        """The forward of a step of padded inputs: hidden states [R, E] of the rows whose next token is drawn."""
        batch = self.tables.batch(inputs, layout.num_seqs, layout.num_blocks, [], layout.most_keys)
        hidden = self.model.forward(batch, self.kv_cache)
        return hidden[inputs.sample_rows] if layout.num_blocks else hidden  # each decode draws after its one token

    def draw(self, hidden: torch.Tensor, inputs: StepInputs, features: Features) -> Samples:
        """The draw for hidden states [R, E], and the drawn tokens' way into the table."""
        share = self.model.logits_share(hidden)
        samples = self.sampler.sample(self.model.logits(hidden) if share is None else share, inputs, features)
        run = kernels.of(samples.token_ids)
        run.keep(samples.token_ids, inputs.sample_slots, inputs.sample_positions, self.tables.token_ids)
        return samples


class TorchStep:
    """A step whose kernels are queued; `report` waits for them, and only then do numbers come to the host."""

    def __init__(self, device: TorchDevice, step: Step) -> None:
        self._device = device
        self._step = step
        self.batch: Batch | None = None
        self.hidden: torch.Tensor | None = None
        """[T, E], of a step that is no CUDA graph."""
        self.captured: CapturedForward | None = None
        """Of a step whose draw is a CUDA graph of its own."""
        self._samples: Samples | None = None
        self._prompt_logprobs: dict[int, list[Logprobs]] = {}
        self._pooled: dict[int, torch.Tensor] = {}
        self._done: torch.cuda.Event | None = None

    @property
    def queued(self) -> bool:
        """Whether a CUDA graph computes it."""
        return self.captured is not None or self._done is not None

    @torch.inference_mode()
    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        assert self.hidden is not None, "the step went through a graph"
        logits: npt.NDArray[np.float32] = self._device.model.logits(self.hidden[start:stop]).float().cpu().numpy()
        return logits

    @torch.inference_mode()
    def sample(self, masks: Masks) -> None:
        device = self._device
        if self.captured is not None and device.graphs is not None:
            device.sampler.set_masks(masks)
            features = device.sampler.features(self._step.chunks, masks)
            self.take(device.graphs.draw(self.captured, features))
        elif self.hidden is not None and self.batch is not None:
            self._sample(self.batch.inputs, self.hidden, masks)

    def _sample(self, inputs: StepInputs, hidden: torch.Tensor, masks: Masks) -> None:
        device = self._device
        self._score_prompts(hidden)
        self._pool(hidden)
        samples = None
        if len(inputs.sample_rows):
            device.sampler.set_masks(masks)
            features = device.sampler.features(self._step.chunks, masks)
            samples = device.draw(hidden[inputs.sample_rows], inputs, features)
        self.take(samples)

    def take(self, samples: Samples | None) -> None:
        """What was drawn: its way to the host begins."""
        self._samples = samples
        if self._device.device.type == "cpu":
            return
        self._samples = None if samples is None else samples.to_host()
        self._prompt_logprobs = {
            index: [part.to_host() for part in parts] for index, parts in self._prompt_logprobs.items()
        }
        self._pooled = {index: vector.to("cpu", non_blocking=True) for index, vector in self._pooled.items()}
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def _score_prompts(self, hidden: torch.Tensor) -> None:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        device, first = self._device, 0
        for index, chunk in enumerate(self._step.chunks):
            if chunk.prompt_logprobs is not None:
                following = device.tables.token_ids[chunk.slot, chunk.start + 1 : chunk.end + 1].long()
                parts = self._prompt_logprobs[index] = []
                for low in range(0, chunk.count, _LOGIT_ROWS):
                    high = min(low + _LOGIT_ROWS, chunk.count)
                    logits = device.model.logits(hidden[first + low : first + high])
                    count = padded_alternatives(chunk.prompt_logprobs)
                    parts.append(kernels.of(logits).logprobs(logits, following[low:high], count))
            first += chunk.count

    def _pool(self, hidden: torch.Tensor) -> None:
        """For each chunk that asks: one vector of its hidden states, in float32."""
        first, scored = 0, dict[int, int]()
        for index, chunk in enumerate(self._step.chunks):
            last = first + chunk.count - 1
            match None if chunk.pooling is None else chunk.pooling.kind:
                case "last":
                    self._pooled[index] = hidden[last].float()
                case "mean":
                    self._pooled[index] = hidden[first : last + 1].sum(dim=0, dtype=torch.float32)
                case "cls":
                    self._pooled[index] = hidden[first].float() + hidden[last] * 0  # NaN of any token is to be seen
                case "logits":
                    scored[index] = last
            first += chunk.count
        if scored:
            logits = self._device.model.logits(hidden[list(scored.values())])
            for index, row in zip(scored, logits, strict=True):
                pooling = self._step.chunks[index].pooling
                assert pooling is not None
                self._pooled[index] = row[list(pooling.token_ids)].float()

    def report(self) -> Report:
        if self._done is not None:
            self._done.synchronize()
        prompt_logprobs = {index: _rows(*parts) for index, parts in self._prompt_logprobs.items()}
        pooled = {index: vector.numpy() for index, vector in self._pooled.items()}
        if self._samples is None:
            nothing = np.zeros(0, np.int64)
            return Report(nothing, nothing.astype(np.bool_), None, prompt_logprobs, pooled)
        token_ids, finite, logprobs = self._samples
        num_rows = sum(chunk.num_samples for chunk in self._step.chunks)  # those after are padding
        return Report(
            token_ids.numpy()[:num_rows],
            finite.numpy()[:num_rows],
            None if logprobs is None else _rows(logprobs),
            prompt_logprobs,
            pooled,
        )


def _rows(*parts: Logprobs) -> LogprobRows:
    return LogprobRows(
        *(np.concatenate([tensor.numpy() for tensor in tensors]) for tensors in zip(*parts, strict=True))
    )


def _zeros(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Bytes, zeros: what a padding row reads is multiplied by a zero weight, and must be finite for that to be nothing.

    On a CPU the system hands out zeroed memory when it is first touched. It is asked for small pages: of large ones, a
    first token would touch one in every layer, and wait until they are zeroed.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


def _leaves_graph(chunk: Chunk) -> bool:
    """Whether it asks for what no CUDA graph computes."""
    told = len(chunk.told) > 1  # a single one is the drawn token that a pipeline's first stage has not seen
    return bool(chunk.prompt_logprobs is not None or chunk.pooling is not None or chunk.drafts or told)
