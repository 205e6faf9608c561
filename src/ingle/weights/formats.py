"""How a matrix of weights is stored and multiplied. Model code holds a `Weight` and never asks which it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from ingle import kernels
from ingle.kernels.options import Activation
from ingle.weights.experts import StackedExperts
from ingle.weights.source import ExpertNames, WeightSource, check_sizes


class Weight(Protocol):
    """A matrix [out_features, in_features]."""

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """That it takes in memory."""
        ...

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x @ weight.T + bias [out_features]: [.., in_features] to [.., out_features] of the same type."""
        ...

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        """`ingle.kernels.reference.gated` of that product: [T, in_features] to [T, out_features / 2]."""
        ...

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Some of its rows, as an embedding looks them up: int64 [T] to [T, in_features] of the activations' type."""
        ...


class WeightFormat(Protocol):
    """Where a model's matrices go: one instance loads them all."""

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        """The tensors `names`, of `num_rows` rows each, one below the other in a single matrix.

        Raises `ModelError` for tensors that are missing or misshapen.
        """
        ...

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> StackedExperts:
        """The experts of a layer, in order. Raises as `load` does."""
        ...


@dataclass(frozen=True)
class PlainWeight:
    """Numbers of a float type, multiplied by PyTorch."""

    tensor: torch.Tensor

    @property
    def num_parameters(self) -> int:
        return self.tensor.numel()

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.itemsize

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return kernels.of(x).multiply(x, self.tensor, bias)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        return kernels.of(x).multiply_gated(x, self.tensor, bias, activation)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return F.embedding(indices, self.tensor)


@dataclass(frozen=True)
class PlainFormat:
    """Decodes whatever the source stores to `dtype`."""

    dtype: torch.dtype
    device: torch.device

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        check_sizes(source, names, [rows * in_features for rows in num_rows])
        out = torch.empty(sum(num_rows), in_features, dtype=self.dtype, device=self.device)
        for name, part in zip(names, out.split_with_sizes(list(num_rows)), strict=True):
            source.load_into(name, part)
        return PlainWeight(out)

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> StackedExperts:
        return StackedExperts.load(source, names, hidden_size, intermediate_size, self.dtype, self.device)


def total_size(parts: Iterable[torch.Tensor | Weight]) -> tuple[int, int]:
    """Parameters and bytes, of an object that comes twice once."""
    num_parameters = num_bytes = 0
    for part in {id(part): part for part in parts}.values():
        if isinstance(part, torch.Tensor):
            num_parameters, num_bytes = num_parameters + part.numel(), num_bytes + part.numel() * part.itemsize
        else:
            num_parameters, num_bytes = num_parameters + part.num_parameters, num_bytes + part.num_bytes
    return num_parameters, num_bytes
