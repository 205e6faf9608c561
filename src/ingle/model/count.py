"""How many numbers a decoder has, by its configuration alone: what memory is planned from before anything is read."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig


def num_parameters(config: DecoderConfig) -> int:
    """Of all its matrices and vectors; tied embeddings count once."""
    rows = config.vocab_size if config.vocab_rows is None else config.vocab_rows
    num_matrices = config.is_first + config.is_last - (config.is_first and config.is_last and config.tied_embeddings)
    ends = rows * config.hidden_size * num_matrices + config.hidden_size
    return ends + sum(count_layer(config, index).total for index in config.layers)


@dataclass(frozen=True)
class LayerCount:
    """Numbers of a layer. Tensor parallelism splits matrices and experts, and repeats the rest on each rank."""

    matrices: int
    """And their biases, which each rank has a part of."""
    experts: int
    repeated: int
    """Norms, routers, and the projections down to latents."""

    @property
    def total(self) -> int:
        return self.matrices + self.experts + self.repeated


def count_layer(config: DecoderConfig, index: int) -> LayerCount:
    norms = (4 if config.post_norms else 2) * config.hidden_size
    matrices, repeated = _attention(config) if config.mla is None else _latent_attention(config, config.mla)
    if config.moe is not None and index in config.moe.layers:
        experts, shared, router = _mixture(config.moe, config.hidden_size)
        return LayerCount(matrices + shared, experts, norms + repeated + router)
    inner, hidden = config.intermediate_size, config.hidden_size
    biases = 2 * inner + hidden if config.mlp_bias else 0
    return LayerCount(matrices + 3 * inner * hidden + biases, 0, norms + repeated)


def count_experts(config: DecoderConfig, layers: Collection[int]) -> int:
    """Numbers of the experts of these layers, of which a token reads some."""
    return sum(count_layer(config, index).experts for index in layers)


def _attention(config: DecoderConfig) -> tuple[int, int]:
    qkv_rows = config.q_size + 2 * config.kv_size
    biases = qkv_rows * config.qkv_bias + config.hidden_size * config.output_bias
    biases += config.num_heads * config.sinks
    head_norms = 2 * config.head_dim * config.qk_norm
    return (qkv_rows + config.q_size) * config.hidden_size + biases, head_norms


def _latent_attention(config: DecoderConfig, mla: MlaConfig) -> tuple[int, int]:
    hidden, heads, bias = config.hidden_size, config.num_heads, int(config.qkv_bias)
    q_size, rank = heads * mla.qk_head_dim, mla.q_lora_rank
    q_up, q_down = (q_size * hidden, 0) if rank is None else (q_size * rank, rank * (hidden + bias) + rank)
    kv_down = (mla.kv_lora_rank + mla.qk_rope_head_dim) * (hidden + bias) + mla.kv_lora_rank
    kv_up = heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    out = hidden * heads * mla.v_head_dim + hidden * config.output_bias
    return q_up + kv_up + out, q_down + kv_down


def _mixture(moe: MoeConfig, hidden: int) -> tuple[int, int, int]:
    """Experts, the shared expert, and the router with the gate of that."""
    router = moe.router.num_experts * (hidden + moe.selection_bias + moe.router_bias)
    biases = (2 * moe.intermediate_size + hidden) * moe.expert_biases
    experts = moe.router.num_experts * (3 * moe.intermediate_size * hidden + biases)
    return experts, 3 * moe.shared_intermediate_size * hidden, router + hidden * moe.shared_gate
