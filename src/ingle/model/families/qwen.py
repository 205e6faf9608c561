"""The first Qwen (`model_type` "qwen"), whose own code transformers does not have."""

from __future__ import annotations

from dataclasses import replace

from ingle.model.architecture import DecoderConfig, WeightNames
from ingle.model.families.common import base_config
from ingle.weights.checked import Checked

_NAMES = WeightNames(
    embedding="transformer.wte",
    norm="transformer.ln_f",
    layers="transformer.h",
    input_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    gate_up=("mlp.w2", "mlp.w1"),
    mlp_down="mlp.c_proj",
)


def qwen(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2309.16609: Llama's shape with a bias on Q, K and V.

    Contexts beyond the trained `max_position_embeddings` take a larger rotary base (dynamic NTK, in steps) and sharper
    attention (log-n scaling), as the code published with the model does; they have to be asked for, since that base
    then holds for short ones too.
    `intermediate_size` counts gate and up together.
    """
    bias = not config.flag("no_bias", True)
    model = replace(
        base_config(config, "qwen"),
        intermediate_size=config.integer("intermediate_size", least=2) // 2,
        names=_NAMES,
        qkv_bias=True,
        output_bias=bias,
        mlp_bias=bias,
        logn_length=config.integer("max_position_embeddings") if config.flag("use_logn_attn", True) else None,
    )
    if not config.flag("use_dynamic_ntk", True) or model.rope.type != "default":
        return model
    return replace(model, rope=replace(model.rope, type="ntk_steps"))
