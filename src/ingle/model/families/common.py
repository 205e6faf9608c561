"""Reads a normalized Hugging Face config (`ingle.weights.hf_config`) into a `DecoderConfig`, checking as it goes."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

from ingle.errors import ModelError
from ingle.kernels.options import Activation
from ingle.model.architecture import DecoderConfig, RopeConfig, RopeType

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_MAX_DIM = 1 << 31
_CONTEXT = 2048


def base_config(config: Mapping[str, Any], *, family: str, **choices: Any) -> DecoderConfig:
    """The fields that every family names alike. Raises `ModelError` for what is missing, absurd or not supported."""
    if "activation" not in choices:
        choices["activation"] = activation(config)
    num_heads = integer(config, "num_attention_heads")
    num_kv_heads = integer(config, "num_key_value_heads", num_heads)
    hidden_size = integer(config, "hidden_size")
    head_dim = integer(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} attention heads do not share {num_kv_heads} KV heads evenly")
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim {head_dim} is odd, rotary embedding needs pairs")
    return DecoderConfig(
        family=family,
        vocab_size=integer(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=integer(config, "intermediate_size"),
        num_layers=integer(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope=rope_config(config, head_dim),
        max_position_embeddings=integer(config, "max_position_embeddings", _CONTEXT),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        **choices,
    )


def rope_config(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    """`rope_theta` and `rope_scaling`. An unknown scaling is an error: guessing gives text that is subtly wrong."""
    scaling = config.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", "default")
    if rope_type not in get_args(RopeType):
        raise ModelError(f"rope scaling {rope_type!r} is not supported; known are {', '.join(get_args(RopeType))}")
    rotary_dim = int(head_dim * number(config, "partial_rotary_factor", 1.0))
    trained = integer(config, "max_position_embeddings", _CONTEXT)
    original = int(number(scaling, "original_max_position_embeddings", trained))
    short, long = (_factors(scaling, key) for key in ("short_factor", "long_factor"))
    factors = _factors(scaling, "factors") or short
    for given in (factors, long):  # of the heads that rotate, which the family alone knows
        if given and len(given) != rotary_dim // 2:
            raise ModelError(f"rope scaling {rope_type}: {len(given)} factors for {rotary_dim // 2} frequencies")
    return RopeConfig(
        theta=number(config, "rope_theta", 10000.0),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=original,
        type=rope_type,
        factor=number(scaling, "factor", trained / original if rope_type == "longrope" else 1.0),
        low_freq_factor=number(scaling, "low_freq_factor", 1.0),
        high_freq_factor=number(scaling, "high_freq_factor", 4.0),
        beta_fast=number(scaling, "beta_fast", 32.0),
        beta_slow=number(scaling, "beta_slow", 1.0),
        attention_factor=optional_number(scaling, "attention_factor"),
        attn_factor=number(scaling, "attn_factor", 1.0),
        extrapolation_factor=number(scaling, "extrapolation_factor", 1.0),
        mscale=_weight(scaling, "mscale"),
        mscale_all_dim=_weight(scaling, "mscale_all_dim"),
        truncate=bool(scaling.get("truncate", True)),
        factors=factors,
        long_factors=long,
    )


def _weight(scaling: Mapping[str, Any], key: str) -> float | None:
    """A positive number; 0 is as good as none, and some files say so."""
    return None if scaling.get(key) == 0 else optional_number(scaling, key)


def _factors(scaling: Mapping[str, Any], key: str) -> tuple[float, ...]:
    return tuple(float(factor) for factor in scaling.get(key, ()))


def integer(config: Mapping[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """A whole number of the config, at least `least`."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MAX_DIM:
        raise ModelError(f"config.json: {name} is {reprlib.repr(value)}, expected a whole number of at least {least}")
    return value


def number(config: Mapping[str, Any], name: str, default: float) -> float:
    """A positive number of the config."""
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"config.json: {name} is {reprlib.repr(value)}, expected a positive number")
    return float(value)


def optional_integer(config: Mapping[str, Any], name: str) -> int | None:
    return None if config.get(name) is None else integer(config, name)


def optional_number(config: Mapping[str, Any], name: str) -> float | None:
    return None if config.get(name) is None else number(config, name, 1.0)


def knows_activation(config: Mapping[str, Any]) -> bool:
    """Whether `activation` takes the config's, or has a word to say about it."""
    kind = config.get("model_type", "")
    if kind == "gemma":  # whose first files name one and mean another
        return True
    name = config.get("hidden_activation" if kind.startswith("gemma") else "hidden_act", "silu")
    return not isinstance(name, str) or name in _ACTIVATIONS


def activation(config: Mapping[str, Any], key: str = "hidden_act") -> Activation:
    """The gated MLP's activation function."""
    name = config.get(key, "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise ModelError(f"config.json: {key} {reprlib.repr(name)} is not supported; known are {known}")
    return _ACTIVATIONS[name]


def layer_windows(
    config: Mapping[str, Any], window: int | None, slides: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """The window of each layer: of those that `layer_types` lists as sliding, or, without such a list, that slide."""
    types = config.get("layer_types")
    num_layers = integer(config, "num_hidden_layers")
    if types is None:
        types = [_SLIDING if slides(layer) else _FULL for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {_SLIDING, _FULL}:
        raise ModelError(
            f"config.json: layer_types is {reprlib.repr(types)}, expected {_SLIDING} or {_FULL} {num_layers} times"
        )
    return tuple(window if kind == _SLIDING else None for kind in types) if window is not None else ()
