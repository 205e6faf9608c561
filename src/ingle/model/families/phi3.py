"""Phi-3 and Phi-4-mini: Llama's shape, with fused projections in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.model.families.common import base_config, layer_windows, optional_integer

_NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def phi3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2404.14219: a window in every layer, if any; longer contexts by LongRoPE."""
    windows = layer_windows(config, optional_integer(config, "sliding_window"))
    return base_config(config, family="phi3", names=_NAMES, windows=windows)
