"""The decoder that runs every dense family; `DecoderConfig` says in what they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ingle.engine.batch import Batch
from ingle.model.architecture import DecoderConfig
from ingle.model.layers import Attention, GatedMLP, Linear, RMSNorm


@dataclass(frozen=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: GatedMLP


@dataclass(frozen=True)
class Decoder:
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    config: DecoderConfig
    embedding: torch.Tensor
    """[vocab_size, hidden_size]"""
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear
    cos_sin: torch.Tensor
    """float32 [max_model_len, rotary_dim]"""

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into kv_cache.

        kv_cache: [num_layers, 2, num_pages, page_size, num_kv_heads, head_dim].
        """
        cos_sin = self.cos_sin[batch.inputs.positions]
        residual = F.embedding(batch.token_ids, self.embedding)
        x = self.layers[0].input_norm(residual)
        for index, layer in enumerate(self.layers):
            if index:
                x, residual = layer.input_norm.add(x, residual)
            x = layer.attention(x, cos_sin, kv_cache[index], batch)
            x, residual = layer.post_attention_norm.add(x, residual)
            x = layer.mlp(x)
        return self.norm.add(x, residual)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] for hidden states [R, E]."""
        return self.lm_head(hidden)

    def parameters(self) -> Iterator[torch.Tensor]:
        """Every weight; the output head is the embedding itself when they are tied."""
        yield from (self.embedding, self.norm.weight)
        yield from _tensors(self.lm_head)
        for layer in self.layers:
            yield from (layer.input_norm.weight, layer.post_attention_norm.weight)
            for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
                yield from _tensors(linear)
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                if norm is not None:
                    yield norm.weight


def _tensors(linear: Linear) -> Iterator[torch.Tensor]:
    yield linear.weight
    if linear.bias is not None:
        yield linear.bias
