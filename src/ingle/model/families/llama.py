"""Llama and what shares its shape: Llama 1 to 3, SmolLM2, TigerBot, Mistral, Qwen1.5, Qwen2, Qwen3."""

from __future__ import annotations

from dataclasses import replace

from ingle.model.architecture import DecoderConfig
from ingle.model.families.common import base_config, layer_windows
from ingle.weights.checked import Checked


def llama(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2302.13971; biases as `attention_bias` and `mlp_bias` say."""
    bias = config.flag("attention_bias")
    base = base_config(config, "llama")
    return replace(base, qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias"))


def mistral(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2310.06825: Llama's shape; with `sliding_window`, one window for every layer."""
    windows = layer_windows(config, config.optional_integer("sliding_window"))
    return replace(base_config(config, "mistral"), windows=windows)


def qwen2(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2407.10671: a bias on Q, K and V only. Also what runs Qwen1.5."""
    return replace(base_config(config, "qwen2"), qkv_bias=True, windows=_upper_windows(config))


def qwen3(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2505.09388: no biases, RMSNorm over each head of Q and K."""
    bias = config.flag("attention_bias")
    base = base_config(config, "qwen3")
    return replace(base, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_upper_windows(config))


def _upper_windows(config: Checked) -> tuple[int | None, ...]:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window: that is what the name means."""
    if not config.flag("use_sliding_window"):
        return ()
    first = config.integer("max_window_layers", 28, least=0)
    return layer_windows(config, config.optional_integer("sliding_window"), lambda layer: layer >= first)
