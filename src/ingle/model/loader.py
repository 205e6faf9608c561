"""Reads what every decoder consists of: a parameter is allocated once, on its device, and read into place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ingle.kernels.group import Group
from ingle.kernels.options import Activation
from ingle.model.architecture import DecoderConfig
from ingle.model.layers import GatedMLP, Linear, RMSNorm
from ingle.weights.formats import WeightFormat
from ingle.weights.matrix import Weight
from ingle.weights.source import WeightSource, check_sizes


@dataclass(frozen=True)
class Loader:
    """Reads named tensors of `source`: matrices in `matrices`' format, all others as `dtype`, onto `device`."""

    source: WeightSource
    matrices: WeightFormat
    dtype: torch.dtype
    device: torch.device
    group: Group | None = None
    """Ranks of which each loads its share of the model; None for one that loads all of it."""

    def as_float32(self) -> Loader:
        """For the few weights that are kept in full precision."""
        return replace(self, dtype=torch.float32)

    def empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.stacked([name], [shape[0]], *shape[1:])

    def stacked(self, names: Sequence[str], num_rows: Sequence[int], *row_shape: int) -> torch.Tensor:
        """The tensors `names`, of `num_rows` rows each, one below the other in a single tensor."""
        check_sizes(self.source, names, [rows * math.prod(row_shape) for rows in num_rows])
        out = self.empty(sum(num_rows), *row_shape)
        for name, part in zip(names, out.split_with_sizes(list(num_rows)), strict=True):
            self.source.load_into(name, part)
        return out

    def matrix(self, name: str, num_rows: int, in_features: int) -> Weight:
        return self.matrices.load(self.source, [name], [num_rows], in_features)

    def linear(self, names: Sequence[str], num_rows: Sequence[int], in_features: int, *, bias: bool) -> Linear:
        """One matrix product for the projections `names` of the same input; a single name has all the rows."""
        num_rows = num_rows if len(names) > 1 else [sum(num_rows)]
        weight = self.matrices.load(self.source, [f"{name}.weight" for name in names], num_rows, in_features)
        return Linear(weight, self.stacked([f"{name}.bias" for name in names], num_rows) if bias else None)

    def reduced(self, name: str, num_rows: int, in_features: int, *, bias: bool) -> Linear:
        """A product whose columns are divided among the ranks. One of them has the bias."""
        own_bias = bias and (self.group is None or self.group.place == 0)
        return replace(self.linear([name], [num_rows], in_features, bias=own_bias), group=self.group)

    def norm(self, name: str, size: int, config: DecoderConfig) -> RMSNorm:
        if not config.one_plus_norms:
            return RMSNorm(self.tensor(f"{name}.weight", size), config.norm_eps)
        # In float32, also in 16-bit models: there 1 + weight would lose most of the weight's digits.
        return RMSNorm(self.as_float32().tensor(f"{name}.weight", size) + 1.0, config.norm_eps)

    def gated_mlp(
        self,
        gate_up: Sequence[str],
        down: str,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        *,
        bias: bool = False,
        reduced: bool = True,
    ) -> GatedMLP:
        """The names are those of the gate's and the up projection, or of both in one, and of the down projection.

        Not `reduced`: somebody else adds up what the ranks' shares give.
        """
        mlp_down = self.reduced(down, hidden_size, intermediate_size, bias=bias)
        return GatedMLP(
            gate_up=self.linear(gate_up, [intermediate_size, intermediate_size], hidden_size, bias=bias),
            down=mlp_down if reduced else replace(mlp_down, group=None),
            activation=activation,
        )
