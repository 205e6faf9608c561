"""What the configurations of published checkpoints say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ConfigError, ModelError
from ingle.weights.quantized.config import read_quantization
from ingle.weights.quantized.flag import check_flag
from ingle.weights.quantized.scheme import Quantization, Scheme

Settings = dict[str, Any]
UP, HEAD = "model.layers.1.mlp.up_proj", "lm_head"

QWEN2_GPTQ_INT4 = {
    "bits": 4, "damp_percent": 0.01, "desc_act": False, "group_size": 128, "model_file_base_name": None,
    "model_name_or_path": None, "modules_in_block_to_quantize": None, "quant_method": "gptq", "static_groups": False,
    "sym": True, "true_sequential": True,
}  # fmt: skip
"""Qwen2.5-7B-Instruct-GPTQ-Int4; Qwen-72B-Chat-Int4 says the same."""
LLAMA2_GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": True, "sym": True, "true_sequential": True,
    "model_name_or_path": None, "model_file_base_name": "model", "quant_method": "gptq",
}  # fmt: skip
"""TheBloke/Llama-2-7B-Chat-GPTQ"""
GPTQMODEL = {
    "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": False, "group_size": 64, "lm_head": False,
    "meta": {"quantizer": ["gptqmodel:1.4.0"]}, "pack_dtype": "int32", "quant_method": "gptq", "sym": False,
    "dynamic": {r"-:model\.layers\.0\..*": {}, r"+:.*\.down_proj$": {"bits": 8, "group_size": -1}},
}  # fmt: skip
AWQ = {
    "bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
    "zero_point": True,
}  # fmt: skip
"""Qwen2.5-7B-Instruct-AWQ"""
W4A16: Settings = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": 1.8,
    "ignore": ["lm_head", "re:.*vision.*"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
"""RedHatAI's quantized.w4a16"""
FP8_DYNAMIC: Settings = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True,
                                  "type": "float", "observer": None, "group_size": None},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"dynamic": False, "num_bits": 8, "observer": "minmax", "strategy": "channel",
                        "symmetric": True, "type": "float", "group_size": None, "block_structure": None},
        }
    },
    "format": "float-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
