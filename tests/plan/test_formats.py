"""What configurations say that a number takes."""

from __future__ import annotations

from typing import Any

import pytest

from ingle.plan.formats import quantization_of


def compressed(**weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    "settings, bits",
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        (compressed(num_bits=4, type="float", group_size=16), 4.5),
        (compressed(num_bits=4, type="float", group_size=32), 4.25),
        (compressed(num_bits=8, type="float", group_size=None), 8),
        (compressed(num_bits=4, type="int", group_size=128), 4.125),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "mxfp4"}, 4.25),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, 8),
        ({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4", "group_size": 32}}}, 4.25),
    ],
    ids=str,
)
def test_bits_of_a_number(settings: dict[str, Any], bits: float) -> None:
    found = quantization_of({"quantization_config": settings})
    assert found is not None and found.bits == bits


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
    ],
    ids=str,
)
def test_of_keys_and_values_alone_weights_are_floats(settings: dict[str, Any]) -> None:
    assert quantization_of({"quantization_config": settings}) is None
