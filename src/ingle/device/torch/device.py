"""PyTorch's device: a model, its KV pages and tables as tensors, on a GPU or a CPU."""

from __future__ import annotations

import math
import mmap

import torch

from ingle.device import LogprobRows, Report
from ingle.device.inputs import Layout
from ingle.device.torch.graphs import StepGraphs
from ingle.device.torch.sampler import LogprobTensors, Sampler, Samples, logprob_rows
from ingle.device.torch.tables import SlotTables
from ingle.kernels.batch import Batch, StepInputs, query_block
from ingle.model.interface import Model
from ingle.step import Limits, Masks, Step

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
        dtype: torch.dtype,
        *,
        use_graphs: bool = False,
    ) -> None:
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
        self._graphs = StepGraphs(self._whole_step, self.tables, limits) if use_graphs and model.capturable else None

    @torch.inference_mode()
    def apply(self, step: Step) -> None:
        if step.scrubbed:
            self.kv_cache[:, :, torch.tensor(step.scrubbed, device=self.device)] = 0
        self.tables.apply(step)
        self.sampler.admit(step.admissions)

    @torch.inference_mode()
    def forward(self, step: Step) -> TorchStep:
        """Queues the forward of a step, and its draw too where both are in one CUDA graph."""
        launched = TorchStep(self, step)
        if self._graphs is not None and self._is_plain(step):
            slots = [chunk.slot for chunk in step.chunks if chunk.samples]
            launched.start_copies(self._graphs.run(step, len(slots), filtered=self.sampler.filters(slots)))
            return launched
        launched.batch = self.tables.batch_of(step)
        launched.hidden = self.model.forward(launched.batch, self.kv_cache)
        return launched

    def usable(self) -> bool:
        """After a fault in a kernel a GPU refuses all that comes later; other errors leave it as it was."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True

    @torch.inference_mode()
    def capture_next(self) -> bool:
        return self._graphs is not None and self._graphs.capture_next()

    def _is_plain(self, step: Step) -> bool:
        """Whether forward, draw and write-back are all there is to the step."""
        slots = [chunk.slot for chunk in step.chunks if chunk.samples]
        return (
            not step.masked
            and not self.sampler.adjusts(slots)
            and all(chunk.logprobs is None and not chunk.drafts for chunk in step.chunks)
            and all(chunk.prompt_logprobs is None for chunk in step.chunks[step.num_decodes :])
        )

    def _whole_step(self, inputs: StepInputs, layout: Layout, filtered: bool) -> Samples:
        """A plain step of padded inputs: what graphs capture."""
        batch = self.tables.batch(inputs, layout.num_seqs, layout.num_blocks, [])
        hidden = self.model.forward(batch, self.kv_cache)
        samples = self.sampler.draw(self.model.logits(hidden[inputs.sample_rows]), inputs, filtered=filtered)
        self.tables.token_ids[inputs.sample_slots, inputs.sample_positions] = samples.token_ids.int()
        return samples


class TorchStep:
    """A step whose kernels are queued; `report` waits for them, and only then do numbers come to the host."""

    def __init__(self, device: TorchDevice, step: Step) -> None:
        self._device = device
        self._step = step
        self.batch: Batch | None = None
        self.hidden: torch.Tensor | None = None
        """[T, E]; None where forward and draw are one."""
        self._token_ids: torch.Tensor | None = None
        self._finite: torch.Tensor | None = None
        self._done: torch.cuda.Event | None = None
        self._logprobs: LogprobTensors | None = None
        self._prompt_logprobs: dict[int, list[LogprobTensors]] = {}

    @torch.inference_mode()
    def sample(self, masks: Masks) -> None:
        if self.hidden is not None and self.batch is not None:
            self._sample(self.batch.inputs, self.hidden, masks)

    def _sample(self, inputs: StepInputs, hidden: torch.Tensor, masks: Masks) -> None:
        device, step = self._device, self._step
        self._prompt_logprobs = self._of_prompts(hidden)
        drawing = [chunk for chunk in step.chunks if chunk.samples]
        if not drawing:
            return
        logits = device.model.logits(hidden[inputs.sample_rows])
        rows = [
            (chunk.slot, chunk.end - before) for chunk in drawing for before in range(chunk.num_samples - 1, -1, -1)
        ]
        slots, positions = [slot for slot, _ in rows], [position for _, position in rows]
        device.sampler.set_masks(masks)
        samples = device.sampler.sample(logits, inputs, slots, positions)
        device.tables.token_ids[inputs.sample_slots, inputs.sample_positions] = samples.token_ids.int()
        wanted = [chunk.logprobs for chunk in drawing if chunk.logprobs is not None]
        if wanted:
            self._logprobs = logprob_rows(logits, samples.token_ids, max(wanted))
        self.start_copies(samples)

    def start_copies(self, samples: Samples) -> None:
        """Of what was drawn, to the host."""
        if self._device.device.type == "cpu":
            self._token_ids, self._finite = samples.token_ids, samples.finite
            return
        self._token_ids = samples.token_ids.to("cpu", non_blocking=True)
        self._finite = samples.finite.to("cpu", non_blocking=True)
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done.record()

    def _of_prompts(self, hidden: torch.Tensor) -> dict[int, list[LogprobTensors]]:
        """For each chunk that asks: log probabilities of the tokens that follow its own, as far as they are known."""
        device, found, first = self._device, {}, 0
        for index, chunk in enumerate(self._step.chunks):
            if chunk.prompt_logprobs is not None:
                following = device.tables.token_ids[chunk.slot, chunk.start + 1 : chunk.end + 1].long()
                rows = hidden[first : first + chunk.count]
                found[index] = [
                    logprob_rows(
                        device.model.logits(rows[low : low + _LOGIT_ROWS]),
                        following[low : low + _LOGIT_ROWS],
                        chunk.prompt_logprobs,
                    )
                    for low in range(0, chunk.count, _LOGIT_ROWS)
                ]
            first += chunk.count
        return found

    def report(self) -> Report:
        if self._done is not None:
            self._done.synchronize()
        nothing = torch.empty(0, dtype=torch.int64)
        token_ids = nothing if self._token_ids is None else self._token_ids
        finite = nothing.bool() if self._finite is None else self._finite
        return Report(
            token_ids.numpy(),
            finite.numpy(),
            None if self._logprobs is None else _on_host([self._logprobs]),
            {index: _on_host(parts) for index, parts in self._prompt_logprobs.items()},
        )


def _on_host(parts: list[LogprobTensors]) -> LogprobRows:
    return LogprobRows(*(torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True)))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros: what a padding row reads is multiplied by a zero weight, and must be finite for that to be nothing.

    On a CPU the system hands out zeroed memory when it is first touched. It is asked for small pages: of large ones, a
    first token would touch one in every layer, and wait until they are zeroed.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
