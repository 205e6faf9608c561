"""The CPU's compiled operators for tensors: their arguments and meaning are those of `ingle.kernels.reference`."""

from __future__ import annotations

from ctypes import byref

import torch

from ingle.kernels import reference_sampling
from ingle.kernels.batch import CODE_TYPES
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import ACTIVATIONS, KV_TYPES
from ingle.kernels.options import Activation
from ingle.kernels.sampling import Features, Samples, SamplingTables

_KV_TYPES = {CODE_TYPES[name] if name in CODE_TYPES else getattr(torch, name): n for name, n in KV_TYPES.items()}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, out = x.contiguous(), torch.empty(x.shape)
    size = x.shape[-1]
    library.get().ingle_rms_norm(x.data_ptr(), weight.data_ptr(), eps, x.numel() // size, size, out.data_ptr())
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, post_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if post_weight is not None:
        x = rms_norm(x, post_weight, eps)
    x, residual, out = x.contiguous(), residual.contiguous(), torch.empty(x.shape)
    library.get().ingle_add_rms_norm(
        x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, x.shape[0], x.shape[1], out.data_ptr()
    )
    return out, residual


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate_up = gate_up.contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size)
    library.get().ingle_gated(gate_up.data_ptr(), ACTIVATIONS[activation], num_rows, size, out.data_ptr())
    return out


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    kv_places: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotates in place: the queries it returns are a view of `qkv`. Codes it writes in order."""
    num_kv_heads, head_dim = kv_cache.shape[-2:]
    keys, values = _keys_and_values(kv_cache)
    library.get().ingle_rotate_and_store(
        byref(
            library.Rotation(
                qkv=qkv.data_ptr(),
                cos_sin=cos_sin.data_ptr(),
                q_norm=None if q_norm is None else q_norm.data_ptr(),
                k_norm=None if k_norm is None else k_norm.data_ptr(),
                keys=keys,
                values=values,
                kv_places=kv_places.data_ptr(),
                num_tokens=qkv.shape[0],
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rotary_dim=cos_sin.shape[1],
                page_size=kv_cache.shape[2],
                eps=eps,
                kv_type=_KV_TYPES[kv_cache.dtype],
            )
        )
    )
    return qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]


def _keys_and_values(kv_cache: torch.Tensor) -> tuple[int, int]:
    """Addresses of a layer's keys and values, each of them contiguous."""
    start = kv_cache.data_ptr()
    return start, start + kv_cache.stride(0) * kv_cache.itemsize


def sample(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, tables: SamplingTables, features: Features
) -> Samples:
    return reference_sampling.sample(logits, slots, positions, tables, features, _greedy)


def _greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    logits = logits.contiguous()
    token_ids, finite = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows, dtype=torch.bool)
    library.get().ingle_sample_greedy(logits.data_ptr(), num_rows, vocab_size, token_ids.data_ptr(), finite.data_ptr())
    return token_ids, finite
