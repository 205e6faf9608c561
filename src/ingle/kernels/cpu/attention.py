"""`reference.paged_attention` on a CPU by the compiled kernels, in models that are transformers' code otherwise.

With caches of hundreds of tokens it takes a tenth of the time of PyTorch's operators, or less.
"""

from __future__ import annotations

from ctypes import byref

import torch

from ingle.kernels.batch import CODE_TYPES, Batch
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import KV_TYPES, Attention
from ingle.kernels.options import AttentionOptions
from ingle.kernels.reference_kv import in_order, interleaved

_KV_TYPES = {CODE_TYPES[name] if name in CODE_TYPES else getattr(torch, name): n for name, n in KV_TYPES.items()}


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: Batch,
    options: AttentionOptions,
    kv_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    *,
    as_integers: bool = False,
) -> torch.Tensor:
    """q float32, kv_cache of any type. `as_integers`: prompts of 16-bit caches are, where that is faster.

    The kernels take numbers in the order in which they come, and codes lie in another: so do the queries then.
    """
    page_size, num_kv_heads, head_dim = kv_cache.shape[2:]
    if kv_scales is not None:
        q = interleaved(q)
    keys, values = _keys_and_values(kv_cache)
    inputs, out = batch.inputs, torch.empty(q.shape)
    library.get().ingle_attention(
        byref(
            Attention(
                q=q.data_ptr(),
                keys=keys,
                values=values,
                page_tables=batch.page_tables.data_ptr(),
                slots=inputs.slots.data_ptr(),
                kv_lengths=inputs.kv_lengths.data_ptr(),
                query_starts=inputs.query_starts.data_ptr(),
                out=out.data_ptr(),
                num_seqs=len(inputs.slots),
                num_heads=q.shape[1],
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                page_size=page_size,
                pages_per_slot=batch.page_tables.stride(0),
                q_stride=q.stride(0),
                window=options.window or 0,
                scale=options.scale,
                softcap=options.softcap or 0.0,
                kv_type=_KV_TYPES[kv_cache.dtype],
                as_integers=as_integers,
                sinks=None if sinks is None else sinks.data_ptr(),
            )
        )
    )
    return out if kv_scales is None else in_order(out)


def _keys_and_values(kv_cache: torch.Tensor) -> tuple[int, int]:
    """Addresses of a layer's keys and values, each of them contiguous."""
    start = kv_cache.data_ptr()
    return start, start + kv_cache.stride(0) * kv_cache.itemsize
