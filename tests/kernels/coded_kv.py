"""Caches of codes for tests: what is in them, and what comes of what was put in."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
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


def in_order_of_the_cpu(cache: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes stand for that the CPU's kernels wrote, which have a head's numbers as they come."""
    return cache.float() * scales.transpose(-1, -2)[..., None]


def needle(
    length: int, heads: int, kv_heads: int, dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query [1, heads, dim], and keys and values [length, kv_heads, dim], random but for one key of each key head.

    At a scale of 1 / sqrt(dim) every query head gives that key 1 / (1 + e^-4.5) of its weight. The key heads have it at
    other places.
    """
    k, v = torch.randn(2, length, kv_heads, dim, device=device)
    q = torch.randn(1, kv_heads, 1, dim, device=device).expand(-1, -1, heads // kv_heads, -1)
    for head in range(kv_heads):
        one = q[0, head, 0]
        k[length * (head + 1) // (kv_heads + 2), head] = one * ((np.log(length) + 5) * dim**0.5 / one.square().sum())
    return q.reshape(1, heads, dim), k, v


def exact_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of one token to all keys, in float64 at a scale of 1 / sqrt(dim)."""
    group = q.shape[1] // k.shape[1]
    out = [
        (q[0, head].double() @ k[:, head // group].double().T / q.shape[-1] ** 0.5).softmax(-1)
        @ v[:, head // group].double()
        for head in range(q.shape[1])
    ]
    return torch.stack(out)[None]


FOUND_WITHIN = {"int8": 0.02, "fp8_e4m3": 0.08, "fp8_e5m2": 0.16}
"""Of the norm of what attention gives over the keys and values before they were encoded: that of a value's codes."""


def check_needle(attend: Callable[..., torch.Tensor], kind: str, length: int, dtype: torch.dtype, off: float) -> None:
    """One key among `length` is found, and means of as many values are right.

    `attend` is given q [1, heads, dim], cache, scales, and the length; pages are taken in order from page 1 on.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads, kv_heads, dim, page_size = 4, 2, 64, 16
    q, k, v = needle(length, heads, kv_heads, dim, device)
    q = q.to(dtype)
    cache, scales = empty_cache(kind, length // page_size + 1, page_size, kv_heads, dim, device)
    places = page_size + torch.arange(length, device=device)
    for keys, values in ((k, v), (torch.zeros_like(k), 1 + v)):
        reference_kv.store(keys, values, cache, scales, places)
        held = decoded(cache, scales).flatten(1, 2)[:, page_size:]
        out, exact = attend(q, cache, scales, length).double(), exact_attention(q, keys, values)
        by_codes = exact_attention(q, *held)
        assert (out - by_codes).norm() / by_codes.norm() < off
        assert (out - exact).norm() / exact.norm() < FOUND_WITHIN[kind]
        if keys is k:
            for head in range(heads):
                of_one = v[length * (head // 2 + 1) // (kv_heads + 2), head // 2].double()
                assert torch.nn.functional.cosine_similarity(out[0, head], of_one, dim=0) > 0.98
