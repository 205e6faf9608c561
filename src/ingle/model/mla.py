"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): what is cached is the latent itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.kernels.flow import Flow, LayerCache
from ingle.model.architecture import LATENT_NORM_EPS, DecoderConfig, MlaConfig
from ingle.model.layers import Linear, Parameter, RMSNorm
from ingle.model.loader import Loader


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
    """Caches the latent and the rotated key that all heads share, kv_lora_rank + qk_rope_head_dim numbers a token.

    Keys and values are never made of the latent: what would make them is multiplied into queries and results, as
    `ingle.kernels.reference_latent` says.
    """

    queries: Linear | LatentQueries
    kv_down: Linear
    """To the latent, then the part of the key that all heads share."""
    kv_norm: RMSNorm
    kv_up: torch.Tensor
    """[H, qk_nope_head_dim + v_head_dim, kv_lora_rank]: of each head W_UK, then W_UV, in the type of activations."""
    out: Linear
    config: MlaConfig
    scale: float
    """Factor on the scores."""

    def __call__(self, flow: Flow, cos_sin: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """As `Attention.__call__`: [T, H * v_head_dim]. cos_sin: [T, qk_rope_head_dim].

        The layer's cache is [1, num_pages, page_size, 1, kv_lora_rank + qk_rope_head_dim].
        """
        run, c, latents = kernels.of(flow.residual), self.config, cache.kv_cache[0, :, :, 0]
        x = run.normed(flow)
        q = self.queries(x).view(len(x), len(self.kv_up), -1)
        q_nope, q_rope = q.split_with_sizes((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        key_up, value_up = self.kv_up.split_with_sizes((c.qk_nope_head_dim, c.v_head_dim), dim=1)
        q_rope = run.store_latent(
            self.kv_down(x), q_rope, self.kv_norm.weight, self.kv_norm.eps, cos_sin, latents, cache.kv_places,
            interleaved=c.rope_interleave,
        )  # fmt: skip
        attended = run.latent_attention(_multiply_heads(q_nope, key_up), q_rope, latents, cache.batch, self.scale)
        return _multiply_heads(attended, value_up.transpose(1, 2)).flatten(1)

    def parameters(self) -> Iterator[Parameter]:
        for part in (self.queries, self.kv_down, self.kv_norm, self.out):
            yield from part.parameters()
        yield self.kv_up


def _multiply_heads(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Each head of x [T, H, N] by a matrix of its own, matrices [H, N, M]: [T, H, M], contiguous."""
    out = x.new_empty(*x.shape[:2], matrices.shape[-1])
    torch.bmm(x.transpose(0, 1), matrices, out=out.transpose(0, 1))
    return out


def load_latent_attention(
    config: DecoderConfig, mla: MlaConfig, load: Loader, prefix: str, layer: int
) -> LatentAttention:
    """The attention of the layer whose names begin with `prefix`."""
    hidden, heads, bias = config.hidden_size, config.num_heads, config.qkv_bias
    up_rows = mla.qk_nope_head_dim + mla.v_head_dim

    def linear(name: str, num_rows: int, in_features: int, *, bias: bool = False) -> Linear:
        return load.linear([f"{prefix}.self_attn.{name}"], [num_rows], in_features, bias=bias)

    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(load.tensor(f"{prefix}.self_attn.{name}.weight", size), LATENT_NORM_EPS)

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
        kv_up=load.tensor(f"{prefix}.self_attn.kv_b_proj.weight", heads * up_rows, mla.kv_lora_rank).view(
            heads, up_rows, mla.kv_lora_rank
        ),
        out=load.reduced(f"{prefix}.self_attn.o_proj", hidden, heads * mla.v_head_dim, bias=config.output_bias),
        config=mla,
        scale=config.attention(layer).scale,
    )
