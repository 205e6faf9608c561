"""gpt-oss (https://arxiv.org/abs/2508.10925): a mixture of experts with attention sinks, and biases everywhere."""

from __future__ import annotations

from dataclasses import replace

from ingle.kernels.options import SWIGLU_ALPHA, SWIGLU_LIMIT
from ingle.model.architecture import DecoderConfig, MoeConfig
from ingle.model.families.common import base_config, layer_windows
from ingle.model.families.moe import router_config
from ingle.weights.checked import Checked


def gpt_oss(config: Checked) -> DecoderConfig:
    """Every second layer has a window, beginning with the first. Softmax is over the logits of the chosen experts."""
    for key, value in (("swiglu_alpha", SWIGLU_ALPHA), ("swiglu_limit", SWIGLU_LIMIT)):
        if config.number(key, value) != value:
            config.refuse(key, f"and {value} alone is supported")
    config.choice("hidden_act", {"silu": None}, "silu")
    moe = MoeConfig(
        router=replace(router_config(config), norm_topk_prob=True),
        intermediate_size=config.integer("intermediate_size"),
        layers=frozenset(range(config.integer("num_hidden_layers"))),
        router_bias=True,
        expert_biases=True,
    )
    bias = config.flag("attention_bias", True)
    return replace(
        base_config(config, "gpt_oss", activation="swiglu_clamped"),
        qkv_bias=bias,
        output_bias=bias,
        sinks=True,
        windows=layer_windows(config, config.optional_integer("sliding_window"), lambda layer: layer % 2 == 0),
        moe=moe,
    )
