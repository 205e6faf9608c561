"""The parts of a decoder, each holding its weights. They read like the paper; devices and batches are not their business."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ingle.engine.batch import Batch
from ingle.kernels import reference as kernels


@dataclass(frozen=True)
class Linear:
    """x @ weight.T + bias, weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and that sum."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) over the pages of a KV cache."""

    qkv: Linear
    out: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __call__(self, x: torch.Tensor, cos_sin: torch.Tensor, kv_cache: torch.Tensor, batch: Batch) -> torch.Tensor:
        """x [T, E], cos_sin [T, rotary_dim], kv_cache as `ingle.kernels.reference` has it, to [T, E]."""
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = heads.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = kernels.rotate(q, cos_sin), kernels.rotate(k, cos_sin)
        kernels.store_kv(kv_cache, batch.kv_slots, k, v)
        return self.out(kernels.paged_attention(q, kv_cache, batch, self.head_dim**-0.5).flatten(1))


@dataclass(frozen=True)
class GatedMLP:
    gate_up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(kernels.silu_mul(self.gate_up(x)))
