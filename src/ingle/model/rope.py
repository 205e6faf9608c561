"""Rotary position embedding (https://arxiv.org/abs/2104.09864) and the ways to stretch it over longer contexts."""

from __future__ import annotations

import math

import torch

from ingle.model.architecture import DecoderConfig, RopeConfig


def cos_sin_tables(config: DecoderConfig, num_positions: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`cos_sin_table` of each of the model's rotations."""
    return tuple(cos_sin_table(rope, num_positions, config.max_position_embeddings).to(device) for rope in config.ropes)


def cos_sin_table(rope: RopeConfig, num_positions: int, max_position_embeddings: int) -> torch.Tensor:
    """cos and sin of every position's angles: float32 [num_positions, rotary_dim], cos in the first half of a row."""
    inv_freq, scale = _frequencies(rope, num_positions, max_position_embeddings)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inv_freq[None, :]
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1)


def _frequencies(rope: RopeConfig, num_positions: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies, float32 [rotary_dim / 2], and the factor on cos and sin."""
    theta = rope.theta
    if rope.type == "dynamic" and num_positions > max_positions:
        # "Dynamic NTK": one base for the longest context this engine serves, so that cached keys stay valid.
        stretch = rope.factor * num_positions / max_positions - (rope.factor - 1)
        theta *= stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    inv_freq = 1.0 / (theta**exponents)
    if rope.type == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.type == "factors":
        return inv_freq / torch.tensor(rope.factors), 1.0
    if rope.type == "llama3":
        return _llama3(rope, inv_freq, max_positions), 1.0
    if rope.type == "yarn":
        return _yarn(rope, inv_freq, max_positions)
    return inv_freq, 1.0


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor, max_positions: int) -> torch.Tensor:
    """Llama 3.1: long wavelengths divided by the factor, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings or max_positions
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    mixed = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / rope.low_freq_factor, inv_freq / rope.factor, mixed)
    return torch.where(wavelength < original / rope.high_freq_factor, inv_freq, scaled)


def _yarn(rope: RopeConfig, inv_freq: torch.Tensor, max_positions: int) -> tuple[torch.Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): a ramp from interpolated to kept frequencies, and a temperature."""
    original = rope.original_max_position_embeddings or max_positions

    def dimension_of(rotations: float) -> float:
        return rope.rotary_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (torch.arange(rope.rotary_dim // 2).float() - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return inv_freq / rope.factor * (1 - kept) + inv_freq * kept, _yarn_temperature(rope)


def _yarn_temperature(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
