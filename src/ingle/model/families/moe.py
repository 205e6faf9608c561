"""Families with a mixture of experts: Mixtral, Qwen2-MoE (Qwen1.5-MoE too), Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.errors import ModelError
from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MoeConfig
from ingle.model.families.common import base_config, integer, layer_windows, optional_integer

_MAX_EXPERTS = 1024
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def mixtral(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2401.04088: every MLP is sparse."""
    moe = MoeConfig(
        router=router_config(config, norm_topk_prob=True),
        intermediate_size=integer(config, "intermediate_size"),
        layers=frozenset(range(integer(config, "num_hidden_layers"))),
    )
    windows = layer_windows(config, optional_integer(config, "sliding_window"))
    return base_config(config, family="mixtral", windows=windows, moe=moe)


def qwen2_moe(config: Mapping[str, Any]) -> DecoderConfig:
    """https://qwenlm.github.io/blog/qwen-moe: a bias on Q, K and V, and a shared expert behind a gate of its own."""
    moe = MoeConfig(
        router=_qwen_router(config),
        intermediate_size=integer(config, "moe_intermediate_size"),
        layers=_qwen_layers(config),
        shared_intermediate_size=integer(config, "shared_expert_intermediate_size"),
        shared_gate=True,
    )
    first_full = integer(config, "max_window_layers", 28, least=0)
    windows = layer_windows(config, _qwen_window(config), lambda layer: layer % 2 == 0 and layer < first_full)
    bias = bool(config.get("qkv_bias", True))
    return base_config(config, family="qwen2_moe", qkv_bias=bias, windows=windows, moe=moe)


def qwen3_moe(config: Mapping[str, Any]) -> DecoderConfig:
    """https://arxiv.org/abs/2505.09388: RMSNorm over each head of Q and K, no shared expert."""
    bias = bool(config.get("attention_bias", False))
    moe = MoeConfig(
        router=_qwen_router(config),
        intermediate_size=integer(config, "moe_intermediate_size"),
        layers=_qwen_layers(config),
    )
    windows = layer_windows(config, _qwen_window(config))
    return base_config(
        config, family="qwen3_moe", qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows, moe=moe
    )


def router_config(config: Mapping[str, Any], **choices: Any) -> RouterConfig:
    """Raises `ModelError` for a choice of more experts than there are, or of more than GPU kernels route among.

    The number of experts has several names: each family had its own, and transformers 5 writes one for most.
    """
    name = next((name for name in _NUM_EXPERTS if name in config), _NUM_EXPERTS[0])
    router = RouterConfig(integer(config, name), integer(config, "num_experts_per_tok"), **choices)
    if router.num_experts > _MAX_EXPERTS:
        raise ModelError(f"config.json: {name} is {router.num_experts}, and at most {_MAX_EXPERTS} are supported")
    if router.top_k > router.num_experts:
        raise ModelError(f"config.json: num_experts_per_tok {router.top_k} is more than {name} {router.num_experts}")
    if router.num_experts % router.num_groups or router.topk_group > router.num_groups:
        raise ModelError(
            f"config.json: {router.num_experts} experts in {router.num_groups} groups, of which a token chooses "
            f"{router.topk_group}, is not possible"
        )
    group_size = router.num_experts // router.num_groups
    if router.group_experts > group_size or router.top_k > router.topk_group * group_size:
        raise ModelError(
            f"config.json: {router.top_k} experts a token do not fit {router.topk_group} groups of {group_size} experts"
        )
    return router


def _qwen_router(config: Mapping[str, Any]) -> RouterConfig:
    return router_config(config, norm_topk_prob=bool(config.get("norm_topk_prob", False)))


def _qwen_window(config: Mapping[str, Any]) -> int | None:
    return optional_integer(config, "sliding_window") if config.get("use_sliding_window", False) else None


def _qwen_layers(config: Mapping[str, Any]) -> frozenset[int]:
    """Every `decoder_sparse_step`th layer, less those in `mlp_only_layers`."""
    step, dense = integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise ModelError(f"config.json: mlp_only_layers is {dense!r}, expected a list of layer indices")
    layers = range(step - 1, integer(config, "num_hidden_layers"), step)
    return frozenset(index for index in layers if index not in dense)
