"""The decoder that runs every family; `DecoderConfig` says in what they differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ingle import kernels, progress
from ingle.kernels.batch import Batch, KvCache
from ingle.kernels.flow import Flow, LayerCache
from ingle.kernels.group import Border, Group, LogitsShare
from ingle.model.architecture import DecoderConfig
from ingle.model.layers import Attention, GatedMLP, Linear, Parameter, RMSNorm
from ingle.model.mla import LatentAttention
from ingle.model.moe import SparseMoe
from ingle.model.rope import cos_sin_tables
from ingle.model.sizes import Mixture
from ingle.weights.matrix import Weight, total_size


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

    def __call__(self, flow: Flow, cos_sin: torch.Tensor, cache: LayerCache, norm: RMSNorm) -> Flow:
        """The flow after this layer, on its way to `norm`. cos_sin: float32 [T, rotary_dim]."""
        attended = self.attention(flow, cos_sin, cache)
        flow = self.attention.out.add_to(flow, attended, self.mlp_norm, self.attention_post_norm)
        return self.mlp.add_to(flow, norm, self.mlp_post_norm)

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
    """[vocab_size, hidden_size]; of no rows in a stage that is not the first. So is the head in one that is not the
    last."""
    embedding_scale: float | None
    """As the type of the embedding has it."""
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    """Behind the last layer that is here."""
    lm_head: Linear
    cos_sin: tuple[torch.Tensor, ...]
    """For each of the config's rotations, float32 [max_model_len, rotary_dim]."""
    group: Group | None = None
    """Ranks that have shares of it, of embedding and head equally many rows each; None where all of it is here."""
    border: Border | None = None
    """Of a stage of a pipeline to those before and behind it."""

    @property
    def capturable(self) -> bool:
        return True

    @property
    def max_model_len(self) -> int:
        """The longest sequence that there are rotations for."""
        return len(self.cos_sin[0])

    def forward(self, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into kv_cache.

        Those of a stage that is not the last are sent to the next, before that norm.
        """
        cos_sin = [table[batch.inputs.positions] for table in self.cos_sin]
        if self.border is None or self.config.is_first:
            flow = Flow(self.embed(batch.token_ids), self.layers[0].input_norm)
        else:
            flow = Flow(self.border.receive(len(batch.token_ids)), self.layers[0].input_norm)
        norms = (*(layer.input_norm for layer in self.layers[1:]), self.norm)
        for index, (layer, norm) in enumerate(zip(self.layers, norms, strict=True)):
            flow = layer(flow, cos_sin[layer.rope], LayerCache(*kv_cache.of_layer(index, batch)), norm)
            progress.layer_done()
        if self.border is not None and not self.config.is_last:
            self.border.send(flow.residual)
            return flow.residual
        return kernels.of(flow.residual).normed(flow)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, E]"""
        rows = self.embedding.rows(token_ids) if self.group is None else self._looked_up(token_ids, self.group)
        return rows if self.embedding_scale is None else rows * self.embedding_scale

    def _looked_up(self, token_ids: torch.Tensor, group: Group) -> torch.Tensor:
        """Each row by the rank that has it."""
        wanted = token_ids - group.place * self.embedding.num_rows
        own = wanted.clamp(0, self.embedding.num_rows - 1)
        return group.all_reduce(self.embedding.rows(own).masked_fill_((wanted != own)[:, None], 0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] for hidden states [R, E]."""
        logits = self._own_logits(hidden)
        return logits if self.group is None else LogitsShare(logits, self.group, self.config.vocab_size).whole()

    def logits_share(self, hidden: torch.Tensor) -> LogitsShare | None:
        """Of `logits` the part that is here, where others have theirs."""
        return None if self.group is None else LogitsShare(self._own_logits(hidden), self.group, self.config.vocab_size)

    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
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
        num_parameters, num_bytes = total_size(part for layer in self.layers for part in layer.mlp.expert_parameters())
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
