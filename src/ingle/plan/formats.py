"""How weights may be held, and what a number then takes: as the checkpoint stores it, in 16 bits, in codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ingle.weights.checked import Checked
from ingle.weights.quantized.scheme import Target

_SCALE_BITS = 16
_GROUP = 128
_LLM_INT8, _NF4_BITS, _NVFP4_BITS = 8, 4.5, 4.5
_METHODS_WITH_ZEROS = ("gptq", "awq", "gptq_marlin", "awq_marlin", "auto-round", "autoround")
"""Which store a zero of each group in as many bits as a code."""


@dataclass(frozen=True)
class Held:
    """A way to hold a model's weights."""

    name: str
    matrix_bytes: float
    """Of a number in a layer's matrices, experts among them."""
    other_bytes: float
    """Of one in embedding, head, norms and routers."""
    group_size: int = 1
    """Numbers of a row that share a scale: what tensor parallelism cannot split."""
    refusal: str | None = None
    """Why ingle does not hold weights so; None where it does."""


@dataclass(frozen=True)
class Quantization:
    """Of a folder's weights, as its configuration has it."""

    method: str
    bits: float
    """Of a number in a layer's matrices, scales and zeros included."""
    group_size: int

    @property
    def name(self) -> str:
        return f"{self.method} {round(self.bits)}-bit"


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """None for weights that are not quantized. What is not said is taken as most checkpoints have it."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = config.get(key)
        if isinstance(settings, Mapping) and settings:
            return None if _of_the_cache_alone(settings) else _quantization(settings)
    return None


def _of_the_cache_alone(settings: Mapping[str, Any]) -> bool:
    """Weights are floats, and keys and values have scales."""
    no_groups = settings.get("config_groups") == {} and bool(settings.get("kv_cache_scheme"))
    said = settings.get("quantization")
    said = said if isinstance(said, Mapping) else settings
    return no_groups or (said.get("quant_algo", "") is None and bool(said.get("kv_cache_quant_algo")))


def _quantization(settings: Mapping[str, Any]) -> Quantization:
    method = str(settings.get("quant_method") or "MLX")[:40]
    values = Checked({**settings, **_first_group(settings)}, "quantization_config")
    if method in ("fp8", "fbgemm_fp8"):
        return Quantization(method, 8 + 32 / _GROUP**2, _GROUP)
    if method == "mxfp4":
        return Quantization(method, 4 + 8 / 32, 32)
    if method.startswith("modelopt"):
        said = values.section("quantization").values or settings
        is_float4 = "fp4" in str(said.get("quant_algo")).lower()
        return Quantization(method, _NVFP4_BITS, 16) if is_float4 else Quantization(method, 8, 1)
    if method == "quark":
        weight = values.section("global_quant_config").section("weight")
        return (
            Quantization(method, 4 + 8 / 32, 32) if weight.values.get("dtype") == "fp4" else Quantization(method, 8, 1)
        )
    if method == "bitsandbytes":
        return Quantization(method, _NF4_BITS if settings.get("load_in_4bit") else _LLM_INT8, 1)
    bits = values.integer("bits", values.integer("num_bits", 4, most=16), most=16)
    group = values.values.get("group_size")
    size = group if type(group) is int and group > 0 else 0  # -1, and none, is a scale for each row
    if bits == 4 and values.values.get("type") == "float":  # compressed-tensors' NVFP4 and MXFP4
        return Quantization(method, 4 + 8 / size if size else 4, size or 1)
    zeros = bits if method in _METHODS_WITH_ZEROS else _SCALE_BITS if method == "MLX" else 0
    return Quantization(method, bits + ((_SCALE_BITS + zeros) / size if size else 0), size or 1)


def _first_group(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of compressed-tensors, which describe groups of layers."""
    groups = settings.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else None
    weights = first.get("weights") if isinstance(first, Mapping) else None
    return weights if isinstance(weights, Mapping) else {}


_ROUNDED: dict[Target, tuple[float, int]] = {
    "fp8": (8, 1),
    "int8": (8 + _SCALE_BITS / _GROUP, _GROUP),
    "int4": (4 + (_SCALE_BITS + 4) / _GROUP, _GROUP),
}
"""Bits of a number with its share of scales and zeros, and what cannot be split."""


def in_codes(target: Target, float_bytes: float, refusal: str | None) -> Held:
    """Rounded while they are loaded, embedding and head left as they are."""
    bits, group = _ROUNDED[target]
    return Held(target, bits / 8, float_bytes, group, refusal)
