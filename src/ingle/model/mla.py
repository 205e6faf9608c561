"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): K and V of all heads from one latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.kernels.flow import Flow, LayerCache
from ingle.kernels.options import AttentionOptions
from ingle.model.architecture import DecoderConfig, MlaConfig
from ingle.model.layers import Linear, Parameter, RMSNorm
from ingle.model.loader import Loader

_LATENT_NORM_EPS = 1e-6
"""Of the latents' norms, whatever the configuration says of the others."""


@dataclass(frozen=True)
class LatentQueries:
    """Queries by way of a latent of their own: [T, E] to [T, Hq * D]."""

    down: Linear
    norm: RMSNorm
    up: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.norm(self.down(x)))

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.down, self.norm, self.up):
            yield from part.parameters()


@dataclass(frozen=True)
class LatentAttention:
    """Expands the latent to keys and values of every head and caches those, as attention with heads of its own.

    That takes the same kernels and pages as every family, and much memory: 2 * Hq * D numbers a token and layer, where
    the latent and the rotated part of the key, cached in their place, are kv_lora_rank + qk_rope_head_dim: for
    DeepSeek-V3 576 instead of 49,152. In the cache a head has its rotated dimensions first, and values are padded with
    zeros to the size of keys.
    """

    queries: Linear | LatentQueries
    kv_down: Linear
    """To the latent, then the part of the key that all heads share."""
    kv_norm: RMSNorm
    kv_up: Linear
    out: Linear
    num_heads: int
    config: MlaConfig
    options: AttentionOptions

    def __call__(self, flow: Flow, cos_sin: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """As `Attention.__call__`: [T, Hq * v_head_dim]. cos_sin: [T, qk_rope_head_dim]."""
        run, c = kernels.of(flow.residual), self.config
        x = run.normed(flow)
        q_nope, q_rope = self._heads(self.queries(x)).split_with_sizes((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.kv_down(x).split_with_sizes((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        k_nope, v = self._heads(self.kv_up(self.kv_norm(latent))).split_with_sizes(
            (c.qk_nope_head_dim, c.v_head_dim), dim=-1
        )
        qkv = x.new_empty(len(x), 3, self.num_heads, c.qk_head_dim)
        q, k, padded_v = qkv.unbind(1)
        for part, rope, nope in ((q, q_rope, q_nope), (k, k_rope[:, None], k_nope)):
            part[..., : c.qk_rope_head_dim] = self._halves(rope)
            part[..., c.qk_rope_head_dim :] = nope
        padded_v[..., : c.v_head_dim] = v
        padded_v[..., c.v_head_dim :] = 0
        rotated = run.rotate_and_store(
            qkv.view(len(x), -1), self.num_heads, cos_sin, None, None, 0.0, cache.kv_cache, cache.kv_slots
        )
        attended = run.paged_attention(rotated, cache.kv_cache, cache.batch, self.options)
        return attended[..., : c.v_head_dim].flatten(1)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), self.num_heads, -1)

    def _halves(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs that rotate together, from neighbours to the same place in each half, as kernels rotate them."""
        return x.reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2) if self.config.rope_interleave else x

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.queries, self.kv_down, self.kv_norm, self.kv_up, self.out):
            yield from part.parameters()


def load_latent_attention(
    config: DecoderConfig, mla: MlaConfig, load: Loader, prefix: str, layer: int
) -> LatentAttention:
    """The attention of the layer whose names begin with `prefix`."""
    hidden, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias

    def linear(name: str, num_rows: int, in_features: int, *, bias: bool = False) -> Linear:
        return load.linear([f"{prefix}.self_attn.{name}"], [num_rows], in_features, bias=bias)

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(load.tensor(f"{prefix}.self_attn.{name}.weight", size), _LATENT_NORM_EPS)

    queries: Linear | LatentQueries
    if mla.q_lora_rank is None:
        queries = linear("q_proj", config.q_size, hidden)
    else:
        queries = LatentQueries(
            down=linear("q_a_proj", mla.q_lora_rank, hidden, bias=bias),
            norm=norm("q_a_layernorm", mla.q_lora_rank),
            up=linear("q_b_proj", config.q_size, mla.q_lora_rank),
        )
    return LatentAttention(
        queries=queries,
        kv_down=linear("kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, bias=bias),
        kv_norm=norm("kv_a_layernorm", mla.kv_lora_rank),
        kv_up=linear("kv_b_proj", heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
        out=linear("o_proj", hidden, heads * mla.v_head_dim, bias=config.output_bias),
        num_heads=heads,
        config=mla,
        options=config.attention(layer),
    )
