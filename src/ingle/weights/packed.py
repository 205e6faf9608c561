"""Packed matrices in a model that PyTorch runs: a mixture's, or one with latent attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ingle.weights.code_types import CODE_TYPES
from ingle.weights.experts import Experts, SeparateExperts
from ingle.weights.matrix import Weight
from ingle.weights.packed_matrix import PackedPart, load_matrix
from ingle.weights.source import ExpertNames, WeightSource


@dataclass(frozen=True)
class PackedRows:
    """A part as the CPU's kernels read it. Activations are float32."""

    packed: PackedPart

    @property
    def num_rows(self) -> int:
        return self.packed.num_rows

    @property
    def num_parameters(self) -> int:
        return self.packed.num_parameters

    @property
    def num_bytes(self) -> int:
        return self.packed.data.nbytes

    @property
    def plain(self) -> None:
        return None

    @property
    def factors(self) -> frozenset[str]:
        """16-bit integers, or bfloat16."""
        return self.packed.factors

    def multiply_into(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self.packed.multiply_into(x.data_ptr(), len(x), out.data_ptr(), out.stride(0))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.packed.rows(indices.contiguous().numpy()))


@dataclass(frozen=True)
class PackedFormat:
    """Keeps the source's codes where it has them."""

    kept_types: frozenset[str] = frozenset(CODE_TYPES)

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        matrix = load_matrix(source, names, num_rows, in_features)
        return Weight(tuple(PackedRows(part) for part in matrix.parts))

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> Experts:
        return SeparateExperts.load(self.load, source, names, hidden_size, intermediate_size)
