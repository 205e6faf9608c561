"""Llama and what shares its shape: Llama 1 to 3, SmolLM2, TigerBot, Mistral, Qwen1.5, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.model.architecture import DecoderConfig
from ingle.model.families.common import base_config, integer, layer_windows, optional_integer


def llama(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2302.13971; biases as `attention_bias` and `mlp_bias` say."""
    bias = bool(config.get("attention_bias", False))
    return base_config(
        config, family="llama", qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )


def mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2310.06825: Llama's shape; with `sliding_window`, one window for every layer."""
    return base_config(
        config, family="mistral", windows=layer_windows(config, optional_integer(config, "sliding_window"))
    )


def qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2407.10671: a bias on Q, K and V only. Also what runs Qwen1.5."""
    return base_config(config, family="qwen2", qkv_bias=True, windows=_upper_windows(config))


def qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2505.09388: no biases, RMSNorm over each head of Q and K."""
    bias = bool(config.get("attention_bias", False))
    return base_config(
        config, family="qwen3", qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_upper_windows(config)
    )


def _upper_windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window: that is what the name means."""
    if not config.get("use_sliding_window", False):
        return ()
    first = integer(config, "max_window_layers", 28, least=0)
    return layer_windows(config, optional_integer(config, "sliding_window"), lambda layer: layer >= first)
