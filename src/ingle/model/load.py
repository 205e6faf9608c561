"""Builds a decoder from a weight source: what a decoder consists of, and where a checkpoint has it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from ingle.kernels.group import Border, Group
from ingle.model.architecture import DecoderConfig
from ingle.model.decoder import Decoder, DecoderLayer, rotations
from ingle.model.layers import Attention, GatedMLP, Linear, RMSNorm
from ingle.model.loader import Loader
from ingle.model.mla import LatentAttention, load_latent_attention
from ingle.model.moe import SparseMoe, load_moe
from ingle.model.rope import query_factors
from ingle.weights.formats import WeightFormat
from ingle.weights.matrix import Weight
from ingle.weights.source import WeightSource

_NUM_THREADS = {"cpu": 2, "cuda": 4}
"""On a CPU, reading a file and converting its numbers overlap, and more would fight over memory bandwidth. To a GPU
two do not read as fast as it takes what they read."""


def load_decoder(
    config: DecoderConfig,
    source: WeightSource,
    *,
    matrices: WeightFormat,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    count_layers: Callable[[int], None] = lambda done: None,
    group: Group | None = None,
    border: Border | None = None,
) -> Decoder:
    """Reads every parameter of a decoder that is as `checkpoint.as_stored` says; `dtype` is that of activations.
    `count_layers` is told how many layers are there. With a `group`, config and source are this rank's share; a
    stage of a pipeline has a `border`.

    Raises `ModelError` for missing or misshapen ones.
    """
    load, names = Loader(source, matrices, dtype, device, group), config.names
    vocab_rows = config.vocab_size if config.vocab_rows is None else config.vocab_rows
    scale = config.embedding_scale
    factors = query_factors(config, max_model_len)
    on_device = None if factors is None else torch.from_numpy(factors).to(device)

    def use_device() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which is a thread's own

    with ThreadPoolExecutor(_NUM_THREADS[device.type], initializer=use_device) as threads:
        tables = [names.embedding] if config.is_first or (config.is_last and config.tied_embeddings) else []
        tables += [names.lm_head] if config.is_last and not config.tied_embeddings else []
        ends = [threads.submit(load.matrix, f"{name}.weight", vocab_rows, config.hidden_size) for name in tables]
        layers = []
        for layer in threads.map(lambda index: _load_layer(config, load, index, on_device), config.layers):
            layers.append(layer)
            count_layers(len(layers))
    embedding = ends[0].result() if config.is_first else Weight(())
    lm_head = ends[-1].result() if config.is_last else Weight(())
    behind = names.norm if config.is_last else f"{names.layers}.{config.layers.stop}.{names.input_norm}"
    return Decoder(
        config=config,
        embedding=embedding,
        embedding_scale=None if scale is None else float(torch.tensor(scale, dtype=dtype)),
        layers=tuple(layers),
        norm=load.norm(behind, config.hidden_size, config),
        lm_head=Linear(lm_head),
        cos_sin=rotations(config, max_model_len, device),
        group=group,
        border=border,
    )


def _load_layer(config: DecoderConfig, load: Loader, index: int, query_factors: torch.Tensor | None) -> DecoderLayer:
    names, prefix = config.names, f"{config.names.layers}.{index}"

    def norm(name: str, size: int, before: Weight | None = None) -> RMSNorm:
        return replace(load.norm(f"{prefix}.{name}", size, config), before=before)

    hidden = config.hidden_size
    attention, mlp = _load_attention(config, load, index, query_factors), _load_mlp(config, load, index)
    return DecoderLayer(
        input_norm=norm(names.input_norm, hidden, attention.qkv.weight if isinstance(attention, Attention) else None),
        attention=attention,
        attention_post_norm=norm(names.attention_post_norm, hidden) if config.post_norms else None,
        mlp_norm=norm(names.mlp_norm, hidden, mlp.gate_up.weight if isinstance(mlp, GatedMLP) else None),
        mlp=mlp,
        mlp_post_norm=norm(names.mlp_post_norm, hidden) if config.post_norms else None,
        rope=config.rope_index(index),
    )


def _load_attention(
    config: DecoderConfig, load: Loader, index: int, query_factors: torch.Tensor | None
) -> Attention | LatentAttention:
    names, prefix = config.names, f"{config.names.layers}.{index}"
    if config.mla is not None:
        return load_latent_attention(config, config.mla, load, prefix, index)

    def head_norm(name: str) -> RMSNorm | None:
        return load.norm(f"{prefix}.{name}", config.head_dim, config) if config.qk_norm else None

    return Attention(
        qkv=load.linear(
            [f"{prefix}.{name}" for name in names.qkv],
            [config.q_size, config.kv_size, config.kv_size],
            config.hidden_size,
            bias=config.qkv_bias,
        ),
        out=load.reduced(f"{prefix}.{names.attention_out}", config.hidden_size, config.q_size, bias=config.output_bias),
        q_norm=head_norm(names.q_norm),
        k_norm=head_norm(names.k_norm),
        num_heads=config.num_heads,
        options=config.attention(index),
        sinks=load.as_float32().tensor(f"{prefix}.{names.sinks}", config.num_heads) if config.sinks else None,
        query_factors=query_factors,
    )


def _load_mlp(config: DecoderConfig, load: Loader, index: int) -> GatedMLP | SparseMoe:
    names, prefix = config.names, f"{config.names.layers}.{index}"
    if config.moe is not None and index in config.moe.layers:
        return load_moe(config.moe, load, prefix, config.hidden_size, config.activation)
    gate_up, down = [f"{prefix}.{name}" for name in names.gate_up], f"{prefix}.{names.mlp_down}"
    return load.gated_mlp(
        gate_up, down, config.hidden_size, config.intermediate_size, config.activation, bias=config.mlp_bias
    )
