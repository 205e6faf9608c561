"""The experts of a mixture: all in one tensor, or in one matrix of codes, for a GPU's grouped products."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ingle import kernels
from ingle.kernels.coded import Coded
from ingle.kernels.flow import ExpertBiases
from ingle.kernels.options import Activation
from ingle.weights.coded_part import CodedPart
from ingle.weights.matrix import Weight
from ingle.weights.source import ExpertNames, WeightSource, check_sizes


class Experts(Protocol):
    """The gated MLPs of a layer."""

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
        biases: ExpertBiases | None = None,
    ) -> torch.Tensor:
        """The weighted sum of what a token's experts give: x [T, E], expert_ids and weights [T, K] to [T, E]."""
        ...

    def parameters(self) -> Iterator[torch.Tensor | Weight]: ...


@dataclass(frozen=True)
class StackedExperts:
    """Gated MLPs of one shape, with E features and I within: numbers of a float type, multiplied by a kernel."""

    gate_up: torch.Tensor
    """[N, 2 * I, E]: of each expert the gate's rows, then those of the up projection."""
    down: torch.Tensor
    """[N, E, I]"""

    @classmethod
    def load(
        cls,
        source: WeightSource,
        names: Sequence[ExpertNames],
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> StackedExperts:
        for gate_up_names, down_name in names:
            matrix = hidden_size * intermediate_size
            check_sizes(source, gate_up_names, [2 * matrix // len(gate_up_names)] * len(gate_up_names))
            check_sizes(source, [down_name], [matrix])
        gate_up = torch.empty(len(names), 2 * intermediate_size, hidden_size, dtype=dtype, device=device)
        down = torch.empty(len(names), hidden_size, intermediate_size, dtype=dtype, device=device)
        for expert, (gate_up_names, down_name) in enumerate(names):
            for name, part in zip(gate_up_names, gate_up[expert].chunk(len(gate_up_names)), strict=True):
                source.load_into(name, part)
            source.load_into(down_name, down[expert])
        return cls(gate_up, down)

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
        biases: ExpertBiases | None = None,
    ) -> torch.Tensor:
        return kernels.of(x).experts(x, expert_ids, weights, self.gate_up, self.down, activation, biases)

    def parameters(self) -> Iterator[torch.Tensor]:
        yield from (self.gate_up, self.down)


@dataclass(frozen=True)
class CodedExperts:
    """The same as codes with scales."""

    gate_up: tuple[Coded, ...]
    """Rows [N * 2 * I]; or of two matrices, the gates' and the up projections', [N * I] each."""
    down: Coded
    """Rows [N * E]."""
    dtype: torch.dtype
    """Of activations."""

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        activation: Activation,
        biases: ExpertBiases | None = None,
    ) -> torch.Tensor:
        return kernels.of(x).experts_coded(x, expert_ids, weights, self.gate_up, self.down, activation, biases)

    def parameters(self) -> Iterator[Weight]:
        yield Weight(tuple(CodedPart(coded, self.dtype) for coded in self.gate_up))
        yield Weight((CodedPart(self.down, self.dtype),))
