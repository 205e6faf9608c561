"""Which family runs a checkpoint: by the config's `model_type`, never by a name."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig
from ingle.model.families import deepseek, gemma, gpt_oss, llama, moe, phi3, qwen
from ingle.model.families.common import knows_activation
from ingle.weights.checked import Checked
from ingle.weights.quantized.config import read_quantization
from ingle.weights.quantized.scheme import Quantization

FAMILIES: dict[str, Callable[[Checked], DecoderConfig]] = {
    "deepseek_v2": deepseek.deepseek_v2,
    "deepseek_v3": deepseek.deepseek_v3,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
    "gemma3_text": gemma.gemma3,
    "gpt_oss": gpt_oss.gpt_oss,
    "llama": llama.llama,
    "mistral": llama.mistral,
    "mixtral": moe.mixtral,
    "phi3": phi3.phi3,
    "qwen": qwen.qwen,
    "qwen2": llama.qwen2,
    "qwen2_moe": moe.qwen2_moe,
    "qwen3": llama.qwen3,
    "qwen3_moe": moe.qwen3_moe,
}

_IN_TRANSFORMERS = FAMILIES.keys() - {"qwen"}


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether one of ingle's own families runs it: where it differs in the one choice that transformers takes from the
    config and ingle does not, its activation, transformers' code does."""
    kind = config.get("model_type")
    return kind in FAMILIES and (kind not in _IN_TRANSFORMERS or knows_activation(config))


def check_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of the folder at `path`, with this configuration, are quantized; None where they are not.

    Raises `ModelError` where ingle does not read them so.
    """
    quantization = read_quantization(path, config)
    if quantization is not None and not is_native(config):
        raise ModelError(
            f"{path}: its weights are quantized ({quantization.name}), and ingle reads them so of its own families "
            f"alone: model_type {reprlib.repr(config.get('model_type'))} is none",
            alternative="give the model's unquantized folder",
        )
    return quantization


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a normalized config describes. Raises `ModelError` when no family knows it."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"model_type {model_type!r} is not supported; ingle runs {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type](Checked(config, "config.json"))
