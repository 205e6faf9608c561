"""What a config.json leaves unsaid, or says in words of its own, by `model_type`."""

from __future__ import annotations

from typing import Any

NATIVE_TYPES = frozenset({
    "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt_oss", "llama", "mistral", "mixtral",
    "phi3", "qwen", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
})  # fmt: skip
"""What `ingle.model.registry` has families for, whose keys are checked one by one and completed."""


def _sizes(
    vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None, context: int, eps: float = 1e-6
) -> dict[str, Any]:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
    }
    return {key: value for key, value in sizes.items() if value is not None}


_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = _GEMMA | {
    **_sizes(256000, 2304, 9216, 26, 8, 4, 8192),
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GEMMA3 = _GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_DEEPSEEK = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
             "v_head_dim": 128}  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _sizes(32000, 4096, 11008, 32, 32, None, 2048),
    "mistral": _sizes(32000, 4096, 14336, 32, 32, 8, 131072) | {"sliding_window": 4096},
    "mixtral": _sizes(32000, 4096, 14336, 32, 32, 8, 131072, 1e-5)
    | {"rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8},
    "qwen": _sizes(151936, 4096, 22016, 32, 32, None, 8192)
    | {"no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True, "head_dim": 128},
    "qwen2": _sizes(151936, 4096, 22016, 32, 32, 32, 32768) | _QWEN,
    "qwen2_moe": _sizes(151936, 2048, 5632, 24, 16, 16, 32768)
    | _QWEN
    | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
       "shared_expert_intermediate_size": 5632},
    "qwen3": _sizes(151936, 4096, 22016, 32, 32, 32, 32768) | _QWEN | {"head_dim": 128},
    "qwen3_moe": _sizes(151936, 2048, 6144, 24, 32, 4, 32768)
    | {"use_sliding_window": False, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
       "moe_intermediate_size": 768},
    "phi3": _sizes(32064, 3072, 8192, 32, 32, None, 4096, 1e-5) | {"original_max_position_embeddings": 4096},
    "gemma": _GEMMA | _sizes(256000, 3072, 24576, 28, 16, 16, 8192) | {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": _sizes(201088, 2880, 2880, 36, 64, 8, 131072, 1e-5)
    | {"head_dim": 64, "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 1.5e5,
       "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                        "original_max_position_embeddings": 4096}},
    "deepseek_v2": _sizes(102400, 4096, 11008, 32, 32, None, 2048)
    | _DEEPSEEK
    | {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
    "deepseek_v3": _sizes(129280, 7168, 18432, 61, 128, 128, 4096)
    | _DEEPSEEK
    | {"n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "num_experts_per_tok": 8,
       "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3},
}  # fmt: skip
"""What transformers, or the code published with the model, takes for a key that is absent; null is another matter."""

RENAMED = {
    "qwen": {
        "layer_norm_epsilon": "rms_norm_eps",
        "kv_channels": "head_dim",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
        "seq_length": "max_position_embeddings",  # what it was trained on; the other key is an upper bound
    },
    # transformers 5 writes one name for most families, and reads each one's own.
    "mixtral": {"num_experts": "num_local_experts"},
    "gpt_oss": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "deepseek_v2": {"num_local_experts": "n_routed_experts"},
    "deepseek_v3": {"num_local_experts": "n_routed_experts"},
}
"""Keys that mean what another key means elsewhere, and win over it."""

TEXT_CONFIGS = ("gemma3",)
"""Models of text and images: the decoder is described in `text_config`."""
