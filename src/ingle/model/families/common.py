"""Reads a normalized Hugging Face config (`ingle.weights.hf_config`) into a `DecoderConfig`, checking as it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from ingle.kernels.options import Activation
from ingle.model.architecture import DecoderConfig, RopeConfig, RopeType
from ingle.weights.checked import Checked

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_CONTEXT = 2048


def base_config(
    config: Checked, family: str, *, activation: Activation | None = None, head_dim: int | None = None
) -> DecoderConfig:
    """The fields that every family names alike; `activation` and `head_dim` in place of the config's.

    Raises `ModelError` for what is missing, absurd or not supported.
    """
    hidden_size, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden_size // num_heads) if head_dim is None else head_dim
    if head_dim % 2:
        config.fail(f"head_dim {head_dim} is odd, and rotary embedding needs pairs")
    return DecoderConfig(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=rope_config(config, head_dim),
        max_position_embeddings=config.integer("max_position_embeddings", _CONTEXT),
        tied_embeddings=config.flag("tie_word_embeddings"),
        activation=activation or gated_activation(config),
    )


def rope_config(config: Checked, head_dim: int) -> RopeConfig:
    """`rope_theta` and `rope_scaling`. An unknown scaling is an error: guessing gives text that is subtly wrong."""
    scaling = config.section("rope_scaling", "rope ")
    rope_type = scaling.choice("rope_type", {kind: kind for kind in get_args(RopeType)}, "default")
    rotary_dim = int(head_dim * config.number("partial_rotary_factor", 1.0))
    trained = config.integer("max_position_embeddings", _CONTEXT)
    original = int(scaling.number("original_max_position_embeddings", trained))
    short, long = (_factors(scaling, key) for key in ("short_factor", "long_factor"))
    factors = _factors(scaling, "factors") or short
    for given in (factors, long):  # of the heads that rotate, which the family alone knows
        if given and len(given) != rotary_dim // 2:
            scaling.fail(f"rope scaling {rope_type}: {len(given)} factors for {rotary_dim // 2} frequencies")
    return RopeConfig(
        theta=config.number("rope_theta", 10000.0),
        rotary_dim=rotary_dim,
        original_max_position_embeddings=original,
        type=rope_type,
        factor=scaling.number("factor", trained / original if rope_type == "longrope" else 1.0),
        low_freq_factor=scaling.number("low_freq_factor", 1.0),
        high_freq_factor=scaling.number("high_freq_factor", 4.0),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        attention_factor=scaling.optional_number("attention_factor"),
        attn_factor=scaling.number("attn_factor", 1.0),
        extrapolation_factor=scaling.number("extrapolation_factor", 1.0),
        mscale=_weight(scaling, "mscale"),
        mscale_all_dim=_weight(scaling, "mscale_all_dim"),
        truncate=scaling.flag("truncate", True),
        factors=factors,
        long_factors=long,
    )


def _weight(scaling: Checked, key: str) -> float | None:
    """A positive number; 0 is as good as none, and some files say so."""
    return None if scaling.values.get(key) == 0 else scaling.optional_number(key)


def _factors(scaling: Checked, key: str) -> tuple[float, ...]:
    return tuple(float(factor) for factor in scaling.values.get(key, ()))


def knows_activation(config: Mapping[str, Any]) -> bool:
    """Whether `gated_activation` takes the config's, or has a word to say about it."""
    kind = config.get("model_type", "")
    if kind == "gemma":  # whose first files name one and mean another
        return True
    name = config.get("hidden_activation" if kind.startswith("gemma") else "hidden_act", "silu")
    return not isinstance(name, str) or name in _ACTIVATIONS


def gated_activation(config: Checked, key: str = "hidden_act") -> Activation:
    """The gated MLP's activation function."""
    return config.choice(key, _ACTIVATIONS, "silu")


def layer_windows(
    config: Checked, window: int | None, slides: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """The window of each layer: of those that `layer_types` lists as sliding, or, without such a list, that slide."""
    num_layers = config.integer("num_hidden_layers")
    types = config.items("layer_types", str, "names")
    if "layer_types" not in config:
        types = [_SLIDING if slides(layer) else _FULL for layer in range(num_layers)]
    if len(types) != num_layers or not set(types) <= {_SLIDING, _FULL}:
        config.refuse("layer_types", f"not {_SLIDING} or {_FULL} {num_layers} times")
    return tuple(window if kind == _SLIDING else None for kind in types) if window is not None else ()
