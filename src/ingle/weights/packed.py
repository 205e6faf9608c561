"""Packed matrices in a model that PyTorch runs: a mixture's, or one with latent attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ingle.kernels.cpu import operators
from ingle.kernels.options import Activation
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.experts import Experts, SeparateExperts
from ingle.weights.formats import Weight
from ingle.weights.packed_matrix import PackedMatrix, load_matrix
from ingle.weights.source import ExpertNames, WeightSource


@dataclass(frozen=True)
class PackedWeight:
    """Activations are float32."""

    matrix: PackedMatrix

    @property
    def num_parameters(self) -> int:
        return self.matrix.num_parameters

    @property
    def num_bytes(self) -> int:
        return self.matrix.num_bytes

    @property
    def factors(self) -> frozenset[str]:
        """What it is multiplied as, for people: 16-bit integers."""
        return self.matrix.factors

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        flat = x.reshape(-1, self.matrix.in_features).contiguous()
        out = torch.from_numpy(self.matrix.multiply(flat.numpy())).view(*x.shape[:-1], -1)
        return out if bias is None else out.add_(bias)

    def multiply_gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
        return operators.gated(self.multiply(x, bias), activation)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.matrix.rows(indices.contiguous().numpy()))


@dataclass(frozen=True)
class PackedFormat:
    """Keeps the source's codes where it has them."""

    kept_types: frozenset[str] = frozenset(CODE_TYPES)

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        return PackedWeight(load_matrix(source, names, num_rows, in_features))

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> Experts:
        return SeparateExperts.load(self, source, names, hidden_size, intermediate_size)
