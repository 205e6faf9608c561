"""Which keys of a configuration each family knows. What changes a model's numbers is used, refused or told of, and
never passed over."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ingle.errors import ModelError

_MAX_SHOWN = 80

_EVERYWHERE = """
    hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size
    max_position_embeddings original_max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings
    rope_theta rope_scaling partial_rotary_factor
"""
_WITHOUT_EFFECT = """
    attention_dropout attn_dropout_prob attn_pdrop resid_pdrop embd_pdrop emb_dropout_prob classifier_dropout
    hidden_dropout initializer_range initializer_factor use_cache pretraining_tp attn_implementation
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal use_flash_attn _flash_attn_2_enabled
    output_attentions output_hidden_states output_router_logits router_aux_loss_coef router_jitter_noise
    aux_loss_alpha seq_aux ep_size num_nextn_predict_layers num_mtp_layers is_decoder scale_attn_weights
    chunk_size_feed_forward gradient_checkpointing layer_norm_eps
"""
"""On what a trained model computes, whatever their values."""
_QWEN_WINDOWS = "use_sliding_window sliding_window max_window_layers layer_types"
_QWEN_EXPERTS = """
    num_experts num_experts_per_tok moe_intermediate_size norm_topk_prob decoder_sparse_step mlp_only_layers
    num_local_experts n_routed_experts
"""
_GEMMA2 = """
    hidden_activation query_pre_attn_scalar final_logit_softcapping sliding_window layer_types
    use_bidirectional_attention attention_bias
"""
_GEMMA3 = (
    _GEMMA2 + "rope_local_base_freq sliding_window_pattern _sliding_window_pattern mm_tokens_per_image vision_config"
)
_DEEPSEEK = """
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim attention_bias
    num_experts num_local_experts n_routed_experts num_experts_per_tok moe_intermediate_size n_shared_experts
    first_k_dense_replace moe_layer_freq routed_scaling_factor n_group topk_group topk_method scoring_func
    norm_topk_prob rope_interleave
