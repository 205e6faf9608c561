"""A decoder's layers as one call of the CPU's kernels (`csrc/layers.cpp`).

Between the operators of a small model Python takes longer than they do. The call does what `Decoder.forward` does, with
the same operators in the same order, so both give the same numbers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ingle.kernels.batch import Batch
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import ACTIVATIONS, KV_TYPES, Attention, Layer, Matrix, Projection, Step
from ingle.model import layers
from ingle.weights.packed import PackedWeight

if TYPE_CHECKING:
    from ingle.model.decoder import Decoder, DecoderLayer


@dataclass(frozen=True)
class LayersInOneCall:
    """The layers as the kernels know them. They point into the decoder's weights, which must outlive them."""

    layers: ctypes.Array[Layer]
    num_heads: int
    eps: float
    norm: torch.Tensor
    projections: tuple[Projection, ...]
    """What `layers` point to."""

    def __call__(
        self, residual: torch.Tensor, cos_sin: list[torch.Tensor], batch: Batch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [T, E] after the last norm, for embeddings [T, E], which are overwritten."""
        out, inputs = torch.empty_like(residual), batch.inputs
        num_kv_heads, head_dim = kv_cache.shape[-2:]
        attention = Attention(
            page_tables=batch.page_tables.data_ptr(),
            slots=inputs.slots.data_ptr(),
            kv_lengths=inputs.kv_lengths.data_ptr(),
            query_starts=inputs.query_starts.data_ptr(),
            num_seqs=len(inputs.slots),
            num_heads=self.num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            page_size=kv_cache.shape[3],
            pages_per_slot=batch.page_tables.stride(0),
            kv_type=KV_TYPES[kv_cache.dtype],
        )
        step = Step(
            layers=self.layers,
            residual=residual.data_ptr(),
            out=out.data_ptr(),
            norm=self.norm.data_ptr(),
            kv_cache=kv_cache.data_ptr(),
            kv_slots=batch.kv_slots.data_ptr(),
            num_layers=len(self.layers),
            num_tokens=len(residual),
            hidden_size=residual.shape[1],
            layer_bytes=kv_cache.stride(0) * kv_cache.itemsize,
            attention=attention,
            eps=self.eps,
        )
        for index, table in enumerate(cos_sin):
            step.cos_sin[index], step.rotary_dims[index] = table.data_ptr(), table.shape[1]
        library.get().ingle_layers(ctypes.byref(step))
        return out


def in_one_call(decoder: Decoder) -> LayersInOneCall | None:
    """None for a decoder that has other parts than the kernels know, or whose weights are not packed."""
    if not all(_suits(layer, decoder.norm.eps) for layer in decoder.layers):
        return None
    attention = decoder.layers[0].attention
    described = [_layer(layer) for layer in decoder.layers]
    return LayersInOneCall(
        layers=(Layer * len(described))(*described),
        num_heads=attention.num_heads,
        eps=decoder.norm.eps,
        norm=decoder.norm.weight,
        projections=tuple(part for layer in described for part in (layer.qkv, layer.out, layer.gate_up, layer.down)),
    )


def _suits(layer: DecoderLayer, eps: float) -> bool:
    attention, mlp = layer.attention, layer.mlp
    return (
        isinstance(attention, layers.Attention)
        and isinstance(mlp, layers.GatedMLP)
        and attention.query_factors is None
        and all(isinstance(linear.weight, PackedWeight) for linear in _linears(attention, mlp))
        and all(norm is None or norm.eps == eps for norm in _norms(layer))
    )


def _linears(attention: layers.Attention, mlp: layers.GatedMLP) -> Iterator[layers.Linear]:
    yield from (attention.qkv, attention.out, mlp.gate_up, mlp.down)


def _norms(layer: DecoderLayer) -> Iterator[layers.RMSNorm | None]:
    yield from (layer.input_norm, layer.attention_post_norm, layer.mlp_norm, layer.mlp_post_norm)


def _layer(layer: DecoderLayer) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, layers.Attention) and isinstance(mlp, layers.GatedMLP)
    qkv, out, gate_up, down = map(_projection, _linears(attention, mlp))
    input_norm, attention_post_norm, mlp_norm, mlp_post_norm = map(_address, _norms(layer))
    return Layer(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        input_norm=input_norm,
        q_norm=_address(attention.q_norm),
        k_norm=_address(attention.k_norm),
        attention_post_norm=attention_post_norm,
        mlp_norm=mlp_norm,
        mlp_post_norm=mlp_post_norm,
        window=attention.options.window or 0,
        scale=attention.options.scale,
        softcap=attention.options.softcap or 0.0,
        qk_eps=0.0 if attention.q_norm is None else attention.q_norm.eps,
        activation=ACTIVATIONS[mlp.activation],
        rope=layer.rope,
    )


def _projection(linear: layers.Linear) -> Projection:
    weight = linear.weight
    assert isinstance(weight, PackedWeight)
    parts = (ctypes.POINTER(Matrix) * len(weight.parts))(*(ctypes.pointer(part.matrix) for part in weight.parts))
    bias = None if linear.bias is None else linear.bias.data_ptr()
    return Projection(parts=parts, bias=bias, num_parts=len(weight.parts), rows=weight.num_rows)


def _address(norm: layers.RMSNorm | None) -> int | None:
    return None if norm is None else norm.weight.data_ptr()
