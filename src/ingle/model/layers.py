"""The parts of a decoder, each holding its weights. They read like the paper; devices are not their business."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.kernels.batch import Batch
from ingle.kernels.options import Activation, AttentionOptions
from ingle.weights.formats import Weight

Parameter = torch.Tensor | Weight


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias, weight [out, in] in a format of its own."""

    weight: Weight
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.multiply(x, self.bias)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(frozen=True)
class RMSNorm:
    """`weight` has the type of the model, or float32 where the product is to be rounded once."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.of(x).rms_norm(x, self.weight, self.eps)

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, post_norm: RMSNorm | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum; with `post_norm`, of equal eps, x goes through that first."""
        post_weight = None if post_norm is None else post_norm.weight
        return kernels.of(x).add_rms_norm(x, residual, self.weight, self.eps, post_weight)

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
    query_factors: torch.Tensor | None = None
    """float32 [max_model_len]: what rotated queries are multiplied by, by position."""

    def __call__(self, x: torch.Tensor, cos_sin: torch.Tensor, kv_cache: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x [T, E], cos_sin [T, rotary_dim], kv_cache as `ingle.kernels.reference` has it, to [T, E]."""
        run = kernels.of(x)
        q_norm, k_norm = (norm.weight if norm is not None else None for norm in (self.q_norm, self.k_norm))
        eps = self.q_norm.eps if self.q_norm is not None else 0.0
        q = run.rotate_and_store(
            self.qkv(x), self.num_heads, cos_sin, q_norm, k_norm, eps, kv_cache, batch.kv_slots
        )  # fmt: skip
        if self.query_factors is not None:
            q = q * self.query_factors[batch.inputs.positions].to(q.dtype)[:, None, None]
        return self.out(run.paged_attention(q, kv_cache, batch, self.options).flatten(1))

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.qkv, self.out, self.q_norm, self.k_norm):
            if part is not None:
                yield from part.parameters()


@dataclass(frozen=True)
class GatedMLP:
    gate_up: Linear
    down: Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gate_up.weight.multiply_gated(x, self.gate_up.bias, self.activation))

    def parameters(self) -> Iterator[Parameter]:
        yield from self.gate_up.parameters()
        yield from self.down.parameters()
