"""The experts of a mixture: all in one tensor, for a GPU's grouped products, or each in a format of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ingle import kernels
from ingle.kernels import reference
from ingle.kernels.options import Activation
from ingle.weights.matrix import Weight
from ingle.weights.source import ExpertNames, WeightSource, check_sizes

LoadMatrix = Callable[[WeightSource, Sequence[str], Sequence[int], int], Weight]
"""`ingle.weights.formats.WeightFormat.load`"""


class Experts(Protocol):
    """Gated MLPs of one shape, with E features and I within."""

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        """The weighted sum of what a token's experts give: x [T, E], expert_ids and weights [T, K] to [T, E]."""
        ...

    def parameters(self) -> Iterator[torch.Tensor | Weight]: ...


@dataclass(frozen=True)
class StackedExperts:
    """Numbers of a float type, multiplied by a kernel."""

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
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        return kernels.of(x).experts(x, expert_ids, weights, self.gate_up, self.down, activation)

    def parameters(self) -> Iterator[torch.Tensor | Weight]:
        yield from (self.gate_up, self.down)


@dataclass(frozen=True)
class SeparateExperts:
    """One after the other, each as any other matrix is stored and multiplied: for a CPU."""

    gate_up: tuple[Weight, ...]
    down: tuple[Weight, ...]

    @classmethod
    def load(
        cls,
        load: LoadMatrix,
        source: WeightSource,
        names: Sequence[ExpertNames],
        hidden_size: int,
        intermediate_size: int,
    ) -> SeparateExperts:
        def rows(gate_up: tuple[str, ...]) -> list[int]:
            return [2 * intermediate_size // len(gate_up)] * len(gate_up)

        return cls(
            tuple(load(source, expert.gate_up, rows(expert.gate_up), hidden_size) for expert in names),
            tuple(load(source, [expert.down], [hidden_size], intermediate_size) for expert in names),
        )

    def __call__(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, activation: Activation
    ) -> torch.Tensor:
        def apply(expert: int, rows: torch.Tensor) -> torch.Tensor:
            gate_up = self.gate_up[expert].multiply(rows)
            return self.down[expert].multiply(kernels.of(gate_up).gated(gate_up, activation))

        return reference.one_by_one(x, expert_ids, weights, len(self.down), apply)

    def parameters(self) -> Iterator[torch.Tensor | Weight]:
        yield from (*self.gate_up, *self.down)
