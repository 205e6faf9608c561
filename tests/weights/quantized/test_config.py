"""What the configurations of published checkpoints say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ConfigError, ModelError
from ingle.weights.quantized.config import cache_made_for, read_quantization
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

QWEN1_GPTQ = {**QWEN2_GPTQ_INT4, "model_file_base_name": "model"}
"""Qwen-72B-Chat-Int4"""
OLD_AUTO_GPTQ = {
    "bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-128g",
}  # fmt: skip
"""quantize_config.json of AutoGPTQ before transformers read such"""
GPTQMODEL_5 = {
    "bits": 4, "checkpoint_format": "gptq", "desc_act": False, "dynamic": None, "format": "gptq", "group_size": 128,
    "hyb_act": False, "lm_head": False, "meta": {"quantizer": ["gptqmodel:5.0.0"], "mse": 0.0}, "pack_dtype": "int32",
    "quant_method": "gptq", "sym": True,
}  # fmt: skip
"""ModelCloud's, of GPTQModel 5"""
MIXTRAL_AWQ = {
    "bits": 4, "group_size": 128, "modules_to_not_convert": ["gate"], "quant_method": "awq", "version": "gemm",
    "zero_point": True,
}  # fmt: skip
"""TheBloke/Mixtral-8x7B-Instruct-v0.1-AWQ"""
TRANSFORMERS_AWQ = {
    "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": {"version": 2, "max_input_len": 2048},
    "fuse_max_seq_len": None, "group_size": 128, "modules_to_fuse": None, "modules_to_not_convert": None,
    "quant_method": "awq", "version": "exllama", "zero_point": True,
}  # fmt: skip
"""What transformers' AwqConfig saves where ExLlama's kernels were asked for."""
UNSLOTH_NF4 = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "model.layers.1.mlp"], "llm_int8_threshold": 6.0,
    "load_in_4bit": True, "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip
"""unsloth's dynamic ones"""
BNB_INT8 = {
    "_load_in_4bit": False, "_load_in_8bit": True, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_use_double_quant": False, "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": None, "load_in_4bit": False, "load_in_8bit": True, "quant_method": "bitsandbytes",
}  # fmt: skip
CT_NVFP4: Settings = {
    "config_groups": {
        "group_0": {
            "format": "nvfp4-pack-quantized",
            "input_activations": {"dynamic": "local", "group_size": 16, "num_bits": 4, "strategy": "tensor_group",
                                  "symmetric": True, "type": "float"},
            "output_activations": None, "targets": ["Linear"],
            "weights": {"dynamic": False, "group_size": 16, "num_bits": 4, "observer": "minmax",
                        "strategy": "tensor_group", "symmetric": True, "type": "float"},
        }
    },
    "format": "nvfp4-pack-quantized", "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
    "transform_config": {},
}  # fmt: skip
CT_FP8_KV: Settings = {
    **FP8_DYNAMIC, "ignore": ["re:.*lm_head"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
}  # fmt: skip
MODELOPT_FP4 = {
    "ignore": ["lm_head", "model.layers.0.self_attn*"], "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type":
    "float"}, "producer": {"name": "modelopt", "version": "0.29.0"}, "quant_algo": "NVFP4", "group_size": 16,
    "quant_method": "modelopt",
}  # fmt: skip
"""nvidia/Qwen3-8B-FP4"""
MODELOPT_MIXED = {
    "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
    "quantized_layers": {UP: {"quant_algo": "W4A16_NVFP4", "group_size": 16},
                         "model.layers.1.self_attn.o_proj": {"quant_algo": "FP8"}},
}  # fmt: skip
QUARK_FP8 = {
    "quant_method": "quark", "exclude": ["lm_head"], "algo_config": None, "layer_type_quant_config": {},
    "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "pack_method": "reorder", "weight_format": "real_quantized"},
    "global_quant_config": {
        "bias": None, "output_tensors": None,
        "input_tensors": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False},
        "weight": {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "is_dynamic": False, "ch_axis": None,
                   "group_size": None}},
    "layer_quant_config": {},
}  # fmt: skip
"""amd/Llama-3.1-8B-Instruct-FP8-KV"""
QUARK_MX: Settings = {
    "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0",
    "scale_type": "float", "is_dynamic": False, "symmetric": None, "round_method": "half_even"}  # fmt: skip
