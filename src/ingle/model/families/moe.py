"""Families with a mixture of experts: Mixtral, Qwen2-MoE (Qwen1.5-MoE too), Qwen3-MoE."""

from __future__ import annotations

from dataclasses import replace

from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MoeConfig
from ingle.model.families.common import base_config, layer_windows
from ingle.weights.checked import Checked

_MAX_EXPERTS = 1024
_NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def mixtral(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2401.04088: every MLP is sparse."""
    moe = MoeConfig(
        router=replace(router_config(config), norm_topk_prob=True),
        intermediate_size=config.integer("intermediate_size"),
        layers=frozenset(range(config.integer("num_hidden_layers"))),
    )
    windows = layer_windows(config, config.optional_integer("sliding_window"))
    return replace(base_config(config, "mixtral"), windows=windows, moe=moe)


def qwen2_moe(config: Checked) -> DecoderConfig:
    """https://qwenlm.github.io/blog/qwen-moe: a bias on Q, K and V, and a shared expert behind a gate of its own."""
    moe = MoeConfig(
        router=_qwen_router(config),
        intermediate_size=config.integer("moe_intermediate_size"),
        layers=_qwen_layers(config),
        shared_intermediate_size=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )
    first_full = config.integer("max_window_layers", 28, least=0)
    windows = layer_windows(config, _qwen_window(config), lambda layer: layer % 2 == 0 and layer < first_full)
    bias = config.flag("qkv_bias", True)
    return replace(base_config(config, "qwen2_moe"), qkv_bias=bias, windows=windows, moe=moe)


def qwen3_moe(config: Checked) -> DecoderConfig:
    """https://arxiv.org/abs/2505.09388: RMSNorm over each head of Q and K, no shared expert."""
    bias = config.flag("attention_bias")
    moe = MoeConfig(
        router=_qwen_router(config),
        intermediate_size=config.integer("moe_intermediate_size"),
        layers=_qwen_layers(config),
    )
    windows = layer_windows(config, _qwen_window(config))
    base = base_config(config, "qwen3_moe")
    return replace(base, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=windows, moe=moe)


def router_config(config: Checked) -> RouterConfig:
    """How many experts there are, and how many a token chooses.

    The number of experts has several names: each family had its own, and transformers 5 writes one for most.
    """
    name = next((name for name in _NUM_EXPERTS if name in config), _NUM_EXPERTS[0])
    router = RouterConfig(config.integer(name), config.integer("num_experts_per_tok"))
    if router.num_experts > _MAX_EXPERTS:  # what GPU kernels route among
        config.refuse(name, f"and at most {_MAX_EXPERTS} are supported")
    if router.top_k > router.num_experts:
        config.fail(f"num_experts_per_tok {router.top_k} is more than {name} {router.num_experts}")
    return router


def in_groups(config: Checked, router: RouterConfig) -> RouterConfig:
    """`router` with experts in the config's groups, of which a token chooses some."""
    router = replace(router, num_groups=config.integer("n_group", 1), topk_group=config.integer("topk_group", 1))
    experts, groups = router.num_experts, router.num_groups
    if experts % groups or router.topk_group > groups:
        config.fail(
            f"{experts} experts in {groups} groups, of which a token chooses {router.topk_group}, is not possible"
        )
    size = experts // groups
    if router.group_experts > size or router.top_k > router.topk_group * size:
        config.fail(f"{router.top_k} experts a token do not fit {router.topk_group} groups of {size} experts")
    return router


def _qwen_router(config: Checked) -> RouterConfig:
    return replace(router_config(config), norm_topk_prob=config.flag("norm_topk_prob"))


def _qwen_window(config: Checked) -> int | None:
    return config.optional_integer("sliding_window") if config.flag("use_sliding_window") else None


def _qwen_layers(config: Checked) -> frozenset[int]:
    """Every `decoder_sparse_step`th layer, less those in `mlp_only_layers`."""
    step, dense = config.integer("decoder_sparse_step", 1), config.items("mlp_only_layers", int, "layer indices")
    layers = range(step - 1, config.integer("num_hidden_layers"), step)
    return frozenset(index for index in layers if index not in dense)
