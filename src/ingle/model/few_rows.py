"""A decoder's step for a few rows: five kernels a layer instead of nine.

What a step of a few rows waits for is one kernel after the other, so norms, rotation and activation are part of the
matrix products, but for those of experts. It computes what `Decoder.forward` does, rounded in other places: for one or
two rows with `ingle.kernels.gpu.vector`, on any GPU; for some more with `ingle.kernels.gpu.few_rows`, on Hopper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ingle.kernels.batch import Batch, KvCache
from ingle.model.layers import Attention, Linear
from ingle.model.moe import SparseMoe
from ingle.weights.formats import PlainWeight

if TYPE_CHECKING:
    from ingle.kernels.gpu.rotation import Rotation
    from ingle.model.decoder import Decoder, DecoderLayer

_MAX_ROWS = 16
"""With more, PyTorch's products and the kernels around them are as fast."""
_ALIGNMENT = 8
"""Numbers of 16 bits in the 16 bytes to which a row of weights has to be aligned."""


def max_rows(decoder: Decoder) -> int:
    """The most rows of a step that this decoder, on this device, can take this way; 0 for none."""
    if not decoder.cos_sin[0].is_cuda or not all(_layer_suits(decoder, layer) for layer in decoder.layers):
        return 0
    from ingle.kernels.gpu import vector  # Triton comes with PyTorch's CUDA builds only
    from ingle.kernels.gpu.device import pdl

    # Not float16: a row times the norm's weight, before the division by its length, may be too large for it.
    is_bfloat16 = all(weight.dtype == torch.bfloat16 for weight in _matrices(decoder))
    return _MAX_ROWS if pdl(decoder.cos_sin[0].device) and is_bfloat16 else vector.MAX_ROWS


def _layer_suits(decoder: Decoder, layer: DecoderLayer) -> bool:
    attention, head_dim = layer.attention, decoder.config.head_dim
    return (
        isinstance(attention, Attention)
        and attention.query_factors is None
        and layer.attention_post_norm is None
        and layer.mlp_post_norm is None
        and decoder.cos_sin[layer.rope].shape[1] == head_dim
        and head_dim in (32, 64, 128, 256)
        and all(_linear_suits(linear) for linear in _linears(layer))
    )


def _linears(layer: DecoderLayer) -> list[Linear]:
    """Those whose products are fused."""
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    return [attention.qkv, attention.out, *(() if isinstance(mlp, SparseMoe) else (mlp.gate_up, mlp.down))]


def _linear_suits(linear: Linear) -> bool:
    weight = linear.weight
    return isinstance(weight, PlainWeight) and weight.tensor.itemsize == 2 and weight.tensor.shape[1] % _ALIGNMENT == 0


def _matrices(decoder: Decoder) -> Iterator[torch.Tensor]:
    for layer in decoder.layers:
        for linear in _linears(layer):
            yield _parts(linear)[0]


def forward(decoder: Decoder, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
    """As `Decoder.forward`, for at most `Decoder.fused_rows` tokens."""
    from ingle.kernels.gpu import vector

    if len(batch.token_ids) <= vector.MAX_ROWS:
        return _forward_on_vector_units(decoder, batch, kv_cache)
    return _forward_on_matrix_units(decoder, batch, kv_cache)


def _forward_on_vector_units(decoder: Decoder, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
    from ingle.kernels.gpu import paged_attention, vector

    cos_sin = [table[batch.inputs.positions] for table in decoder.cos_sin]
    x = decoder.embed(batch.token_ids)
    for index, layer in enumerate(decoder.layers):
        attention, mlp, norm = layer.attention, layer.mlp, layer.input_norm
        assert isinstance(attention, Attention)
        cache, seen = kv_cache.of_layer(index, batch)
        rotation = _rotation(attention, cos_sin[layer.rope], cache, seen)
        q = vector.project_and_store(x, norm.weight, norm.eps, *_parts(attention.qkv), rotation)
        attended = paged_attention(q, cache, seen, attention.options).flatten(1)
        x, norm = vector.add(attended, *_parts(attention.out), x), layer.mlp_norm
        if isinstance(mlp, SparseMoe):
            x = x + mlp(norm(x))
        else:
            inner = vector.gated(x, norm.weight, norm.eps, *_parts(mlp.gate_up), mlp.activation)
            x = vector.add(inner, *_parts(mlp.down), x)
    return decoder.norm(x)


def _forward_on_matrix_units(decoder: Decoder, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
    from ingle.kernels.gpu import few_rows, paged_attention

    cos_sin = [table[batch.inputs.positions] for table in decoder.cos_sin]
    residual = decoder.embed(batch.token_ids)
    rows = few_rows.Scaled(residual, decoder.layers[0].input_norm(residual), None)
    norms_after = [*(layer.input_norm for layer in decoder.layers[1:]), decoder.norm]
    for index, (layer, norm_after) in enumerate(zip(decoder.layers, norms_after, strict=True)):
        attention, mlp = layer.attention, layer.mlp
        assert isinstance(attention, Attention)
        cache, seen = kv_cache.of_layer(index, batch)
        rotation = _rotation(attention, cos_sin[layer.rope], cache, seen)
        q = few_rows.project_and_store(rows, layer.input_norm.eps, *_parts(attention.qkv), rotation)
        attended = paged_attention(q, cache, seen, attention.options).flatten(1)
        rows = few_rows.add(attended, *_parts(attention.out), rows.residual, layer.mlp_norm.weight)
        if isinstance(mlp, SparseMoe):  # which needs the normed rows for its router as well
            x = mlp(layer.mlp_norm(rows.residual))
            x, residual = norm_after.add(x, rows.residual)
            rows = few_rows.Scaled(residual, x, None)
            continue
        inner = few_rows.gated(rows, layer.mlp_norm.eps, *_parts(mlp.gate_up), mlp.activation)
        rows = few_rows.add(inner, *_parts(mlp.down), rows.residual, norm_after.weight)
    return decoder.norm(rows.residual)


def _rotation(attention: Attention, cos_sin: torch.Tensor, kv_cache: torch.Tensor, batch: Batch) -> Rotation:
    from ingle.kernels.gpu.rotation import Rotation

    q_norm, k_norm = attention.q_norm, attention.k_norm
    return Rotation(
        num_heads=attention.num_heads,
        cos_sin=cos_sin,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        eps=0.0 if q_norm is None else q_norm.eps,
        kv_cache=kv_cache,
        kv_slots=batch.kv_slots,
    )


def _parts(linear: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    assert isinstance(linear.weight, PlainWeight)
    return linear.weight.tensor, linear.bias