QUARK_MIXED: Settings = {
    **QUARK_FP8, "kv_cache_quant_config": {}, "export": {"kv_cache_group": []},
    "global_quant_config": {"weight": QUARK_MX, "input_tensors": {**QUARK_MX, "is_dynamic": True}},
    "layer_quant_config": {"*self_attn*": {"weight": {"dtype": "fp8_e4m3", "qscheme": "per_channel"},
                                           "input_tensors": {"dtype": "fp8_e4m3", "is_dynamic": True}}},
}  # fmt: skip
GPT_OSS = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"}
AUTO_ROUND_MIXED = {
    **AUTO_ROUND, "autoround_version": "0.8.0", "data_type": "int",
    "extra_config": {r".*mlp\.up_proj.*": {"bits": 8, "group_size": 64}, HEAD: {"bits": 16, "data_type": "float"}},
}  # fmt: skip

GPTQ_4 = Scheme("gptq", 4, group_size=128, zero_offset=1, has_zeros=True)
FP8_BLOCKS = Scheme("whole", 8, is_float=True, group_size=128, block_rows=128, quantizes_inputs=True)
FP8_ROWS = Scheme("whole", 8, is_float=True, quantizes_inputs=True)
GEMV = Scheme("gemv", 4, group_size=128, has_zeros=True)
BNB_NF4 = Scheme("blocks", 4, table="nf4")
MXFP4 = Scheme("nibbles", 4, group_size=32, table="mxfp4")
NVFP4 = Scheme("nibbles", 4, group_size=16, table="nvfp4")


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
        (
            AUTO_ROUND_MIXED,
            "AutoRound, int8 in groups of 64, int4 in groups of 128",
            Scheme("gptq", 8, group_size=64, zero_offset=1, has_zeros=True),
            None,
        ),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:auto_awq"},
            "AutoRound, int4 in groups of 128",
            Scheme("awq", 4, group_size=128, has_zeros=True),
            None,
        ),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:exllamav2", "sym": False},
            "AutoRound, int4 in groups of 128",
            Scheme("gptq", 4, group_size=128, has_zeros=True),
            None,
        ),
        (QWEN1_GPTQ, "GPTQ, int4 in groups of 128", GPTQ_4, ...),
        (GPTQMODEL_5, "GPTQ, int4 in groups of 128", GPTQ_4, ...),
        (MIXTRAL_AWQ, "AWQ, int4 in groups of 128", ..., ...),
        (TRANSFORMERS_AWQ, "AWQ, int4 in groups of 128", Scheme("awq", 4, group_size=128, has_zeros=True), ...),
        (
            {**AWQ, "version": "GEMV"},
            "AWQ, int4 in groups of 128",
            Scheme("gemv", 4, group_size=128, has_zeros=True),
            ...,
        ),
        (UNSLOTH_NF4, "bitsandbytes, NF4", None, None),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "bitsandbytes, NF4",
            Scheme("blocks", 4, table="nf4"),
            ...,
        ),
        (BNB_INT8, "bitsandbytes, int8", Scheme("scb", 8), ...),
        (CT_NVFP4, "compressed-tensors, NVFP4 in groups of 16", NVFP4, None),
        (CT_FP8_KV, "compressed-tensors, FP8", FP8_ROWS, None),
        (MODELOPT_FP4, "ModelOpt, NVFP4 in groups of 16", NVFP4, None),
        (MODELOPT_MIXED, "ModelOpt, NVFP4 in groups of 16, FP8", NVFP4, None),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head*"]}, "ModelOpt, FP8", FP8_ROWS, None),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"]},
            "ModelOpt, FP8",
            FP8_ROWS,
            None,
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ["lm_head"]},
            "ModelOpt, FP8 in groups of 32",
            Scheme("whole", 8, True, 32),
            None,
        ),
        (QUARK_FP8, "Quark, FP8", FP8_ROWS, None),
        (QUARK_MIXED, "Quark, FP8, MXFP4 in groups of 32", MXFP4, None),
        (
            {**QUARK_FP8, "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_channel"}}},
            "Quark, int8",
            Scheme("whole", 8),
            None,
        ),
        (GPT_OSS, "MXFP4, MXFP4 in groups of 32", MXFP4, ...),
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
        ("quantize_config.json", OLD_AUTO_GPTQ, "GPTQ"),
        ("quantize_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "AWQ"),
        ("quantization_config.json", AUTO_ROUND, "AutoRound"),
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


OLD_MODELOPT_KV = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}