"""RedHatAI's FP8-dynamic"""
DEEPSEEK_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
QWEN3_FP8 = {**DEEPSEEK_FP8, "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.embed_tokens"]}
AUTO_FP8 = {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"}
META_FP8 = {"activation_scale_ub": 1200.0, "modules_to_not_convert": ["model.layers.0.self_attn.q_proj", "lm_head"],
            "quant_method": "fbgemm_fp8"}  # fmt: skip
MODELOPT = {"producer": {"name": "modelopt"},
            "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}  # fmt: skip
AUTO_ROUND = {"bits": 4, "group_size": 128, "sym": True, "quant_method": "auto-round", "iters": 200,
              "packing_format": "auto_round:auto_gptq", "extra_config": {HEAD: {"bits": 16}}}  # fmt: skip

GPTQ_4 = Scheme("gptq", 4, group_size=128, zero_offset=1, has_zeros=True)
FP8_BLOCKS = Scheme("whole", 8, is_float=True, group_size=128, block_rows=128, quantizes_inputs=True)
FP8_ROWS = Scheme("whole", 8, is_float=True, quantizes_inputs=True)


def read(settings: object, key: str = "quantization_config") -> Quantization:
    quantization = read_quantization(Path("/models/m"), {key: settings})
    assert quantization is not None
    return quantization


@pytest.mark.parametrize(
    "settings, name, up, head",
    [
        (QWEN2_GPTQ_INT4, "GPTQ, int4 in groups of 128", GPTQ_4, GPTQ_4),
        ({**QWEN2_GPTQ_INT4, "bits": 8}, "GPTQ, int8 in groups of 128", Scheme("gptq", 8, False, 128, 1, 1, True), ...),
        (LLAMA2_GPTQ, "GPTQ, int4 in groups of 128", GPTQ_4, ...),
        ({**LLAMA2_GPTQ, "group_size": -1}, "GPTQ, int4", Scheme("gptq", 4, zero_offset=1, has_zeros=True), ...),
        (AWQ, "AWQ, int4 in groups of 128", Scheme("awq", 4, group_size=128, has_zeros=True), ...),
        ({"w_bit": 4, "q_group_size": 64, "quant_method": "awq"}, "AWQ, int4 in groups of 64", ..., ...),
        (W4A16, "compressed-tensors, int4 in groups of 128", Scheme("packed", 4, group_size=128), None),
        (FP8_DYNAMIC, "compressed-tensors, FP8", FP8_ROWS, None),
        (DEEPSEEK_FP8, "FP8, FP8 in blocks of 128 x 128", FP8_BLOCKS, FP8_BLOCKS),
        (QWEN3_FP8, "FP8, FP8 in blocks of 128 x 128", FP8_BLOCKS, None),
        (AUTO_FP8, "FP8, FP8", FP8_ROWS, None),
        (META_FP8, "FP8, FP8", FP8_ROWS, None),
        (AUTO_ROUND, "AutoRound, int4 in groups of 128", GPTQ_4, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head*"]}, "ModelOpt, FP8", FP8_ROWS, None),
    ],
    ids=str,
)
def test_published_configurations(settings: Settings, name: str, up: object, head: object) -> None:
    quantization = read(settings)
    assert quantization.name == name
    for module, expected in ((UP, up), (HEAD, head)):
        assert expected is ... or quantization.scheme_of(module) == expected


def test_int8_of_compressed_tensors() -> None:
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    group = {"weights": weights, "targets": ["Linear"], "input_activations": {"num_bits": 8}}
    settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"g": group}}
    assert read(settings, "compression_config").scheme_of(UP) == Scheme("whole", 8, has_zeros=True)


def test_groups_of_layers_with_formats_of_their_own() -> None:
    """As llm-compressor writes mixtures of precisions."""
    fp8 = {**FP8_DYNAMIC["config_groups"]["group_0"], "format": "float-quantized", "targets": [r"re:.*down_proj$"]}
    int4 = {**W4A16["config_groups"]["group_0"], "format": "pack-quantized", "targets": [UP]}
    settings = {**W4A16, "format": "mixed-precision", "config_groups": {"a": fp8, "b": int4}}
    quantization = read(settings)
    assert quantization.scheme_of("model.layers.3.mlp.down_proj") == FP8_ROWS
    assert quantization.scheme_of(UP) == Scheme("packed", 4, group_size=128)
    assert quantization.scheme_of("model.layers.3.mlp.gate_proj") is None
    with pytest.raises(ModelError, match=r"says how 2 kinds of layers are quantized, and not how x\.gate is"):
        quantization.scheme_stored("x.gate")


def test_gptqmodels_exceptions() -> None:
    quantization = read(GPTQMODEL)
    assert quantization.scheme_of("model.layers.0.mlp.up_proj") is None
    assert quantization.scheme_of(UP) == Scheme("gptq", 4, group_size=64, has_zeros=True)
    assert quantization.scheme_of("model.layers.1.mlp.down_proj") == Scheme("gptq", 8, has_zeros=True)


@pytest.mark.parametrize(
    "name, settings, method",
    [
        ("quantize_config.json", {key: LLAMA2_GPTQ[key] for key in ("bits", "group_size", "desc_act", "sym")}, "GPTQ"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "AWQ"),
        ("hf_quant_config.json", MODELOPT, "ModelOpt"),
    ],
)
def test_what_lies_beside_a_silent_config(tmp_path: Path, name: str, settings: Settings, method: str) -> None:
    assert read_quantization(tmp_path, {}) is None
    (tmp_path / name).write_text(json.dumps(settings))
    quantization = read_quantization(tmp_path, {})
    assert quantization is not None and quantization.method == method and name in quantization.source
    assert quantization.scheme_of(UP) is not None


def with_weights(**changes: object) -> Settings:
    group = W4A16["config_groups"]["group_0"]
    return {**W4A16, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by 'bitsandbytes'"),
        ({"quant_method": "exl2", "bits": 4.25}, "quantized by 'exl2'"),
        ("awq", "quantized by 'a method without a name'"),
        ({**QWEN2_GPTQ_INT4, "bits": 5}, "bits is 5, and ingle reads 2, 3, 4, 8 of this method"),
        ({**QWEN2_GPTQ_INT4, "bits": "4"}, "quantization_config.bits is '4', not a whole number"),
        ({**QWEN2_GPTQ_INT4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and ingle reads gptq and"),
        ({**QWEN2_GPTQ_INT4, "group_size": -2}, "group_size is -2, not a whole number from -1"),
        ({**QWEN2_GPTQ_INT4, "dynamic": {"+:(": {}}}, "the pattern '(' in the quantization's configuration is none"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv', and ingle reads gemm"),
        ({**DEEPSEEK_FP8, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**DEEPSEEK_FP8, "weight_block_size": [128]}, "weight_block_size is [128], not two whole numbers"),
        ({**DEEPSEEK_FP8, "weight_block_size": [0, 128]}, "not two whole numbers"),
        ({**W4A16, "format": "marlin-24"}, "format is 'marlin-24', and ingle reads pack-quantized and"),
        ({**W4A16, "config_groups": {}}, "names no layers that are quantized"),
        ({**W4A16, "config_groups": []}, "config_groups is [], not an object"),
        ({**W4A16, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (with_weights(num_bits=3), "num_bits is 3, and ingle reads 4, 8"),
        (with_weights(strategy="attn_head"), "strategy is 'attn_head'"),
        (with_weights(group_size=None), "group_size is None, not a whole number"),
        (with_weights(type="float", num_bits=4), "packed floats"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(settings: object, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(settings).scheme_of(UP)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_pattern_gets_little_time() -> None:
    quantization = read({**W4A16, "ignore": ["re:(a|aa)+$b"]})
    with pytest.raises(ModelError, match="takes too long"):
        quantization.scheme_of("a" * 60)


def test_the_flag(tmp_path: Path) -> None:
    gptq = read(QWEN2_GPTQ_INT4)
    for value in (None, "gptq", "gptq_marlin", "GPTQ", "auto", "None"):
        check_flag(value, tmp_path, gptq)
    check_flag("gguf", tmp_path / "m.gguf", None)
    for value, path, quantization, says in (
        ("awq", tmp_path, gptq, "is quantized already: GPTQ, int4 in groups of 128"),
        ("int8", tmp_path, gptq, "is quantized already"),
        ("awq", tmp_path / "m.gguf", None, "is a GGUF file"),
        ("gguf", tmp_path, gptq, "quantized already"),
    ):
        with pytest.raises(ConfigError, match=f"--quantization {value}: .*{says}.*; leave the flag out"):
            check_flag(value, path, quantization)
    for value, target in (("int4", "int4"), ("INT8", "int8"), ("fp8", "fp8"), ("ptpc_fp8", "fp8")):
        assert check_flag(value, tmp_path, None) == target
    for value in ("awq", "bitsandbytes", "experts_int8", "q4_k_m"):
        with pytest.raises(ConfigError, match=f"--quantization {value}: .*is not quantized.*int4, int8 or fp8 rounds"):
            check_flag(value, tmp_path, None)
