"""Steps as CUDA graphs: one launch instead of hundreds, sampling included.

A graph is captured for padded sizes the first time they are needed, or while the engine idles, so that nothing is
captured before the first answer. Its inputs are one packed tensor; everything else it finds in the per-slot tables.
Decode-only steps are padded in the number of sequences, steps with prompt chunks in the number of tokens. Padding rows
belong to a slot of their own, whose page is the reserved one, and to no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ingle.device import Ints
from ingle.device.inputs import Layout, pack
from ingle.device.torch.sampler import Samples
from ingle.device.torch.tables import SlotTables, to_device, unpack
from ingle.kernels.batch import StepInputs
from ingle.step import Limits, Step

RunStep = Callable[[StepInputs, Layout, bool], Samples]


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    packed: torch.Tensor
    samples: Samples


class StepGraphs:
    """Graphs of `step` for every plan within `limits`."""

    def __init__(self, step: RunStep, tables: SlotTables, limits: Limits) -> None:
        self._run_step = step
        self._tables = tables
        self._max_num_seqs = limits.max_num_seqs
        self._decode_sizes = decode_sizes(limits.max_num_seqs)
        self._token_sizes = token_sizes(limits.max_num_batched_tokens)
        self._captured: dict[tuple[Layout, bool], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Step, num_samples: int, *, filtered: bool) -> Samples:
        """Launches a step that was applied. The result is overwritten by the next step of the same size."""
        layout = self._layout(step)
        captured = self._captured.get((layout, filtered)) or self._capture(layout, filtered)
        packed = to_device(self._pack(step, layout), self._tables.device)
        captured.packed.copy_(packed, non_blocking=True)
        captured.graph.replay()
        return Samples(captured.samples.token_ids[:num_samples], captured.samples.finite[:num_samples])

    def capture_next(self) -> bool:
        """Captures one more of the unfiltered steps, decodes first; False when there is none left."""
        wanted = [_decode_layout(size) for size in self._decode_sizes]
        wanted += [self._mixed_layout(size) for size in self._token_sizes]
        for layout in wanted:
            if (layout, False) not in self._captured:
                self._capture(layout, False)
                return True
        return False

    def _layout(self, step: Step) -> Layout:
        if step.num_decodes == len(step.chunks):
            return _decode_layout(next(size for size in self._decode_sizes if size >= step.num_decodes))
        return self._mixed_layout(next(size for size in self._token_sizes if size >= step.num_tokens))

    def _pack(self, step: Step, layout: Layout) -> Ints:
        return pack(step, layout, self._tables.query_block, self._tables.padding_slot)

    def _mixed_layout(self, num_tokens: int) -> Layout:
        num_seqs = min(self._max_num_seqs, num_tokens)
        # Every chunk may end in a block that is not full.
        return Layout(num_tokens, num_seqs, num_seqs, num_tokens // self._tables.query_block + num_seqs)

    def _capture(self, layout: Layout, filtered: bool) -> _Captured:
        packed = torch.from_numpy(self._pack(Step(), layout)).to(self._tables.device)
        inputs = unpack(packed, layout)
        self._run_step(inputs, layout, filtered)  # compiles kernels and readies libraries, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            samples = self._run_step(inputs, layout, filtered)
        captured = self._captured[layout, filtered] = _Captured(graph, packed, samples)
        return captured


def _decode_layout(size: int) -> Layout:
    return Layout(size, size, size, 0)


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Padded numbers of decoding sequences: fine where a step is short, coarser above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return sorted({min(size, max_num_seqs) for size in sizes})


def token_sizes(max_num_batched_tokens: int) -> list[int]:
    """Padded numbers of tokens of a step that reads prompts.

    Multiples of 128 above 256: between them the library's products take longer than at the next one, some of them twice
    as long.
    """
    sizes = [*range(64, 256, 64), *range(256, 2048, 128), *range(2048, max_num_batched_tokens + 256, 256)]
    return sorted({min(size, max_num_batched_tokens) for size in sizes})
