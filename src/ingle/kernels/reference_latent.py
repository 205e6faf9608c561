"""Attention to cached latents in plain PyTorch: what runs on a CPU, and what other kernels are tested against.

Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1) projects a token down to one
latent c [R], from which the keys and values of every head come, and to one key [P] that rotates and that all heads
share. With W_UK [N, R] and W_UV [V, R] a head's matrices up from the latent, its score for a cached token is

    q_nope . (W_UK c) + q_rope . k_rope  =  (W_UK^T q_nope) . c + q_rope . k_rope

and what it gives is W_UV (sum of weight * c). So neither keys nor values are ever made: queries are multiplied by W_UK
before attention ("absorbed"), its result by W_UV after it, and in between all heads attend to the same R + P numbers of
a token, which are all that is cached: attention with a single key head, whose value is the first part of the key.

Shapes: T tokens in a step, H query heads, R the latent's size (kv_lora_rank), P that of the rotated key
(qk_rope_head_dim). A layer's cache is [num_pages, page_size, R + P], of any float type: the latent after its norm, then
the rotated key. Its last dimension is contiguous; how pages lie in memory is open.
"""

from __future__ import annotations

import torch

from ingle.kernels.batch import Batch

_QUERIES = 64
"""Tokens of a prompt whose scores are held at once: H * _QUERIES * keys float32 numbers."""


def store_latent(
    down: torch.Tensor,
    q_rope: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    kv_places: torch.Tensor,
    *,
    interleaved: bool,
) -> torch.Tensor:
    """Norms the latents and rotates the shared keys in down [T, R + P], and writes both to the places kv_places.

    Returns the rotated q_rope [T, H, P], contiguous; given, it may be a view whose last dimension is contiguous.

    norm: [R], the weight of the latents' RMSNorm, with the meaning and the rounding of `reference.rms_norm`.
    cos_sin: float32 [T, P], the cosines of P / 2 angles, then their sines. Angle i turns the numbers i and i + P / 2
    of a head, or, `interleaved`, the numbers 2 i and 2 i + 1, which then lie at i and i + P / 2 of what is returned
    and cached: queries and keys alike, so their products are the same.
    kv_places: int64 [T], page * page_size + offset.
    """
    rank, page_size = len(norm), cache.shape[1]
    latent = down[:, :rank].float()
    normed = (latent * torch.rsqrt(latent.square().mean(-1, keepdim=True) + eps)).to(norm.dtype) * norm
    k_rope = _rotated(down[:, None, rank:], cos_sin, interleaved)[:, 0]
    stored = torch.cat((normed.to(cache.dtype), k_rope.to(cache.dtype)), dim=-1)
    cache[kv_places // page_size, kv_places % page_size] = stored
    return _rotated(q_rope, cos_sin, interleaved)


def _rotated(x: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, H, P] to [T, H, P]."""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    cos, sin = cos_sin[:, None].to(x.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def latent_attention(
    q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, batch: Batch, scale: float
) -> torch.Tensor:
    """Causal attention of each token to the cached latents of its own sequence, its own included.

    q_latent [T, H, R] and q_rope [T, H, P], both contiguous and of one type: queries times W_UK, and as `store_latent`
    returns them. Returns [T, H, R]: the mean latent of each head by softmax(scale * scores), to be multiplied by W_UV.

    Scores and their softmax are float32; weights are rounded to the type of the queries before they are multiplied.
    Rows of a padded step that belong to no sequence may come out as anything.
    """
    out, n = torch.empty_like(q_latent), batch.num_decodes
    q = torch.cat((q_latent, q_rope), dim=-1)
    if n:
        page_tables, lengths = batch.page_tables[batch.inputs.slots[:n]], batch.inputs.kv_lengths[:n]
        out[:n] = _attend_decodes(q[:n], cache, page_tables, lengths, out.shape[-1], scale)
    row = n
    for chunk in batch.chunks[n:]:
        end = chunk.start + chunk.count
        pages = batch.page_tables[chunk.slot, : -(-end // cache.shape[1])]
        keys = cache[pages].flatten(0, 1)[:end].to(q.dtype)
        for first in range(0, chunk.count, _QUERIES):
            rows = slice(row + first, row + min(first + _QUERIES, chunk.count))
            out[rows] = _attend_chunk(q[rows], keys, chunk.start + first, out.shape[-1], scale)
        row += chunk.count
    return out


def _attend_decodes(
    q: torch.Tensor, cache: torch.Tensor, page_tables: torch.Tensor, lengths: torch.Tensor, rank: int, scale: float
) -> torch.Tensor:
    """One token a sequence, all sequences at once, padded to the longest: q [B, H, R + P] to [B, H, R]."""
    page_size = cache.shape[1]
    num_pages = -(-int(lengths.max()) // page_size)
    keys = cache[page_tables[:, :num_pages]].flatten(1, 2).to(q.dtype)  # [B, keys, R + P]
    seen = torch.arange(num_pages * page_size, device=q.device) < lengths[:, None]
    return _attend(q, keys, seen[:, None], rank, scale)


def _attend_chunk(q: torch.Tensor, keys: torch.Tensor, start: int, rank: int, scale: float) -> torch.Tensor:
    """Tokens [start, start + n) of a sequence with the keys [0, start + n) or more: q [n, H, R + P] to [n, H, R]."""
    num_tokens, num_heads, _ = q.shape
    keys = keys[: start + num_tokens]
    seen = torch.ones(num_tokens, len(keys), dtype=torch.bool, device=q.device).tril(start)
    rows = q.transpose(0, 1)  # [H, n, R + P]
    return _attend(rows, keys.expand(num_heads, -1, -1), seen, rank, scale).transpose(0, 1)


def _attend(q: torch.Tensor, keys: torch.Tensor, seen: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Attention of q [G, n, R + P] to keys [G, m, R + P], to [G, n, R]. seen: bool, broadcast to [G, n, m]."""
    scores = (q @ keys.transpose(1, 2)).float() * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(q.dtype)
    return weights @ keys[..., :rank]
