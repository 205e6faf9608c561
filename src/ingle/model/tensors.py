"""Which tensors a decoder is read from, so that a checkpoint is known to hold them before any of them is read."""

from __future__ import annotations

from collections.abc import Iterator

from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig
from ingle.model.mixture_names import bias_of, mixture_names
from ingle.weights.source import WeightSource, split_name

Needed = Iterator[tuple[str, int]]
"""Names of tensors, and how many numbers each has."""
_DOWNLOAD_AGAIN = "download the model's files again, all of them"


def check_tensors(config: DecoderConfig, source: WeightSource) -> None:
    """Asks the headers for every tensor of a decoder that is as `checkpoint.as_stored` says.

    Raises `ModelError`, which names the first that cannot be read and counts the others.
    """
    first: ModelError | None = None
    num_more = 0
    for name, size in needed(config, source):
        try:
            source.check(name, size)
        except ModelError as error:
            num_more += first is not None
            first = first or error
    if first is not None:
        others = f" (so are {num_more} more of its tensors)" if num_more else ""
        raise ModelError(f"{first.what}{others}", alternative=first.alternative or _DOWNLOAD_AGAIN)


def needed(config: DecoderConfig, source: WeightSource) -> Needed:
    """By the names that `source` has where it may have several."""
    names, table = config.names, config.vocab_size * config.hidden_size
    yield f"{names.embedding}.weight", table
    if not config.tied_embeddings:
        yield f"{names.lm_head}.weight", table
    yield f"{names.norm}.weight", config.hidden_size
    for index in range(config.num_layers):
        yield from _layer(config, source, index)


def _layer(config: DecoderConfig, source: WeightSource, index: int) -> Needed:
    names, prefix, hidden = config.names, f"{config.names.layers}.{index}", config.hidden_size
    norms = [names.input_norm, names.mlp_norm]
    if config.post_norms:
        norms += [names.attention_post_norm, names.mlp_post_norm]
    for norm in norms:
        yield f"{prefix}.{norm}.weight", hidden
    if config.mla is not None:
        yield from _latent_attention(config, config.mla, prefix)
    else:
        rows = [config.q_size, config.kv_size, config.kv_size]
        yield from _linear(prefix, names.qkv, rows, hidden, config.qkv_bias)
        for norm in (names.q_norm, names.k_norm) if config.qk_norm else ():
            yield f"{prefix}.{norm}.weight", config.head_dim
        if config.sinks:
            yield f"{prefix}.{names.sinks}", config.num_heads
    yield from _linear(prefix, (names.attention_out,), [hidden], config.attended_size, config.output_bias)
    if config.moe is not None and index in config.moe.layers:
        yield from _mixture(config.moe, source, prefix, hidden)
        return
    inner = config.intermediate_size
    yield from _linear(prefix, names.gate_up, [inner, inner], hidden, config.mlp_bias)
    yield from _linear(prefix, (names.mlp_down,), [hidden], inner, config.mlp_bias)


def _linear(prefix: str, modules: tuple[str, ...], num_rows: list[int], columns: int, bias: bool) -> Needed:
    """One matrix product for several modules; a single one has all the rows."""
    for module, rows in zip(modules, num_rows if len(modules) > 1 else [sum(num_rows)], strict=True):
        yield f"{prefix}.{module}.weight", rows * columns
        if bias:
            yield f"{prefix}.{module}.bias", rows


def _latent_attention(config: DecoderConfig, mla: MlaConfig, prefix: str) -> Needed:
    hidden, q_rank, rank = config.hidden_size, mla.q_lora_rank, mla.kv_lora_rank
    prefix = f"{prefix}.self_attn"
    if q_rank is not None:
        yield from _linear(prefix, ("q_a_proj",), [q_rank], hidden, config.qkv_bias)
        yield f"{prefix}.q_a_layernorm.weight", q_rank
    yield from _linear(prefix, ("q_proj" if q_rank is None else "q_b_proj",), [config.q_size], q_rank or hidden, False)
    yield from _linear(prefix, ("kv_a_proj_with_mqa",), [rank + mla.qk_rope_head_dim], hidden, config.qkv_bias)
    yield f"{prefix}.kv_a_layernorm.weight", rank
    up_rows = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield from _linear(prefix, ("kv_b_proj",), [up_rows], rank, False)


def _mixture(moe: MoeConfig, source: WeightSource, prefix: str, hidden: int) -> Needed:
    names, num_experts, matrix = mixture_names(source, moe, prefix), moe.router.num_experts, moe.intermediate_size
    matrix *= hidden
    yield names.router, num_experts * hidden
    if moe.router_bias:
        yield names.router_bias, num_experts
    if moe.selection_bias:
        yield names.selection_bias, num_experts
    shared = [(names.shared, moe.shared_intermediate_size * hidden)] if moe.shared_intermediate_size else []
    for expert, size in [*((expert, matrix) for expert in names.experts), *shared]:
        place = split_name(expert.down)[1]
        if place is not None and place.at:
            continue  # the stack was asked for with its first
        for name in expert.gate_up:
            yield name, 2 * size // len(expert.gate_up)
            if moe.expert_biases:
                yield bias_of(name), 2 * moe.intermediate_size // len(expert.gate_up)
        yield expert.down, size
        if moe.expert_biases:
            yield bias_of(expert.down), hidden
    if moe.shared_gate:
        yield names.shared_gate, hidden