@pytest.mark.parametrize(
    "settings, made_for",
    [
        (CT_FP8_KV, "fp8"),
        (MODELOPT_FP4, "fp8"),
        (MODELOPT_MIXED, "fp8"),
        (QUARK_FP8, "fp8"),
        (QUARK_MIXED, None),
        ({**QUARK_MIXED, "kv_cache_quant_config": {"*k_proj": {"output_tensors": {"dtype": "fp8_e4m3"}}}}, "fp8"),
        ({**AUTO_FP8, "kv_cache_scheme": "static"}, "fp8"),  # neuralmagic/Meta-Llama-3-8B-Instruct-FP8-KV
        ({**MODELOPT, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}}, "int8"),
        ({**W4A16, "kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "int8"),
        ({**W4A16, "kv_cache_scheme": {"num_bits": 4, "type": "float"}}, "fp4"),
        ({**W4A16, "kv_cache_scheme": {"num_bits": -1e9, "type": ["int"]}}, "fp8"),
        ({**W4A16, "kv_cache_scheme": 5, "kv_cache_quant_algo": []}, None),
        ({**MODELOPT, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}, None),
        (W4A16, None),
        (QWEN2_GPTQ_INT4, None),
        ("awq", None),
    ],
    ids=str,
)
def test_what_keys_and_values_were_made_for(settings: object, made_for: str | None) -> None:
    assert cache_made_for(Path("/models/m"), {"quantization_config": settings}) == made_for


@pytest.mark.parametrize(
    "settings",
    [
        {**W4A16, "config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"quant_method": "modelopt", **OLD_MODELOPT_KV["quantization"]},
        {"quant_method": "modelopt", **OLD_MODELOPT_KV},
    ],
    ids=str,
)
def test_of_keys_and_values_alone_weights_are_floats(settings: Settings) -> None:
    config = {"quantization_config": settings}
    assert read_quantization(Path("/models/m"), config) is None
    assert cache_made_for(Path("/models/m"), config) == "fp8"


def with_weights(**changes: object) -> Settings:
    group = W4A16["config_groups"]["group_0"]
    return {**W4A16, "config_groups": {"group_0": {**group, "weights": {**group["weights"], **changes}}}}


@pytest.mark.parametrize(
    "settings, says",
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "_quant_type is 'int4'",
        ),
        ({"quant_method": "hqq", "quant_config": {}}, "quantized by 'hqq'"),
        ({"quant_method": "exl2", "bits": 4.25}, "quantized by 'exl2'"),
        ("awq", "quantized by 'a method without a name'"),
        ({**QWEN2_GPTQ_INT4, "bits": 5}, "bits is 5, and ingle reads 2, 3, 4, 8 of this method"),
        ({**QWEN2_GPTQ_INT4, "bits": "4"}, "quantization_config.bits is '4', not a whole number"),
        ({**QWEN2_GPTQ_INT4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', and ingle reads gptq and"),
        ({**QWEN2_GPTQ_INT4, "group_size": -2}, "group_size is -2, not a whole number from -1"),
        ({**QWEN2_GPTQ_INT4, "dynamic": {"+:(": {}}}, "the pattern '(' in the quantization's configuration is none"),
        ({**AWQ, "version": "gemv_fast"}, "version is 'gemv_fast', and ingle reads gemm and gemv"),
        ({**AUTO_ROUND, "packing_format": "auto_round:fp8"}, "packing_format is 'auto_round:fp8'"),
        ({**AUTO_ROUND, "data_type": "mx_fp"}, "data_type is 'mx_fp', and ingle reads whole numbers"),
        (
            {**CT_NVFP4, "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}},
            "num_bits is 8, and ingle reads 4",
        ),
        ({**DEEPSEEK_FP8, "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({**DEEPSEEK_FP8, "weight_block_size": [128]}, "weight_block_size is [128], not two whole numbers"),
        ({**DEEPSEEK_FP8, "weight_block_size": [0, 128]}, "not two whole numbers"),
        ({**W4A16, "format": "marlin-24"}, "format is 'marlin-24', and ingle reads pack-quantized and"),
        ({**W4A16, "config_groups": {}, "kv_cache_scheme": None}, "names no layers that are quantized"),
        ({**W4A16, "config_groups": []}, "config_groups is [], not an object"),
        ({**W4A16, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
        (with_weights(num_bits=3), "num_bits is 3, and ingle reads 4, 8"),
        (with_weights(strategy="attn_head"), "strategy is 'attn_head'"),
        (with_weights(group_size=None), "group_size is None, not a whole number"),
        (with_weights(type="float", num_bits=4), "packed floats"),
        ({**QUARK_FP8, "global_quant_config": {"weight": {"dtype": "int4"}}}, "dtype is 'int4', and ingle reads fp8_"),
        ({**QUARK_FP8, "global_quant_config": {"weight": [{"dtype": "int4"}]}}, "weight is [{'dtype': 'int4'}], not"),
        (
            {**QUARK_FP8, "global_quant_config": {"weight": {**QUARK_MX, "group_size": 16}}},
            "group_size is 16, and ingle reads groups of 32",
        ),
        ({"quant_method": "modelopt", "quant_algo": "W6A6"}, "quant_algo is 'W6A6'"),
        ({**MODELOPT_MIXED, "quantized_layers": {UP: {"quant_algo": "INT4_AWQ"}}}, "quant_algo is 'INT4_AWQ'"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named(settings: object, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(settings).scheme_of(UP)
    assert says in str(caught.value) and "\n" not in str(caught.value)


PUBLISHED = [
    QWEN2_GPTQ_INT4, LLAMA2_GPTQ, GPTQMODEL, AWQ, W4A16, FP8_DYNAMIC, QWEN3_FP8, META_FP8, MODELOPT, AUTO_ROUND_MIXED,
    UNSLOTH_NF4, BNB_INT8, CT_NVFP4, MODELOPT_FP4, MODELOPT_MIXED,
]  # fmt: skip
HOSTILE = [None, "", "x" * 5000, "re:(", -1, 0, 3, 2**80, 1e308, True, [], {}, [None], {"": None}, [[]], ["re:(" * 9]]


def damaged(value: Any, rng: random.Random) -> Any:
    """With one value within it changed to something that nobody expects there, or gone."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {other: each for other, each in value.items() if other != key}
        return {**value, key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [damaged(value[0], rng), *value[1:]]
    return rng.choice(HOSTILE)


def test_whatever_a_configuration_says_is_read_or_refused_in_a_line(tmp_path: Path) -> None:
    rng = random.Random(0)
    for settings in PUBLISHED * 40:
        try:
            quantization = read_quantization(tmp_path, {"quantization_config": damaged(settings, rng)})
            if quantization is not None:
                quantization.scheme_of(UP), quantization.name
        except ModelError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500


def test_a_pattern_gets_little_time() -> None:
    quantization = read({**W4A16, "ignore": ["re:(a|aa)+$b"]})
    with pytest.raises(ModelError, match="takes too long"):
        quantization.scheme_of("a" * 60)


def test_the_flag(tmp_path: Path) -> None:
    gptq = read(QWEN2_GPTQ_INT4)
    for value in (None, "gptq", "gptq_marlin", "GPTQ", "auto", "None"):
        check_flag(value, tmp_path, gptq)
    check_flag("gguf", tmp_path / "m.gguf", None)
    for settings, values in (
        (AWQ, ("awq", "awq_marlin", "moe_wna16", "cpu_awq")),
        (AUTO_ROUND, ("auto-round", "inc", "gptq_marlin")),
        (QWEN3_FP8, ("fp8", "deepspeedfp8", "fbgemm_fp8")),
        (W4A16, ("compressed-tensors", "compressed_tensors")),
        (CT_FP8_KV, ("compressed-tensors", "w8a8_fp8")),
        (UNSLOTH_NF4, ("bitsandbytes", "bnb", "bitsandbytes-nf4")),
        (MODELOPT_FP4, ("modelopt", "modelopt_fp4", "petit_nvfp4")),
        (GPT_OSS, ("mxfp4", "gpt_oss_mxfp4")),
        (QUARK_FP8, ("quark",)),
    ):
        for value in values:
            assert check_flag(value, tmp_path, read(settings)) is None
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
        with pytest.raises(
            ConfigError, match=f"--quantization {value}: .*is not quantized.*give int4, int8 or fp8, which rounds"
        ):
            check_flag(value, tmp_path, None)
