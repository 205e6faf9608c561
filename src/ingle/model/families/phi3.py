"""Phi-3 and Phi-4-mini: Llama's shape, with fused projections in the checkpoint."""

from __future__ import annotations

from dataclasses import replace

from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.model.families.common import base_config, layer_windows
from ingle.weights.checked import Checked

_NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def phi3(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2404.14219: a window in every layer, if any; longer contexts by LongRoPE."""
    windows = layer_windows(config, config.optional_integer("sliding_window"))
    return replace(base_config(config, "phi3"), names=_NAMES, windows=windows)
