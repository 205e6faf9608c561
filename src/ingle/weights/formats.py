"""How matrices of weights come from what a source stores: which format each of them is held in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ingle.weights.experts import StackedExperts
from ingle.weights.matrix import Weight
from ingle.weights.source import ExpertNames, WeightSource, check_sizes


class WeightFormat(Protocol):
    """Says of each matrix of a model in what format its parts are held: one instance loads them all."""

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
class PlainFormat:
    """Decodes whatever the source stores to `dtype`."""

    dtype: torch.dtype
    device: torch.device

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        check_sizes(source, names, [rows * in_features for rows in num_rows])
        out = torch.empty(sum(num_rows), in_features, dtype=self.dtype, device=self.device)
        for name, part in zip(names, out.split_with_sizes(list(num_rows)), strict=True):
            source.load_into(name, part)
        return Weight.of(out)

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> StackedExperts:
        return StackedExperts.load(source, names, hidden_size, intermediate_size, self.dtype, self.device)
