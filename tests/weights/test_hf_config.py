from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig
from ingle.model.registry import FAMILIES, decoder_config
from ingle.weights.hf_config import MAX_CONFIG_BYTES, normalize_config, read_config

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture
def read(tmp_path: Path):
    def write_and_read(changes: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / "config.json").write_text(json.dumps(BASE | changes))
        return read_config(tmp_path)

    return write_and_read


def test_both_generations_of_transformers_come_out_the_same(read) -> None:
    old = read({"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}})
    new = read({"dtype": "bfloat16", "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}})
    assert old == new
    assert new["torch_dtype"] == "bfloat16"
    assert new["rope_theta"] == 5e5
    assert new["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert "dtype" not in new and "rope_parameters" not in new


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}
    LlamaConfig(**BASE | {"rope_parameters": scaling, "dtype": "float16", "head_dim": 32}).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert {key: config[key] for key in BASE} == BASE | {"max_position_embeddings": 512}
    assert config["torch_dtype"] == "float16"
    assert config["head_dim"] == 32
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert config["tie_word_embeddings"] is False


def test_defaults_and_nulls(read) -> None:
    config = read({"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "torch_dtype": None})
    assert (config["num_key_value_heads"], config["head_dim"], config["tie_word_embeddings"]) == (4, 16, False)
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (10000.0, None, None)
    assert read({"rope_scaling": {"rope_type": "default"}})["rope_scaling"] is None
    assert read({"eos_token_id": [1, 2]})["eos_token_id"] == [1, 2]


def test_an_unknown_family_is_left_to_the_registry(read) -> None:
    config = read({"model_type": "mamba", "hidden_size": None, "state_size": 16})
    assert (config["model_type"], config["state_size"]) == ("mamba", 16)


def test_rope_parameters_by_layer_type(read) -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 20000}}
    new = read({"model_type": "gemma3_text", "rope_parameters": nested})
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = read({"model_type": "gemma3_text", "rope_theta": 5e5, "rope_scaling": scaling, "rope_local_base_freq": 2e4})
    assert new == old
    assert (new["rope_theta"], new["rope_scaling"], new["rope_local_base_freq"]) == (5e5, scaling, 2e4)


def test_other_families_keep_rope_parameters_by_layer_type(read) -> None:
    nested = {"full_attention": {"rope_type": "default"}, "chunked_attention": {"rope_type": "default"}}
    assert read({"model_type": "mamba", "rope_parameters": nested})["rope_parameters"] == nested


def test_yarn_stretches_the_context_that_it_was_made_for(read) -> None:
    yarn = {"type": "yarn", "factor": 4.0}
    assert read({"rope_scaling": yarn})["max_position_embeddings"] == 128
    stated = yarn | {"original_max_position_embeddings": 128}
    assert read({"rope_scaling": stated})["max_position_embeddings"] == 512
    assert read({"rope_scaling": stated, "max_position_embeddings": 4096})["max_position_embeddings"] == 4096
    assert read({"rope_scaling": stated | {"factor": 1e9}})["max_position_embeddings"] == 1 << 31


def test_a_missing_key_is_not_a_null(read) -> None:
    assert read({"model_type": "mistral"})["sliding_window"] == 4096
    assert "sliding_window" not in read({"model_type": "mistral", "sliding_window": None})
    gemma = read({"model_type": "gemma2", "attn_logit_softcapping": None})
    assert gemma["final_logit_softcapping"] == 30.0 and "attn_logit_softcapping" not in gemma


TRANSFORMERS_NEEDS = {"deepseek_v2": {"num_experts_per_tok": 6}, "gemma3": {"text_config": {}}}


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"qwen"}))
def test_what_a_config_leaves_unsaid_is_what_transformers_takes(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    written = TRANSFORMERS_NEEDS.get(model_type, {})

    def decoder(**config: Any) -> DecoderConfig:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
        return decoder_config(read_config(tmp_path))

    whole = AutoConfig.for_model(model_type, **written).to_dict()
    expected = decoder(**whole)
    assert decoder(**written) == expected
    for key in whole.get("text_config", whole).keys() - {"model_type", *written}:
        inner = {name: value for name, value in whole.get("text_config", whole).items() if name != key}
        left_out = whole | {"text_config": inner} if "text_config" in whole else inner
        left_out.pop("model_type", None)
        assert decoder(**left_out) == expected, key


def test_the_first_qwen_without_a_word() -> None:
    config = decoder_config(normalize_config(Path("config.json"), {"model_type": "qwen"}))
    assert (config.vocab_size, config.num_layers, config.head_dim, config.norm_eps) == (151936, 32, 128, 1e-6)


def test_a_model_of_text_and_images_is_described_by_its_text_config(tmp_path: Path) -> None:
    """As the published Gemma 3 checkpoints are: most of it left to defaults."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    whole = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "bfloat16",
             "eos_token_id": [1, 106], "text_config": text, "vision_config": {"hidden_size": 1152}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = read_config(tmp_path)
    expected = {"model_type": "gemma3", "hidden_size": 2560, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "torch_dtype": "bfloat16",
                "eos_token_id": [1, 106], "tie_word_embeddings": True}  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    (tmp_path / "config.json").write_text(json.dumps(whole | {"text_config": 7}))
    with pytest.raises(ModelError, match="text_config is 7"):
        read_config(tmp_path)


def test_the_first_qwens_words(read) -> None:
    words = {"kv_channels": 32, "rotary_emb_base": 5000, "layer_norm_epsilon": 1e-4, "rotary_pct": 0.5}
    config = read({"model_type": "qwen", "seq_length": 64, **words, "rms_norm_eps": None})
    assert (config["head_dim"], config["rope_theta"], config["partial_rotary_factor"]) == (32, 5000.0, 0.5)
    assert config["max_position_embeddings"] == 64
    assert (config["use_logn_attn"], config["use_dynamic_ntk"], config["no_bias"]) == (True, True, True)


BAD_VALUES: list[dict[str, Any]] = [
    {"model_type": None},
    {"model_type": 3},
    {"hidden_size": 0},
    {"hidden_size": None},
    {"hidden_size": "64"},
    {"hidden_size": 64.0},
    {"hidden_size": True},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": -1},
    {"vocab_size": 10**30},
    {"num_key_value_heads": 3},
    {"num_attention_heads": 5, "num_key_value_heads": 5},
    {"head_dim": 15},
    {"rms_norm_eps": -1e-5},
    {"rms_norm_eps": "small"},
    {"rope_theta": 0},
    {"rope_theta": 10**4000},
    {"tie_word_embeddings": "no"},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [1, None]},
    {"rope_scaling": []},
    {"rope_parameters": {"partial_rotary_factor": 2.0}},
    {"rope_scaling": {"rope_type": 5}},
    {"rope_scaling": {"factor": 4.0}},
    {"rope_scaling": {"type": None, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    {"rope_scaling": {"rope_type": "linear", "factor": "2"}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 10**400}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "long"}},
    {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_scaling": {"rope_type": "factors", "factors": [1.0]}},
    {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    {"rope_parameters": {"full_attention": {}, "sliding_attention": {"rope_theta": -1}}},
    {"rope_parameters": {"full_attention": {}, "sliding_attention": []}},
    {"rope_parameters": {"full_attention": {}, "sliding_attention": {}, "chunked_attention": {}}},
    {"sliding_window": 0},
    {"partial_rotary_factor": 0.01},
    {"partial_rotary_factor": 0.7},
    {"seq_length": 0},
    {"use_logn_attn": 1},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7 + [0.0]}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": "1", "long_factor": "1"}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1e300}},
    {"rope_scaling": {"rope_type": "linear", "factor": 1e300}},
    {"rope_theta": 1},
    {"head_dim": 1},
    {"head_dim": 2, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    {"head_dim": 2, "model_type": "qwen"},
    {"seq_length": 1},
    {"max_window_layers": -1},
    {"sliding_window_pattern": 0},
    {"use_sliding_window": "yes"},
    {"layer_types": "sliding_attention"},
    {"layer_types": [1, 2]},
    {"query_pre_attn_scalar": 0},
    {"attn_logit_softcapping": -50.0},
    {"final_logit_softcapping": "30"},
    {"rope_local_base_freq": 0},
]


@pytest.mark.parametrize("changes", BAD_VALUES, ids=str)
def test_values_out_of_range_are_refused_in_one_line(read, changes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        read(changes)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'"config"',
        b"\xff\xfe\x00",
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b" " * (MAX_CONFIG_BYTES + 1),
        b'{"model_type": "llama", "rms_norm_eps": NaN}',
        b'{"model_type": "llama", "rope_theta": Infinity}',
    ],
    ids=range(10),
)
def test_damaged_config_files(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_config_and_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        read_config(tmp_path)
    with pytest.raises(ModelError, match=r"absent: no such file"):
        read_config(tmp_path / "absent")


def embedding() -> dict[str, np.ndarray]:
    return {"token_embd.weight": np.zeros((40, 64), np.float16)}


def test_gguf_metadata_gives_the_same_form(write_gguf, model_metadata) -> None:
    config = read_config(write_gguf(model_metadata, embedding()))
    assert config == {
        **BASE,
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "head_dim": 16,
        "rms_norm_eps": 0.5,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


@pytest.mark.parametrize("arch, class_name", [("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")])
def test_other_architectures_bias_and_untied_head(write_gguf, model_metadata, arch: str, class_name: str) -> None:
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in model_metadata.items()}
    metadata |= {f"{arch}.attention.key_length": 16, f"{arch}.attention.value_length": 16}
    tensors = embedding() | {"output.weight": np.zeros((40, 64), np.float32), "blk.0.attn_q.bias": np.zeros(64)}
    config = read_config(write_gguf(metadata, tensors, arch=arch))
    assert (config["model_type"], config["architectures"]) == (arch, [class_name])
    assert (config["tie_word_embeddings"], config["head_dim"]) == (False, 16)
    assert config.get("attention_bias") == (True if arch == "qwen3" else None)  # Qwen 2 has them always


ROPE = "llama.rope.scaling."


@pytest.mark.parametrize(
    "metadata, scaling",
    [
        ({ROPE + "type": "linear", ROPE + "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({ROPE + "type": "none", ROPE + "factor": 4.0}, None),
        ({ROPE + "factor": 0.0}, None),
        (
            {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                ROPE + "type": "yarn",
                ROPE + "factor": 4.0,
                ROPE + "attn_factor": 1.5,
                ROPE + "yarn_attn_factor": 2.0,
                ROPE + "yarn_ext_factor": 0.5,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "attn_factor": 3.0,
                "extrapolation_factor": 0.5,
                "original_max_position_embeddings": 128,
            },
        ),
        (
            {ROPE + "type": "yarn", ROPE + "factor": 4.0, ROPE + "yarn_ext_factor": -1.0, ROPE + "attn_factor": 1.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
    ids=str,
)
def test_gguf_rope_scaling(write_gguf, model_metadata, metadata: dict[str, Any], scaling: dict[str, Any]) -> None:
    assert read_config(write_gguf(model_metadata | metadata, embedding()))["rope_scaling"] == scaling


def test_gguf_rope_factors(write_gguf, model_metadata) -> None:
    factors = np.array([1, 1, 1, 1, 2, 4, 8, 8], np.float32)
    config = read_config(write_gguf(model_metadata, embedding() | {"rope_freqs.weight": factors}))
    assert config["rope_scaling"] == {"rope_type": "factors", "factors": factors.tolist()}


@pytest.mark.parametrize(
    "factors", [np.ones(7), np.array([1.0] * 7 + [math.nan]), np.array([1.0] * 7 + [0.0])], ids=str
)
def test_bad_gguf_rope_factors(write_gguf, model_metadata, factors: np.ndarray) -> None:
    path = write_gguf(model_metadata, embedding() | {"rope_freqs.weight": factors.astype(np.float32)})
    with pytest.raises(ModelError, match="rope factor"):
        read_config(path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"llama.attention.head_count": [4, 4]}, "num_attention_heads"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "rms_norm_eps"),
        ({"llama.rope.freq_base": math.inf}, "rope_theta"),
        ({"llama.attention.key_length": 16, "llama.attention.value_length": 8}, "different sizes"),
        ({"llama.attention.key_length": 32, "llama.attention.value_length": 32}, "part of each head"),
        ({ROPE + "type": "longrope", ROPE + "factor": 2.0}, "longrope"),
        ({"split.count": 3}, "one of 3 parts of a model, but not named so"),
        ({"split.count": 1 << 20}, "split.count is 1048576"),
    ],
    ids=str,
)
def test_gguf_models_that_are_refused(write_gguf, model_metadata, changes: dict[str, Any], message: str) -> None:
    metadata = {key: value for key, value in (model_metadata | changes).items() if value is not None}
    with pytest.raises(ModelError, match=message):
        read_config(write_gguf(metadata, embedding()))


GEMMA3 = {
    "gemma3.embedding_length": 64,
    "gemma3.feed_forward_length": 96,
    "gemma3.block_count": 2,
    "gemma3.attention.head_count": 4,
    "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
    "gemma3.context_length": 128,
}
WIDE_HEADS = {"gemma3.attention.key_length": 32, "gemma3.attention.value_length": 32}


def test_gguf_gemma3_without_a_window_and_in_its_largest_size(write_gguf) -> None:
    config = read_config(write_gguf(GEMMA3 | WIDE_HEADS, embedding(), arch="gemma3"))
    assert "sliding_window" not in config
    assert (config["query_pre_attn_scalar"], config["rope_local_base_freq"]) == (32, 10000.0)
    largest = GEMMA3 | WIDE_HEADS | {"gemma3.block_count": 62, "gemma3.attention.sliding_window": 1024}
    config = read_config(write_gguf(largest, embedding(), arch="gemma3"))
    assert (config["query_pre_attn_scalar"], config["sliding_window"]) == (64 // 4, 1024)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, (8, 8, 8, 8)),
        (2, (8, None, 8, None)),
        ([True, False, False, True], (8, None, None, 8)),
    ],
    ids=str,
)
def test_gguf_pattern_of_windows(write_gguf, pattern: Any, windows: tuple[int | None, ...]) -> None:
    metadata = GEMMA3 | {"gemma3.block_count": 4, "gemma3.attention.sliding_window": 8}
    if pattern is not None:
        metadata["gemma3.attention.sliding_window_pattern"] = pattern
    assert decoder_config(read_config(write_gguf(metadata, embedding(), arch="gemma3"))).windows == windows


def test_gguf_phi3_scaling_and_partial_rotation(write_gguf) -> None:
    metadata = {key.replace("gemma3", "phi3"): value for key, value in GEMMA3.items()}
    metadata |= {
        "phi3.context_length": 512,
        "phi3.rope.dimension_count": 12,
        "phi3.rope.scaling.original_context_length": 128,
        "phi3.rope.scaling.attn_factor": 1.25,
        "phi3.attention.sliding_window": 100,
    }
    factors = {
        f"rope_factors_{kind}.weight": np.arange(1, 7, dtype=np.float32) * k for k, kind in ((1, "short"), (4, "long"))
    }
    config = read_config(write_gguf(metadata, embedding() | factors, arch="phi3"))
    assert (config["head_dim"], config["partial_rotary_factor"], config["sliding_window"]) == (16, 0.75, 100)
    scaling = config["rope_scaling"]
    assert (scaling["rope_type"], scaling["attention_factor"]) == ("longrope", 1.25)
    assert (scaling["short_factor"], scaling["long_factor"][-1]) == ([1, 2, 3, 4, 5, 6], 24)
    assert scaling["original_max_position_embeddings"] == 128


def test_gguf_experts_where_there_are_none(write_gguf) -> None:
    with pytest.raises(ModelError, match=r"qwen3moe\.expert_count is None, and a qwen3moe has experts"):
        read_config(write_gguf({"qwen3moe.block_count": 2}, arch="qwen3moe"))
    with pytest.raises(ModelError, match=r"qwen3\.expert_count is 8, and a qwen3 has none"):
        read_config(write_gguf({"qwen3.expert_count": 8}, arch="qwen3"))


def test_unknown_gguf_architecture(write_gguf) -> None:
    with pytest.raises(ModelError, match="'rwkv7' is not supported, only llama, qwen2, qwen3, qwen2moe"):
        read_config(write_gguf(arch="rwkv7"))
