"""How many numbers a decoder has, by its configuration alone: what memory is planned from before anything is read."""

from __future__ import annotations

from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig


def num_parameters(config: DecoderConfig) -> int:
    """Of all its matrices and vectors; tied embeddings count once."""
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)
    return embeddings + config.hidden_size + sum(_layer(config, index) for index in range(config.num_layers))


def _layer(config: DecoderConfig, index: int) -> int:
    norms = (4 if config.post_norms else 2) * config.hidden_size
    attention = _attention(config) if config.mla is None else _latent_attention(config, config.mla)
    if config.moe is not None and index in config.moe.layers:
        return norms + attention + _mixture(config.moe, config.hidden_size)
    inner, hidden = config.intermediate_size, config.hidden_size
    biases = 2 * inner + hidden if config.mlp_bias else 0
    return norms + attention + 3 * inner * hidden + biases


def _attention(config: DecoderConfig) -> int:
    qkv_rows = config.q_size + 2 * config.kv_size
    biases = qkv_rows * config.qkv_bias + config.hidden_size * config.output_bias
    head_norms = 2 * config.head_dim * config.qk_norm
    return (qkv_rows + config.q_size) * config.hidden_size + biases + head_norms


def _latent_attention(config: DecoderConfig, mla: MlaConfig) -> int:
    hidden, heads, bias = config.hidden_size, config.num_heads, int(config.qkv_bias)
    q_size, rank = heads * mla.qk_head_dim, mla.q_lora_rank
    queries = q_size * hidden if rank is None else rank * (hidden + bias) + rank + q_size * rank
    kv_rows = mla.kv_lora_rank + mla.qk_rope_head_dim
    kv_up = heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank
    out = hidden * heads * mla.v_head_dim + hidden * config.output_bias
    return queries + kv_rows * (hidden + bias) + mla.kv_lora_rank + kv_up + out


def _mixture(moe: MoeConfig, hidden: int) -> int:
    router = moe.router.num_experts * (hidden + moe.selection_bias)
    experts = moe.router.num_experts * 3 * moe.intermediate_size * hidden
    return router + experts + 3 * moe.shared_intermediate_size * hidden + hidden * moe.shared_gate
