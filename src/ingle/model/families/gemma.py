"""Gemma: scaled embeddings, norms by 1 + weight; from Gemma 2 on norms after blocks, and windows in most layers."""

from __future__ import annotations

from dataclasses import replace

from ingle.kernels.options import Activation
from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.model.families.common import base_config, gated_activation, layer_windows, rope_config
from ingle.weights.checked import Checked

_NAMES = WeightNames(mlp_norm="pre_feedforward_layernorm")
_WITH_IMAGES = replace(
    _NAMES,
    embedding="language_model.model.embed_tokens",
    layers="language_model.model.layers",
    norm="language_model.model.norm",
    lm_head="language_model.lm_head",
)


def gemma(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2403.08295: Llama's shape otherwise. Its files say gelu and mean the approximation."""
    legacy = config.values.get("hidden_act", "gelu") == "gelu"
    return _gemma(config, "gemma", "gelu_tanh" if legacy else gated_activation(config))


def gemma2(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2408.00118: every other layer has a window; scores and logits are soft-capped."""
    windows = layer_windows(config, config.optional_integer("sliding_window"), lambda layer: layer % 2 == 0)
    softcap = config.optional_number("attn_logit_softcapping")
    return replace(_since_gemma2(config, "gemma2"), windows=windows, attention_softcap=softcap)


def gemma3(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2503.19786: all but every sixth layer have a window, and rotate by a base of their own.

    `gemma3` is the model of text and images, of which this is the text's part; `gemma3_text` is the text's alone.
    """
    pattern = config.integer("sliding_window_pattern", 6)
    windows = layer_windows(config, config.optional_integer("sliding_window"), lambda layer: (layer + 1) % pattern > 0)
    local = Checked({"rope_theta": config.number("rope_local_base_freq", 10000.0)}, config.source)
    base = _since_gemma2(config, "gemma3")
    return replace(
        base,
        names=_WITH_IMAGES if config.values["model_type"] == "gemma3" else _NAMES,
        windows=windows,
        window_rope=rope_config(local, base.head_dim),
        qk_norm=True,
    )


def _since_gemma2(config: Checked, family: str) -> DecoderConfig:
    return replace(
        _gemma(config, family, gated_activation(config, "hidden_activation")),
        names=_NAMES,
        post_norms=True,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )


def _gemma(config: Checked, family: str, activation: Activation) -> DecoderConfig:
    if config.flag("use_bidirectional_attention"):
        config.fail("use_bidirectional_attention: tokens attend to later ones, which is no decoder")
    bias = config.flag("attention_bias")
    base = base_config(config, family, activation=activation)
    scale = base.hidden_size**0.5
    return replace(base, qkv_bias=bias, output_bias=bias, one_plus_norms=True, embedding_scale=scale)
