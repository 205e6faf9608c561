"""The tiny random checkpoints on which every family is tried: transformers' `model_type` and what its config says."""

from __future__ import annotations

from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
            "n_shared_experts": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 12}  # fmt: skip
DEEPSEEK_YARN = {**YARN, "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 1.1}
V3_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "odd-heads": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}),
    "wide-heads": ("llama", {"head_dim": 32}),
    "two-wide-heads": ("llama", {"head_dim": 2}),
    "six-wide-heads": ("qwen3", {"head_dim": 6}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "odd-vocabulary": ("llama", {"vocab_size": 259}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": ("llama", {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}}),
    "yarn": ("llama", {"rope_parameters": {"rope_theta": 1e4, **YARN}}),
    "yarn-factors": ("llama", {"rope_parameters": {
        "rope_theta": 1e4, **YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}}),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 40, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * i for i in range(8)]}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "mistral-tied": ("mistral", {"sliding_window": 64, "head_dim": 24, "tie_word_embeddings": True}),
    "qwen1.5": ("qwen2", {"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 30}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 33, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma-mqa": ("gemma", {"head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 30, "query_pre_attn_scalar": 24}),
    "gemma2-untied": (
        "gemma2",
        {"head_dim": 32, "sliding_window": 64, "tie_word_embeddings": False, "num_key_value_heads": 1,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "gemma2-uncapped": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma2-wide-heads": ("gemma2", {"head_dim": 256, "sliding_window": 50, "query_pre_attn_scalar": 256}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 30, "num_hidden_layers": 7}),
    "gemma3-wide-heads": ("gemma3_text", {"head_dim": 256, "sliding_window": 30, "num_key_value_heads": 1}),
    "gemma3-linear": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 48, "layer_types": ["full_attention", "sliding_attention"],
         "query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral-top3-tied": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "qwen2-moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 48}),
    "qwen2-moe-normed": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 80, "norm_topk_prob": True}),
    "qwen2-moe-dense-between": (
        "qwen2_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    "qwen3-moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-one-expert": ("qwen3_moe", {**QWEN_MOE, "num_experts_per_tok": 1, "attention_bias": True}),
    "qwen3-moe-dense-between": ("qwen3_moe", {**QWEN_MOE, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    "deepseek-v2": ("deepseek_v2", {**DEEPSEEK, "first_k_dense_replace": 1, "q_lora_rank": 24}),
    "deepseek-v2-lite": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "deepseek-v2-wide-values": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": 24, "v_head_dim": 40}),
    "deepseek-v2-groups": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 4.0, "rope_parameters": {"rope_theta": 1e4, **DEEPSEEK_YARN}},
    ),
    "deepseek-v3": ("deepseek_v3", {**DEEPSEEK, **V3_GROUPS, "first_k_dense_replace": 1, "q_lora_rank": 24}),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        {**DEEPSEEK, **V3_GROUPS, "first_k_dense_replace": 0, "q_lora_rank": 40, "attention_bias": True,
         "rope_parameters": {"rope_theta": 1e4, **DEEPSEEK_YARN}},
    ),
    "deepseek-v3-halves": (
        "deepseek_v3",
        {**DEEPSEEK, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
         "rope_interleave": False, "norm_topk_prob": False, "v_head_dim": 24},
    ),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 33}),
    "qwen2-moe-window": (
        "qwen2_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 3},
    ),
    "gpt-oss": (
        "gpt_oss",
        {"head_dim": 24, "sliding_window": 20, "num_local_experts": 8, "num_experts_per_tok": 3,
         "rope_parameters": {"rope_theta": 1e4, **YARN, "truncate": False}},
    ),
    "qwen3-moe-window": ("qwen3_moe", {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 33}),
}  # fmt: skip
