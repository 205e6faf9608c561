"""Gemma: scaled embeddings, norms by 1 + weight; from Gemma 2 on norms after blocks, and windows in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingle.errors import ModelError
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


def gemma(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2403.08295: Llama's shape otherwise. Its files say gelu and mean the approximation."""
    legacy = config.get("hidden_act", "gelu") == "gelu"
    return _gemma(config, "gemma", activation="gelu_tanh" if legacy else activation(config))


def gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2408.00118: every other layer has a window; scores and logits are soft-capped."""
    windows = layer_windows(config, optional_integer(config, "sliding_window"), lambda layer: layer % 2 == 0)
    softcap = optional_number(config, "attn_logit_softcapping")
    return _gemma(config, "gemma2", windows=windows, attention_softcap=softcap, **_since_gemma2(config))


def gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2503.19786: all but every sixth layer have a window, and rotate by a base of their own.

    `gemma3` is the model of text and images, of which this is the text's part; `gemma3_text` is the text's alone.
    """
    pattern = integer(config, "sliding_window_pattern", 6)
    windows = layer_windows(config, optional_integer(config, "sliding_window"), lambda layer: (layer + 1) % pattern > 0)
    local = {"rope_theta": number(config, "rope_local_base_freq", 10000.0)}
    rope = rope_config(local, integer(config, "head_dim"))
    choices = _since_gemma2(config)
    if config["model_type"] == "gemma3":
        choices["names"] = _WITH_IMAGES
    return _gemma(config, "gemma3", windows=windows, window_rope=rope, qk_norm=True, **choices)


def _since_gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "names": _NAMES,
        "post_norms": True,
        "activation": activation(config, "hidden_activation"),
        "attention_scale": number(config, "query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": optional_number(config, "final_logit_softcapping"),
    }


def _gemma(config: Mapping[str, Any], family: str, **choices: Any) -> DecoderConfig:
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention: tokens attend to later ones, which is no decoder")
    bias = bool(config.get("attention_bias", False))
    return base_config(
        config,
        family=family,
        qkv_bias=bias,
        output_bias=bias,
        one_plus_norms=True,
        embedding_scale=integer(config, "hidden_size") ** 0.5,
        **choices,
    )