"""
_USED = {
    "llama": "attention_bias mlp_bias",
    "mistral": "sliding_window layer_types",
    "mixtral": "sliding_window layer_types num_experts num_local_experts n_routed_experts num_experts_per_tok",
    "qwen": "no_bias use_dynamic_ntk use_logn_attn seq_length layer_norm_epsilon rotary_emb_base rotary_pct",
    "qwen2": _QWEN_WINDOWS,
    "qwen2_moe": f"{_QWEN_WINDOWS} {_QWEN_EXPERTS} shared_expert_intermediate_size qkv_bias",
    "qwen3": f"{_QWEN_WINDOWS} attention_bias",
    "qwen3_moe": f"{_QWEN_WINDOWS} {_QWEN_EXPERTS} attention_bias",
    "phi3": "sliding_window layer_types",
    "gemma": "hidden_activation attention_bias use_bidirectional_attention",
    "gemma2": f"{_GEMMA2} attn_logit_softcapping",
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": """
        sliding_window layer_types num_experts num_local_experts num_experts_per_tok experts_per_token attention_bias
        swiglu_alpha swiglu_limit initial_context_length
    """,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}
KNOWN_KEYS = {kind: frozenset((used + _EVERYWHERE + _WITHOUT_EFFECT).split()) for kind, used in _USED.items()}
"""By `model_type`: those that its family reads, and those that do nothing."""

_ONE, _NONE = (1, None), (None, 0, False)
_ONE_OR_NONE = (1, None, 0)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["logits_scaling", "logit_scale", "output_multiplier_scale", "lm_head_multiplier"], _ONE_OR_NONE),
    **dict.fromkeys(
        ["embedding_multiplier", "embedding_scale", "scale_emb", "embedding_multiplier_scale"], _ONE_OR_NONE
    ),
    **dict.fromkeys(["residual_multiplier", "residual_scale", "scale_depth"], _ONE_OR_NONE),
    **dict.fromkeys(["attention_multiplier", "attn_scale", "attention_scale"], _NONE),
    **dict.fromkeys(
        ["attn_logit_softcapping", "final_logit_softcapping", "attn_logit_softcap", "logit_softcap"], _NONE
    ),
    **dict.fromkeys(("clip_qkv", "attention_chunk_size", "attn_temperature_tuning", "no_rope_layers"), (*_NONE, [])),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm", "alibi", "use_alibi"), _NONE),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual", "add_cross_attention", "is_encoder_decoder"), _NONE),
    **dict.fromkeys(("use_bidirectional_attention",), _NONE),
    **dict.fromkeys(("is_causal", "causal", "attention.causal"), (None, True)),
    "position_embedding_type": (None, "rope", "rotary", "rope_theta"),
    "norm_type": (None, "rms", "rms_norm", "rmsnorm", "RMSNorm"),
    # GGUF's; 0 is as good as none there.
    **dict.fromkeys(("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"), _NONE),
    **dict.fromkeys(("attention.temperature_length", "attention.temperature_scale"), _NONE),
    **dict.fromkeys(("expert_weights_scale", "expert_gating_func", "expert_group_count"), _ONE_OR_NONE),
    **dict.fromkeys(("rope.scaling.alpha", "rope.scaling.yarn_log_multiplier", "router_logit_softcapping"), _NONE),
    **dict.fromkeys(("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"), _ONE),
    "rope.scaling.yarn_ext_factor": (None, 0, -1),
}
"""Keys that change the numbers in some family, and the values with which they do not. In any other family they are
refused: whoever wrote them has a model that is not of this family."""

_SUSPICIOUS = re.compile(
    r"scal|multipl|factor|soft_?cap|clip|clamp|alibi|rope|rotary|norm|residual|window|chunk|attn|attention|logit|bias"
    r"|expert|router|moe|sink|temperature|gating|mup|causal"
)
"""What the names of keys have in them that may change the numbers."""

_ROPE_KEYS = {
    "linear": "factor",
    "dynamic": "factor",
    "yarn": (
        "factor attention_factor attn_factor extrapolation_factor beta_fast beta_slow truncate mscale mscale_all_dim"
    ),
    "llama3": "factor low_freq_factor high_freq_factor",
    "longrope": "factor attention_factor short_factor long_factor",
    "factors": "factors",
    "default": "",
}
_ROPE_WITHOUT_EFFECT = (
    "rope_type type rope_theta original_max_position_embeddings finetuned mrope_section mrope_interleaved"
)
"""Whatever their values, or read by all; the sections are of pictures, and in text all count alike."""
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alpha": (None,),
    "llama_4_scaling_beta": (None, 0),
    "short_mscale": _ONE,
    "long_mscale": _ONE,
    "attn_factor": _ONE,
    "attention_factor": _ONE,
    "extrapolation_factor": _ONE,
}


def check_keys(config: Mapping[str, Any]) -> list[str]:
    """What to tell people about keys of a normalized config that no one knows and that may change the numbers.

    Raises `ModelError` for those that do, with the values they have.
    """
    kind = config["model_type"]
    known = KNOWN_KEYS[kind]
    changing = [
        f"{shown(key)} is {reprlib.repr(value)}"
        for key, value in config.items()
        if key not in known and key in _NEUTRAL and not _is_one_of(value, _NEUTRAL[key])
    ]
    if changing:
        raise ModelError(
            f"{' and '.join(changing)}, which changes the model's numbers and is not supported for {kind}",
            alternative="answers would be wrong: take another model",
        )
    return [*unknown_keys(config, known | _NEUTRAL.keys()), *_rope_notices(config.get("rope_scaling") or {})]


def unknown_keys(config: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """What to tell people about keys of a normalized config that may change the numbers, beside those that are known to
    whoever runs the model."""
    idle = f"{_EVERYWHERE} {_WITHOUT_EFFECT}".split()
    return [
        f"{shown(key)} is {reprlib.repr(value)}, which nobody knows for {config['model_type']} and which is passed "
        "over: answers may suffer"
        for key, value in config.items()
        if key not in known and key not in idle and _SUSPICIOUS.search(key) and _says_something(value)
    ]


def shown(name: str) -> str:
    """A name that came with a model, such that a terminal can be trusted with it."""
    return ascii(name)[1:-1][:_MAX_SHOWN]


def _rope_notices(scaling: Mapping[str, Any]) -> Iterator[str]:
    kind = scaling.get("rope_type", "default")
    known = set(f"{_ROPE_KEYS.get(kind, '')} {_ROPE_WITHOUT_EFFECT}".split())
    for key, value in scaling.items():
        if key in known or value is None or (key in _ROPE_NEUTRAL and _is_one_of(value, _ROPE_NEUTRAL[key])):
            continue
        if key in _ROPE_NEUTRAL:
            raise ModelError(
                f"rope scaling {kind} with {key} {reprlib.repr(value)} changes the model's numbers and is not supported"
            )
        yield f"rope scaling {kind}: {shown(key)} is {reprlib.repr(value)}, which ingle does not know and passes over"


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    """True is not taken for 1."""
    return any(value == other and isinstance(value, bool) <= isinstance(other, bool) for other in neutral)


def _says_something(value: Any) -> bool:
    """Not a flag that is off, a factor of 1 or nothing; the names of things are many, and few change numbers."""
    if isinstance(value, bool):
        return value
    return isinstance(value, (int, float)) and value not in (0, 1)
