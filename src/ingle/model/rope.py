"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways to stretch it over longer contexts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.model.architecture import DecoderConfig, RopeConfig


def cos_sin_tables(config: DecoderConfig, num_positions: int, xp: Any) -> tuple[Any, ...]:
    """`cos_sin_table` of each of the model's rotations."""
    return tuple(cos_sin_table(rope, num_positions, xp) for rope in config.ropes)


def cos_sin_table(rope: RopeConfig, num_positions: int, xp: Any) -> Any:
    """cos and sin of every position's angles: float32 [num_positions, rotary_dim], cos in the first half of a row.

    `xp` is the module whose array this is, torch or numpy, and so are the powers in it: one unit in a frequency's last
    place moves the angle of a token far on, and transformers has torch's.

    Where a scaling depends on the length of a sequence, the longest one that is served decides for all: keys in the
    cache stay valid as a sequence grows, and prefixes can be shared. `length_notice` says so.
    """
    inv_freq, scale = _frequencies(rope, num_positions, xp)
    angles = xp.arange(num_positions, dtype=xp.float32)[:, None] * inv_freq
    return xp.concatenate((xp.cos(angles) * scale, xp.sin(angles) * scale), axis=-1)


def query_factors(config: DecoderConfig, num_positions: int) -> npt.NDArray[np.float32] | None:
    """What rotated queries are multiplied by, by position: float32 [num_positions]; None where all are 1.

    log(position + 1) / log(n) beyond the length n, so that attention over more keys stays as sharp
    (https://arxiv.org/abs/2202.12172).
    """
    length = config.logn_length
    if length is None or num_positions <= length:
        return None
    lengths = np.arange(1, num_positions + 1, dtype=np.float64)
    return (np.log(lengths) / math.log(length)).clip(min=1.0).astype(np.float32)


def length_notice(rope: RopeConfig, num_positions: int) -> str | None:
    """What to tell people about a scaling that the served length has switched on; None if it has not."""
    original = rope.original_max_position_embeddings
    if rope.type not in ("dynamic", "longrope", "ntk_steps") or num_positions <= original:
        return None
    return (
        f"rope scaling {rope.type} is set for sequences of up to {num_positions} tokens, shorter ones included; "
        f"--max-model-len {original} or less sets it for short ones"
    )


def _frequencies(rope: RopeConfig, num_positions: int, xp: Any) -> tuple[Any, float]:
    """Inverse frequencies, float32 [rotary_dim / 2], and the factor on cos and sin."""
    theta, original = rope.theta, rope.original_max_position_embeddings
    if rope.type in ("dynamic", "ntk_steps") and num_positions > original:
        theta *= _ntk_stretch(rope, num_positions) ** (rope.rotary_dim / (rope.rotary_dim - 2))
    powers = theta ** (xp.arange(0, rope.rotary_dim, 2, dtype=xp.float32) / rope.rotary_dim)
    inv_freq = 1.0 / powers
    if rope.type == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.type == "factors":
        return inv_freq / xp.asarray(rope.factors, dtype=xp.float32), 1.0
    if rope.type == "longrope":
        factors = xp.asarray(rope.long_factors if num_positions > original else rope.factors, dtype=xp.float32)
        return 1.0 / (factors * powers), _longrope_temperature(rope)
    if rope.type == "llama3":
        return _llama3(rope, inv_freq, xp), 1.0
    if rope.type == "yarn":
        return _yarn(rope, inv_freq, xp)
    return inv_freq, 1.0


def _ntk_stretch(rope: RopeConfig, num_positions: int) -> float:
    """Dynamic NTK: what the base is multiplied by, before its exponent. Qwen 1 doubles the length it is meant for."""
    ratio = num_positions / rope.original_max_position_embeddings
    if rope.type == "ntk_steps":
        return 2.0 ** (math.ceil(math.log2(ratio)) + 1) - 1
    return rope.factor * ratio - (rope.factor - 1)


def _longrope_temperature(rope: RopeConfig) -> float:
    """LongRoPE (https://arxiv.org/abs/2402.13753): for all lengths the same."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position_embeddings))


def _llama3(rope: RopeConfig, inv_freq: Any, xp: Any) -> Any:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = xp.where(wavelength > original / rope.low_freq_factor, inv_freq / rope.factor, mixed)
    return xp.where(wavelength < original / rope.high_freq_factor, inv_freq, scaled)


def _yarn(rope: RopeConfig, inv_freq: Any, xp: Any) -> tuple[Any, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp from interpolated to kept frequencies, and a temperature."""
    original = rope.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return rope.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (xp.arange(rope.rotary_dim // 2, dtype=xp.float32) - low) / max(high - low, 0.001)
    kept = (1 - ramp.clip(0, 1)) * rope.extrapolation_factor
    return inv_freq / rope.factor * (1 - kept) + inv_freq * kept, _yarn_temperature(rope)


def _yarn_temperature(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim) * rope.attn_factor
    return mscale(1.0) * rope.attn_factor
