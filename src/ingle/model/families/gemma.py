"""Gemma 2 and 3: norms before and after each block, scaled embeddings, windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.model.families.common import (
    activation,
    base_config,
    integer,
    layer_windows,
    number,
    optional_integer,
    optional_number,
    rope_config,
)

_NAMES = WeightNames(mlp_norm="pre_feedforward_layernorm")
_WITH_IMAGES = replace(
    _NAMES,
    embedding="language_model.model.embed_tokens",
    layers="language_model.model.layers",
    norm="language_model.model.norm",
    lm_head="language_model.lm_head",
)


def gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2408.00118: every other layer has a window; scores and logits are soft-capped."""
    windows = layer_windows(config, optional_integer(config, "sliding_window"), lambda layer: layer % 2 == 0)
    softcap = optional_number(config, "attn_logit_softcapping")
    return _gemma(config, "gemma2", names=_NAMES, windows=windows, attention_softcap=softcap)


def gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2503.19786: all but every sixth layer have a window, and rotate by a base of their own.

    `gemma3` is the model of text and images, of which this is the text's part; `gemma3_text` is the text's alone.
    """
    pattern = integer(config, "sliding_window_pattern", 6)
    windows = layer_windows(config, optional_integer(config, "sliding_window"), lambda layer: (layer + 1) % pattern > 0)
    local = {"rope_theta": number(config, "rope_local_base_freq", 10000.0)}
    rope = rope_config(local, integer(config, "head_dim"))
    names = _WITH_IMAGES if config["model_type"] == "gemma3" else _NAMES
    return _gemma(config, "gemma3", names=names, windows=windows, window_rope=rope, qk_norm=True)


def _gemma(config: Mapping[str, Any], family: str, **choices: Any) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return base_config(
        config,
        family=family,
        qkv_bias=bias,
        output_bias=bias,
        post_norms=True,
        one_plus_norms=True,
        activation=activation(config, "hidden_activation"),
        embedding_scale=integer(config, "hidden_size") ** 0.5,
        attention_scale=number(config, "query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=optional_number(config, "final_logit_softcapping"),
        **choices,
    )
