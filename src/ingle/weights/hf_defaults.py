"""What a config.json leaves unsaid, or says in words of its own, by `model_type`."""

from __future__ import annotations

from typing import Any

_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28}

DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "qwen": {"no_bias": True, "use_dynamic_ntk": True, "use_logn_attn": True},
    "qwen2": _QWEN,
    "qwen3": _QWEN,
    "phi3": {"original_max_position_embeddings": 4096},
    "gemma": {"hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "tie_word_embeddings": True},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
}
"""What transformers, or the code published with the model, takes for a key that is absent; null is another matter."""

RENAMED = {
    "qwen": {
        "layer_norm_epsilon": "rms_norm_eps",
        "kv_channels": "head_dim",
        "rotary_emb_base": "rope_theta",
        "rotary_pct": "partial_rotary_factor",
        "seq_length": "max_position_embeddings",  # what it was trained on; the other key is an upper bound
    },
}
"""Keys that mean what another key means elsewhere, and win over it."""

TEXT_CONFIGS = ("gemma3",)
"""Models of text and images: the decoder is described in `text_config`."""
