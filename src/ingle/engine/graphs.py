"""Decode steps as CUDA graphs: one launch instead of some three hundred, sampling included.

A graph is captured for a padded number of sequences the first time that number is needed, so that nothing is captured
before the first answer. Its inputs are slots and positions, in tensors of its own; everything else it finds in the
per-slot tables. Padding rows belong to a slot of their own, whose page is the reserved one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ingle.engine.batch import to_device
from ingle.engine.sampler import Samples

DecodeStep = Callable[[torch.Tensor, torch.Tensor, bool], Samples]


@dataclass(slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    """int64 [2, size]: slots, positions."""
    samples: Samples


class DecodeGraphs:
    """Graphs of `step` for up to `max_num_seqs` sequences."""

    def __init__(self, step: DecodeStep, max_num_seqs: int, padding_slot: int, device: torch.device) -> None:
        self._step = step
        self._sizes = graph_sizes(max_num_seqs)
        self._padding_slot = padding_slot
        self._device = device
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, slots: list[int], positions: list[int], *, filtered: bool) -> Samples:
        """Launches the step of these sequences. The result is overwritten by the next step of the same size."""
        size = next(size for size in self._sizes if size >= len(slots))
        captured = self._captured.get((size, filtered)) or self._capture(size, filtered)
        inputs = np.zeros((2, size), np.int64)
        inputs[0] = self._padding_slot
        inputs[0, : len(slots)] = slots
        inputs[1, : len(slots)] = positions
        captured.inputs.copy_(to_device(inputs, self._device), non_blocking=True)
        captured.graph.replay()
        return Samples(captured.samples.token_ids[: len(slots)], captured.samples.finite[: len(slots)])

    def _capture(self, size: int, filtered: bool) -> _Captured:
        inputs = torch.zeros(2, size, dtype=torch.int64, device=self._device)
        inputs[0] = self._padding_slot
        self._step(inputs[0], inputs[1], filtered)  # compiles kernels and readies libraries, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            samples = self._step(inputs[0], inputs[1], filtered)
        captured = self._captured[size, filtered] = _Captured(graph, inputs, samples)
        return captured


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Padded numbers of sequences: fine where a step is short, coarser above."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs + 32, 32)]
    return sorted({min(size, max_num_seqs) for size in sizes})
