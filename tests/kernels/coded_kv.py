"""Caches of codes for tests: what is in them, and what comes of what was put in."""

from __future__ import annotations

import torch

from ingle.kernels import reference_kv
from ingle.kernels.batch import KvCache
from ingle.kv import KvGroup, KvSpec

KINDS = ("int8", "fp8_e4m3", "fp8_e5m2")
ERRORS = {"int8": 0.5 / 127, "fp8_e4m3": 1 / 16, "fp8_e5m2": 1 / 8}
"""Largest of a number, over the largest of its row (int8) or over itself and as much less (fp8)."""


def empty_cache(
    kind: str, num_pages: int, page_size: int, heads: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's codes and scales, zeros."""
    spec = KvSpec((KvGroup((0,), None),), 2, heads, dim, kind)
    raw = torch.zeros(1, 2, num_pages, spec.side_bytes(page_size), dtype=torch.uint8, device=device)
    cache = KvCache.over(spec, raw, page_size)
    assert cache.scales is not None
    return cache.pages[0], cache.scales[0]


def filled_cache(
    kind: str, num_pages: int, page_size: int, heads: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """With random keys, some of which are a hundred times as large as others, and values, a thousand times."""
    cache, scales = empty_cache(kind, num_pages, page_size, heads, dim, device)
    count = num_pages * page_size
    sizes = torch.logspace(-2, 1, 7, device=device)[torch.randint(7, (2, count, heads, 1), device=device)]
    k, v = torch.randn(2, count, heads, dim, device=device) * torch.stack((sizes[0].clamp(max=1), sizes[1]))
    reference_kv.store(k, v, cache, scales, torch.arange(count, device=device))
    return cache, scales


def decoded(cache: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes stand for, float32 [2, pages, page_size, heads, dim]."""
    return reference_kv.read(cache, scales, torch.arange(cache.shape[1], device=cache.device), torch.float32)
