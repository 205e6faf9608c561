"""Every operator of a decoder step in plain PyTorch: what runs on a CPU, and what GPU kernels are tested against.

Shapes: T tokens in a step, B sequences, Hq query heads, Hkv key/value heads, D head dimension, E hidden size.
A layer's KV cache is [2, num_pages, page_size, Hkv, D]: keys, then values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ingle.engine.batch import Batch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, computed in float32 (https://arxiv.org/abs/1910.07467)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual, and that sum: both [T, E]."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for [T, 2 * I] with the gate in the first half: [T, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first R dimensions of each head of x [T, H, D] by the angles of cos_sin [T, R]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half].to(x.dtype), cos_sin[:, None, half:].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def store_kv(kv_cache: torch.Tensor, kv_slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Writes k and v [T, Hkv, D] to the places kv_slots [T] of a layer's cache."""
    flat = kv_cache.view(2, -1, *kv_cache.shape[-2:])
    flat[0].index_copy_(0, kv_slots, k)
    flat[1].index_copy_(0, kv_slots, v)


def paged_attention(q: torch.Tensor, kv_cache: torch.Tensor, batch: Batch, scale: float) -> torch.Tensor:
    """Causal attention of each token to the cached keys of its own sequence: q [T, Hq, D] to [T, Hq, D]."""
    out = torch.empty_like(q)
    n = batch.num_decodes
    if n:
        out[:n] = _attend_decodes(q[:n], kv_cache, batch.page_tables[:n], batch.kv_lengths[:n], scale)
    row = n
    for index in range(n, len(batch.chunks)):
        chunk = batch.chunks[index]
        rows = slice(row, row + chunk.count)
        out[rows] = _attend_chunk(q[rows], kv_cache, batch.page_tables[index], chunk.start, scale)
        row += chunk.count
    return out


def _attend_decodes(
    q: torch.Tensor, kv_cache: torch.Tensor, page_tables: torch.Tensor, kv_lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """One token a sequence, all sequences at once, padded to the longest: q [B, Hq, D] to [B, Hq, D]."""
    num_seqs, num_heads, head_dim = q.shape
    num_kv_heads = kv_cache.shape[-2]
    # Only as wide as the longest decoding sequence, which may be shorter than a chunk in the same step.
    num_pages = -(-int(kv_lengths.max()) // kv_cache.shape[2])
    k, v = kv_cache[:, page_tables[:, :num_pages]].flatten(2, 3).transpose(2, 3)  # [B, Hkv, P * page_size, D]
    mask = torch.arange(k.shape[2], device=q.device) < kv_lengths[:, None]
    grouped = q.view(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask[:, None, None, :], scale=scale).view_as(q)


def _attend_chunk(
    q: torch.Tensor, kv_cache: torch.Tensor, page_table: torch.Tensor, start: int, scale: float
) -> torch.Tensor:
    """Tokens [start, start + n) of one sequence: q [n, Hq, D] to [n, Hq, D]."""
    end = start + q.shape[0]
    num_pages = -(-end // kv_cache.shape[2])
    k, v = kv_cache[:, page_table[:num_pages]].flatten(1, 2)[:, :end].transpose(1, 2)[:, None]  # [1, Hkv, end, D]
    mask = None
    if start:
        mask = torch.ones(q.shape[0], end, dtype=torch.bool, device=q.device).tril(start)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=start == 0, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
