"""Keys that change a model's numbers are used, refused or told of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import ModelError
from ingle.model.config_keys import KNOWN_KEYS, check_keys
from ingle.model.registry import FAMILIES
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_hf import ARCHITECTURES, MIXTRAL, config_from_gguf
from ingle.weights.hf_config import normalize_config, read_config
from tests.support import save_checkpoint
from tests.text.toys import write_gguf


def check(config: dict[str, Any]) -> list[str]:
    return check_keys(normalize_config(Path("config.json"), dict(config)))


def test_every_family_has_its_keys() -> None:
    assert KNOWN_KEYS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"qwen"}))
def test_what_transformers_writes_is_known(model_type: str) -> None:
    from transformers import AutoConfig

    assert check(AutoConfig.for_model(model_type).to_dict()) == []


# What published files say beside the sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "initializer_range": 0.02, "mlp_bias": False,
        "pretraining_tp": 1, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "use_cache": True, "unsloth_fixed": True,
        "transformers_version": "4.43.0", "_attn_implementation_autoset": True, "rope_theta": 500000.0,
    },
    "SmolLM2": {"model_type": "llama", "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {
        "kv_cache_dtype": {"q4f16": "float16"}}, "tie_word_embeddings": True},
    "Qwen2.5-7B": {"model_type": "qwen2", "max_window_layers": 28, "use_sliding_window": False, "use_mrope": False,
                   "sliding_window": 131072, "attention_dropout": 0.0},
    "Qwen-7B": {"model_type": "qwen", "attn_dropout_prob": 0.0, "bf16": False, "emb_dropout_prob": 0.0, "fp16": False,
                "kv_channels": 128, "layer_norm_epsilon": 1e-6, "no_bias": True, "onnx_safe": None, "rotary_pct": 1.0,
                "rotary_emb_base": 10000, "scale_attn_weights": True, "seq_length": 8192, "use_dynamic_ntk": True,
                "softmax_in_fp32": False, "use_cache_kernel": False, "use_cache_quantization": False,
                "use_flash_attn": "auto", "use_logn_attn": True, "tokenizer_class": "QWenTokenizer"},
    "Mistral-7B": {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10000.0},
    "Mixtral-8x7B": {"model_type": "mixtral", "num_local_experts": 8, "router_aux_loss_coef": 0.02,
                     "output_router_logits": False, "sliding_window": None},
    "Phi-4-mini": {
        "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False, "mlp_bias": False,
        "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}},
    "gemma-2-9b": {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
                   "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096,
                   "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096},
    "DeepSeek-V3": {
        "model_type": "deepseek_v3", "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "n_group": 8,
        "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_method": "noaux_tc", "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0, "experts_per_token": 4,
        "head_dim": 64, "hidden_act": "silu", "initial_context_length": 4096, "num_experts_per_tok": 4,
        "num_hidden_layers": 24, "num_local_experts": 32, "output_router_logits": False, "router_aux_loss_coef": 0.9,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128, "swiglu_limit": 7.0,
        "rope_theta": 150000, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False}, "eos_token_id": 200002,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}},
    "neutral": {"model_type": "llama", "logits_scaling": 1.0, "embedding_multiplier": 1, "residual_multiplier": None,
                "attn_logit_softcapping": None, "use_qk_norm": False, "is_causal": True, "clip_qkv": None},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_known(name: str) -> None:
    expected = ["sliding_window_size is 4096"] if name == "gemma-2-9b" else []
    assert [notice.partition(",")[0] for notice in check(PUBLISHED[name])] == expected


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("llama", {"logits_scaling": 8.0}),
        ("llama", {"embedding_multiplier": 12.0}),
        ("llama", {"residual_multiplier": 0.22}),
        ("llama", {"attention_multiplier": 0.0078125}),
        ("llama", {"scale_emb": 12}),
        ("llama", {"alibi": True}),
        ("llama", {"is_causal": False}),
        ("llama", {"position_embedding_type": "alibi"}),
        ("mistral", {"attn_logit_softcapping": 30.0}),
        ("mistral", {"clip_qkv": 8.0}),
        ("qwen2", {"logit_scale": 0.0625}),
        ("qwen3", {"final_logit_softcapping": 30.0}),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}}),
        ("mistral", {"rope_scaling": {"rope_type": "yarn", "factor": 16.0, "llama_4_scaling_beta": 0.1}}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}}),
    ],
    ids=str,
)
def test_what_changes_the_numbers_of_another_family_is_refused(model_type: str, keys: dict[str, Any]) -> None:
    (key, value) = next(iter(keys.items()))
    names = [name for name in value if name not in ("rope_type", "factor")] if isinstance(value, dict) else [key]
    with pytest.raises(ModelError, match=f"{names[0]}.*changes the model's numbers and is not supported"):
        check({"model_type": model_type, **keys})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"foo_multiplier": 3.0}, "foo_multiplier is 3.0"),
        ({"use_sink_tokens": True}, "use_sink_tokens is True"),
        ({"foo_scale\x1b[2J": 2.5}, "foo_scale\\x1b[2J is 2.5"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),  # Llama has none
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "zeta": 2}}, "rope scaling linear: zeta is 2"),
    ],
    ids=str,
)
def test_what_nobody_knows_is_told(keys: dict[str, Any], named: str) -> None:
    (notice,) = check({"model_type": "llama", **keys})
    assert named in notice


def test_the_notice_comes_with_the_engine(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"foo_multiplier": 3.0}))
    _, info = build_engine(EngineConfig.of(str(tmp_path), device="cpu", kv_cache_memory="4MiB"), tmp_path)
    assert any("foo_multiplier is 3.0" in notice for notice in info.notices)


EVERYWHERE = {"model_type", "architectures", "bos_token_id", "eos_token_id", "torch_dtype"}


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral"])
def test_what_is_made_of_a_gguf_file_is_known(name: str, tmp_path: Path) -> None:
    """Of one that says all that its architecture may say, and has all the biases that there are."""
    architecture = MIXTRAL if name == "mixtral" else ARCHITECTURES[name]
    prefix = "llama" if name == "mixtral" else name
    said = {key.replace("llama", prefix, 1): value for key, value in LLAMA_GGUF.items()}
    for key, default in architecture.keys.values():
        said[f"{prefix}.{key}"] = 2 if default is None else default
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", prefix)
    for key, value in said.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for module in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{module}.bias", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = config_from_gguf(GgufFile(tmp_path / "model.gguf"))
    assert made.keys() - EVERYWHERE <= KNOWN_KEYS[architecture.model_type]
    assert check_keys(normalize_config(Path("model.gguf"), made)) == []


LLAMA_GGUF = {
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 128,
    "llama.vocab_size": 40,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 16,
}


def check_gguf(path: Path, more: dict[str, Any]) -> list[str]:
    return check_keys(read_config(write_gguf(path / "model.gguf", LLAMA_GGUF | more)))


@pytest.mark.parametrize(
    "more",
    [
        {"llama.embedding_scale": 12.0},
        {"llama.residual_scale": 0.22},
        {"llama.logit_scale": 8.0},
        {"llama.attention.scale": 0.5},
        {"llama.attention.clamp_kqv": 8.0},
        {"llama.attention.causal": False},
        {"llama.rope.scaling.attn_factor": 2.0},
        {"llama.rope.scaling.yarn_ext_factor": 0.5},
        {"llama.rope.scaling.alpha": 1000.0},
        {"llama.expert_gating_func": 2},
    ],
    ids=str,
)
def test_a_gguf_files_keys_are_refused_alike(more: dict[str, Any], tmp_path: Path) -> None:
    (key,) = more
    with pytest.raises(ModelError, match=f"{key.removeprefix('llama.')} is .*changes the model's numbers"):
        check_gguf(tmp_path, more)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({}, []),
        ({"llama.logit_scale": 0.0, "llama.attention.causal": True, "llama.attention.scale": 0.0}, []),
        ({"llama.attention.scale": 0.25}, []),  # a head of 16 has that one anyway
        ({"llama.rope.scaling.finetuned": True, "llama.expert_used_count": 0}, []),
        ({"llama.attention.foo_scale": 2.5}, ["attention.foo_scale is 2.5"]),
    ],
    ids=str,
)
def test_a_gguf_files_unknown_keys_are_told_alike(more: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    assert [notice.partition(",")[0] for notice in check_gguf(tmp_path, more)] == named
