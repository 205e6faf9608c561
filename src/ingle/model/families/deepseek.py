"""DeepSeek-V2 and V3: latent attention, many small experts chosen by groups, shared experts, first layers dense."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ingle.errors import ModelError
from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig, RopeConfig
from ingle.model.families.common import base_config, integer, number, optional_integer
from ingle.model.families.moe import router_config


def deepseek_v2(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2405.04434: softmax scores, a group is as good as its best expert."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ModelError(f"config.json: topk_method {method!r} is not supported for deepseek_v2")
    if config.get("scoring_func", "softmax") != "softmax" or config.get("norm_topk_prob", False):
        # transformers ignores both in this family, DeepSeek's code does not.
        raise ModelError("config.json: deepseek_v2 is supported with softmax scores and without norm_topk_prob only")
    router = router_config(config, **_scaling(config), **(_groups(config) if method != "greedy" else {}))
    return _deepseek(config, "deepseek_v2", router, rope_interleave=True)


def deepseek_v3(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2412.19437: sigmoid scores, a bias on the choice, a group is as good as its best two."""
    if config.get("scoring_func", "sigmoid") != "sigmoid" or config.get("topk_method", "noaux_tc") != "noaux_tc":
        raise ModelError(
            "config.json: deepseek_v3 is supported with scoring_func sigmoid and topk_method noaux_tc only"
        )
    router = router_config(
        config,
        scoring="sigmoid",
        norm_topk_prob=bool(config.get("norm_topk_prob", True)),
        group_experts=2,
        **_scaling(config),
        **_groups(config),
    )
    return _deepseek(config, "deepseek_v3", router, rope_interleave=bool(config.get("rope_interleave", True)))


def _deepseek(config: Mapping[str, Any], family: str, router: RouterConfig, *, rope_interleave: bool) -> DecoderConfig:
    mla = MlaConfig(
        q_lora_rank=optional_integer(config, "q_lora_rank"),
        kv_lora_rank=integer(config, "kv_lora_rank"),
        qk_nope_head_dim=integer(config, "qk_nope_head_dim"),
        qk_rope_head_dim=integer(config, "qk_rope_head_dim"),
        v_head_dim=integer(config, "v_head_dim"),
        rope_interleave=rope_interleave,
    )
    bias = bool(config.get("attention_bias", False))
    rotated = base_config(
        {**config, "head_dim": mla.qk_rope_head_dim},
        family=family,
        qkv_bias=bias,
        output_bias=bias,
        moe=_moe(config, router),
        mla=mla,
    )
    # What rotates is one small head; scores are of whole queries.
    scale = mla.qk_head_dim**-0.5 * _softmax_factor(rotated.rope)
    return dataclasses.replace(rotated, head_dim=mla.qk_head_dim, num_kv_heads=rotated.num_heads, attention_scale=scale)


def _moe(config: Mapping[str, Any], router: RouterConfig) -> MoeConfig:
    if config.get("moe_layer_freq", 1) != 1:
        raise ModelError(f"config.json: moe_layer_freq {config['moe_layer_freq']!r} is not supported, only 1 is")
    inner, num_layers = integer(config, "moe_intermediate_size"), integer(config, "num_hidden_layers")
    return MoeConfig(
        router=router,
        intermediate_size=inner,
        layers=frozenset(range(integer(config, "first_k_dense_replace", 0, least=0), num_layers)),
        shared_intermediate_size=inner * integer(config, "n_shared_experts", 0, least=0),
        shared_name="shared_experts",
        selection_bias=router.scoring == "sigmoid",
        float32_router=True,
    )


def _scaling(config: Mapping[str, Any]) -> dict[str, float]:
    return {"routed_scaling_factor": number(config, "routed_scaling_factor", 1.0)}


def _groups(config: Mapping[str, Any]) -> dict[str, int]:
    return {"num_groups": integer(config, "n_group", 1), "topk_group": integer(config, "topk_group", 1)}


def _softmax_factor(rope: RopeConfig) -> float:
    """YaRN's temperature on the scores, which these families put here and not into cos and sin."""
    if rope.type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
