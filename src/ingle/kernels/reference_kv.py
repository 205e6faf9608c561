"""Keys and values in codes, in plain PyTorch: what runs on a CPU, and what other kernels are tested against.

A head's key is codes times one scale, and so is its value. The scale is the largest of its numbers over the largest
code, so it depends on this token alone: whatever comes after it, beside it or in another step leaves its codes as they
are, and a prompt read in chunks has the same cache as one read at once.

Attention does not decode them number by number: a score is the product with the codes times the key's scale, and a
weight is multiplied by the value's scale before it meets the codes.
"""

from __future__ import annotations

import torch

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""Of each type of codes, the largest number."""


def encode(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [.., D] to codes of its shape and float32 scales [..]. Rows that are not finite get an infinite scale, and so
    come back as NaN."""
    wide, largest = x.float(), LARGEST[dtype]
    most = wide.abs().amax(-1)
    most = torch.where(most.isfinite(), most, float("inf"))
    scales = most / largest
    factors = torch.where((most > 0) & most.isfinite(), largest / most, 0.0)
    scaled = (wide * factors[..., None]).nan_to_num(0.0).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scales


def store(
    k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, kv_scales: torch.Tensor | None, kv_places: torch.Tensor
) -> None:
    """Writes keys and values [T, Hkv, D] to their places, encoded where the cache has scales."""
    page_size = kv_cache.shape[2]
    pages, offsets = kv_places // page_size, kv_places % page_size
    if kv_scales is None:
        kv_cache[0][pages, offsets] = k.to(kv_cache.dtype)
        kv_cache[1][pages, offsets] = v.to(kv_cache.dtype)
        return
    for side, x in enumerate((k, v)):
        codes, scales = encode(x, kv_cache.dtype)
        kv_cache[side].view(torch.uint8)[pages, offsets] = interleaved(codes).view(torch.uint8)
        kv_scales[side][pages, :, offsets] = scales


def read(
    kv_cache: torch.Tensor, kv_scales: torch.Tensor | None, pages: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Of pages [..] keys and values [2, .., page_size, Hkv, D]: as they are held, or decoded into a type."""
    if kv_scales is None:
        return kv_cache[:, pages]
    codes = kv_cache.view(torch.uint8)[:, pages].view(kv_cache.dtype).float()
    return (in_order(codes) * kv_scales[:, pages].transpose(-1, -2)[..., None]).to(dtype)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    """Numbers i and i + D / 2 of x [.., D] side by side, as `ingle.kernels.batch.KvCache` has codes."""
    return x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2).transpose(-1, -2).flatten(-2)


def in_order(x: torch.Tensor) -> torch.Tensor:
    """What `interleaved` does, undone."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).transpose(-1, -2).flatten(-2)
