"""The parts of a decoder, each holding its weights. They read like the paper; devices are not their business."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.kernels.flow import Flow, LayerCache, Rotation
from ingle.kernels.group import Group
from ingle.kernels.options import Activation, AttentionOptions
from ingle.weights.matrix import Weight

Parameter = torch.Tensor | Weight


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias, weight [out, in] in a format of its own."""

    weight: Weight
    bias: torch.Tensor | None = None
    group: Group | None = None
    """Ranks that have shares of its columns: `add_to` adds up their products."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Of a share of columns, its own product alone."""
        return self.weight.multiply(x, self.bias)

    def add_to(self, flow: Flow, x: torch.Tensor, norm: RMSNorm, post_norm: RMSNorm | None) -> Flow:
        """What it makes of x added to the flow, on its way to `norm`; with `post_norm`, through that first."""
        return kernels.of(x).project_and_add(x, self, flow, norm, post_norm)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True)
class RMSNorm:
    """`weight` has the type of the model, or float32 where the product is to be rounded once."""

    weight: torch.Tensor
    eps: float
    before: Weight | None = None
    """What the normed rows are multiplied by, where nothing else takes them."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.of(x).rms_norm(x, self.weight, self.eps)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the pages of a KV cache."""

    qkv: Linear
    out: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    num_heads: int
    options: AttentionOptions
    sinks: torch.Tensor | None = None
    """float32 [num_heads]"""
    query_factors: torch.Tensor | None = None
    """float32 [max_model_len]: what rotated queries are multiplied by, by position."""

    def __call__(self, flow: Flow, cos_sin: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """What each token attends to, before the projection `out`: [T, Hq * D]. cos_sin: [T, rotary_dim]."""
        run = kernels.of(flow.residual)
        q = run.project_and_store(flow, self.qkv, self._rotation(cos_sin, cache))
        if self.query_factors is not None:
            q = q * self.query_factors[cache.batch.inputs.positions].to(q.dtype)[:, None, None]
        return run.paged_attention(q, cache.kv_cache, cache.batch, self.options, cache.kv_scales, self.sinks).flatten(1)

    def _rotation(self, cos_sin: torch.Tensor, cache: LayerCache) -> Rotation:
        return Rotation(
            num_heads=self.num_heads,
            cos_sin=cos_sin,
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            kv_cache=cache.kv_cache,
            kv_places=cache.kv_places,
            kv_scales=cache.kv_scales,
        )

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.qkv, self.out, self.q_norm, self.k_norm):
            if part is not None:
                yield from part.parameters()
        if self.sinks is not None:
            yield self.sinks


@dataclass(frozen=True)
class GatedMLP:
    gate_up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, E] to [T, E]"""
        return self.down(self.gate_up.weight.multiply_gated(x, self.gate_up.bias, self.activation))

    def add_to(self, flow: Flow, norm: RMSNorm, post_norm: RMSNorm | None) -> Flow:
        """What it makes of the flow's normed rows, added to it on its way to `norm`, through `post_norm` if given."""
        run = kernels.of(flow.residual)
        return run.gated_mlp(flow, self.gate_up, self.down, self.activation, norm, post_norm)

    def expert_parameters(self) -> Iterator[Parameter]:
        return iter(())

    def parameters(self) -> Iterator[Parameter]:
        yield from self.gate_up.parameters()
        yield from self.down.parameters()
