"""DeepSeek-V2 and V3: latent attention, many small experts chosen by groups, shared experts, first layers dense."""

from __future__ import annotations

import math
import reprlib
from dataclasses import replace

from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MlaConfig, MoeConfig, RopeConfig
from ingle.model.families.common import base_config
from ingle.model.families.moe import in_groups, router_config
from ingle.weights.checked import Checked


def deepseek_v2(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2405.04434: softmax scores, a group is as good as its best expert."""
    method = config.values.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        config.fail(f"topk_method {reprlib.repr(method)} is not supported for deepseek_v2")
    if config.values.get("scoring_func", "softmax") != "softmax" or config.flag("norm_topk_prob"):
        # transformers ignores both in this family, DeepSeek's code does not.
        config.fail("deepseek_v2 is supported with softmax scores and without norm_topk_prob only")
    router = _router(config) if method == "greedy" else in_groups(config, _router(config))
    return _deepseek(config, "deepseek_v2", router, interleave=True)


def deepseek_v3(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2412.19437: sigmoid scores, a bias on the choice, a group is as good as its best two."""
    scoring, method = config.values.get("scoring_func", "sigmoid"), config.values.get("topk_method", "noaux_tc")
    if scoring != "sigmoid" or method != "noaux_tc":
        config.fail("deepseek_v3 is supported with scoring_func sigmoid and topk_method noaux_tc only")
    norm_topk_prob = config.flag("norm_topk_prob", True)
    router = replace(_router(config), scoring="sigmoid", norm_topk_prob=norm_topk_prob, group_experts=2)
    interleave = config.flag("rope_interleave", True)
    return _deepseek(config, "deepseek_v3", in_groups(config, router), interleave=interleave)


def _deepseek(config: Checked, family: str, router: RouterConfig, *, interleave: bool) -> DecoderConfig:
    mla = MlaConfig(
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank"),
        qk_nope_head_dim=config.integer("qk_nope_head_dim"),
        qk_rope_head_dim=config.integer("qk_rope_head_dim"),
        v_head_dim=config.integer("v_head_dim"),
        rope_interleave=interleave,
    )
    bias = config.flag("attention_bias")
    rotated = base_config(config, family, head_dim=mla.qk_rope_head_dim)
    # What rotates is one small head; scores are of whole queries.
    return replace(
        rotated,
        head_dim=mla.qk_head_dim,
        num_kv_heads=rotated.num_heads,
        attention_scale=mla.qk_head_dim**-0.5 * _softmax_factor(rotated.rope),
        qkv_bias=bias,
        output_bias=bias,
        moe=_moe(config, router),
        mla=mla,
    )


def _moe(config: Checked, router: RouterConfig) -> MoeConfig:
    if (frequency := config.integer("moe_layer_freq", 1)) != 1:
        config.fail(f"moe_layer_freq {frequency} is not supported, only 1 is")
    inner, num_layers = config.integer("moe_intermediate_size"), config.integer("num_hidden_layers")
    return MoeConfig(
        router=router,
        intermediate_size=inner,
        layers=frozenset(range(config.integer("first_k_dense_replace", 0, least=0), num_layers)),
        shared_intermediate_size=inner * config.integer("n_shared_experts", 0, least=0),
        shared_name="shared_experts",
        selection_bias=router.scoring == "sigmoid",
        float32_router=True,
    )


def _router(config: Checked) -> RouterConfig:
    return replace(router_config(config), routed_scaling_factor=config.number("routed_scaling_factor", 1.0))


def _softmax_factor(rope: RopeConfig) -> float:
    """YaRN's temperature on the scores, which these families put here and not into cos and sin."""
    if rope.type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
