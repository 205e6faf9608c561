"""Llama and what shares its shape: Llama 1 to 3, SmolLM2, TigerBot, Mistral without a window, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.model.architecture import DecoderConfig
from ingle.model.families.common import base_config


def llama(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2302.13971; biases as `attention_bias` and `mlp_bias` say."""
    bias = bool(config.get("attention_bias", False))
    return base_config(
        config, family="llama", qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False))
    )


def qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2407.10671: a bias on Q, K and V only."""
    return base_config(config, family="qwen2", qkv_bias=True)


def qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2505.09388: no biases, RMSNorm over each head of Q and K."""
    bias = bool(config.get("attention_bias", False))
    return base_config(config, family="qwen3", qkv_bias=bias, output_bias=bias, qk_norm=True)
