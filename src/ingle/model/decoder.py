"""The decoder that runs every family; `DecoderConfig` says in what they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels
from ingle.kernels.batch import Batch
from ingle.model import few_rows
from ingle.model.architecture import DecoderConfig
from ingle.model.layers import Attention, GatedMLP, Linear, Parameter, RMSNorm
from ingle.model.mla import LatentAttention
from ingle.model.moe import SparseMoe
from ingle.model.rope import cos_sin_tables
from ingle.model.sizes import Mixture
from ingle.weights.formats import Weight, total_size


@dataclass(frozen=True)
class DecoderLayer:
    input_norm: RMSNorm
    attention: Attention | LatentAttention
    attention_post_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: GatedMLP | SparseMoe
    mlp_post_norm: RMSNorm | None
    rope: int
    """Which of the decoder's rotations."""

    def parameters(self) -> Iterator[Parameter]:
        for part in (
            self.input_norm, self.attention, self.attention_post_norm, self.mlp_norm, self.mlp, self.mlp_post_norm
        ):  # fmt: skip
            if part is not None:
                yield from part.parameters()


@dataclass(frozen=True)
class Decoder:
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    config: DecoderConfig
    embedding: Weight
    """[vocab_size, hidden_size]"""
    embedding_scale: float | None
    """As the type of the embedding has it."""
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear
    cos_sin: tuple[torch.Tensor, ...]
    """For each of the config's rotations, float32 [max_model_len, rotary_dim]."""
    fused_rows: int = 0
    """Steps of up to so many rows go through `few_rows`."""
    capturable: bool = True

    @property
    def max_model_len(self) -> int:
        """The longest sequence that there are rotations for."""
        return len(self.cos_sin[0])

    def with_length(self, max_model_len: int) -> Decoder:
        """The same decoder for sequences of at most `max_model_len` tokens, on which some rotations depend."""
        return dataclasses.replace(self, cos_sin=rotations(self.config, max_model_len, self.cos_sin[0].device))

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into kv_cache.

        kv_cache: [num_layers, sides, num_pages, page_size, heads, dim], as the config's `kv_layout` says.
        """
        if len(batch.token_ids) <= self.fused_rows:
            return few_rows.forward(self, batch, kv_cache)
        cos_sin = [table[batch.inputs.positions] for table in self.cos_sin]
        residual = self.embed(batch.token_ids)
        x = self.layers[0].input_norm(residual)
        for index, layer in enumerate(self.layers):
            if index:
                x, residual = layer.input_norm.add(x, residual, self.layers[index - 1].mlp_post_norm)
            x = layer.attention(x, cos_sin[layer.rope], kv_cache[index], batch)
            x, residual = layer.mlp_norm.add(x, residual, layer.attention_post_norm)
            x = layer.mlp(x)
        return self.norm.add(x, residual, self.layers[-1].mlp_post_norm)[0]

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, E]"""
        rows = self.embedding.rows(token_ids)
        return rows if self.embedding_scale is None else rows * self.embedding_scale

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] for hidden states [R, E]."""
        logits, cap = self.lm_head(hidden), self.config.logit_softcap
        return logits if cap is None else kernels.of(logits).soft_cap(logits, cap)

    @property
    def head(self) -> Weight:
        return self.lm_head.weight

    @property
    def mixture(self) -> Mixture | None:
        if self.config.moe is None:
            return None
        router = self.config.moe.router
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, SparseMoe)]
        num_parameters, num_bytes = total_size(part for mixture in mixtures for part in mixture.experts.parameters())
        return Mixture(router.num_experts, router.top_k, num_parameters, num_bytes)

    def parameters(self) -> Iterator[Parameter]:
        """Vectors and matrices; the output head is the embedding itself when they are tied."""
        yield self.embedding
        for layer in self.layers:
            yield from layer.parameters()
        yield from self.norm.parameters()
        yield from self.lm_head.parameters()


def rotations(config: DecoderConfig, max_model_len: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """`Decoder.cos_sin`."""
    return tuple(table.to(device) for table in cos_sin_tables(config, max_model_len, torch))
