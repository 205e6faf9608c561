"""A decoder on a CPU, without PyTorch: arrays, and all layers in one call of the CPU's kernels.

Between the operators of a small model Python takes longer than they do, and importing PyTorch takes longer than all
else that a start needs. The call does what `Decoder.forward` does, with the same operators in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ingle.device.native.parts import Floats, NativeLayer, address
from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import KV_TYPES, Attention, Layer, Step
from ingle.kv import KvSpec
from ingle.model.architecture import DecoderConfig
from ingle.model.sizes import Mixture, WeightSizes
from ingle.weights.packed_matrix import PackedMatrix

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NativeKv:
    """Keys and values of all layers, as `ingle.kv` says.

    NumPy knows no bfloat16, so their numbers are only the kernels' to read.
    """

    data: npt.NDArray[np.uint8]
    """[places, sides, num_pages, bytes of a page], zeros in the beginning."""
    page_size: int
    spec: KvSpec
    located: npt.NDArray[np.int32]
    """[num_layers, 2], each layer's group, and its place there."""


@dataclass(frozen=True)
class NativeBatch:
    """T tokens of B sequences; decoding sequences, with one token each, come first."""

    token_ids: Ints
    """[T]"""
    positions: Ints
    """[T]"""
    kv_places: Ints
    """[G, T], where each token's key and value go in each group of layers: page * page_size + offset."""
    slots: Ints
    """[B]"""
    kv_lengths: Ints
    """[B], tokens of each sequence that its last token attends to, itself included."""
    query_starts: Ints
    """[B + 1], each sequence's first row in T."""
    page_tables: npt.NDArray[np.int32]
    """[G, S, P], the pages of every slot in each group."""
    wanted: Wanted | None = None
    """The tokens whose hidden states are asked for; None for all."""


@dataclass(frozen=True)
class Wanted:
    """Some of T tokens, in order; of each sequence its last ones."""

    rows: Ints
    """[W]"""
    starts: Ints
    """[B + 1], each sequence's first in `rows`."""


@dataclass(frozen=True)
class NativeDecoder:
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    config: DecoderConfig
    embedding: PackedMatrix
    """[vocab_size, hidden_size]"""
    layers: tuple[NativeLayer, ...]
    described: ctypes.Array[Layer]
    """`layers` as the kernels know them: they point into them."""
    norm: Floats
    head: PackedMatrix
    """[vocab_size, hidden_size]; the very object of `embedding` where they are tied."""
    cos_sin: tuple[Floats, ...]
    """For each of the config's rotations, float32 [max_model_len, rotary_dim]."""
    query_factors: Floats | None
    """[max_model_len], what rotated queries are multiplied by; None where that is 1 at all positions."""
    rounds: bool = False
    """Speed goes before exactness: attention of prompts rounds, too."""

    @property
    def mixture(self) -> Mixture | None:
        if self.config.moe is None:
            return None
        router = self.config.moe.router
        matrices = [matrix for layer in self.layers for matrix in layer.mlp.expert_matrices]
        num_parameters = sum(matrix.num_parameters for matrix in matrices)
        return Mixture(router.num_experts, router.top_k, num_parameters, sum(matrix.num_bytes for matrix in matrices))

    @property
    def max_model_len(self) -> int:
        """The longest sequence that there are rotations for."""
        return len(self.cos_sin[0])

    @property
    def matrices(self) -> list[PackedMatrix]:
        """Each once."""
        matrices = [matrix for layer in self.layers for matrix in layer.matrices]
        return matrices + ([self.embedding] if self.head is self.embedding else [self.embedding, self.head])

    @property
    def factors(self) -> frozenset[str]:
        """What its matrices are multiplied as, for people."""
        return frozenset().union(*(matrix.factors for matrix in self.matrices))

    def sizes(self) -> WeightSizes:
        """Tied embeddings count once."""
        matrices = self.matrices
        vectors = [self.norm, *(vector for layer in self.layers for vector in layer.vectors)]
        (all_of, head, embedding) = map(_size, (matrices, [self.head], [self.embedding]))
        return WeightSizes(
            total=(
                all_of[0] + sum(vector.size for vector in vectors),
                all_of[1] + sum(vector.nbytes for vector in vectors),
            ),
            head=head,
            looked_up=(0, 0) if self.head is self.embedding else embedding,
            mixture=self.mixture,
        )

    def forward(self, batch: NativeBatch, kv: NativeKv) -> Floats:
        """Hidden states after the last norm, [T, E], or [W, E] of those that are wanted.

        Writes the step's keys and values into the cache.
        """
        residual = self.embedding.rows(batch.token_ids)
        if self.config.embedding_scale is not None:
            residual *= np.float32(self.config.embedding_scale)
        cos_sin = [table[batch.positions] for table in self.cos_sin]
        factors = None if self.query_factors is None else self.query_factors[batch.positions]
        wanted = batch.wanted
        out = np.empty_like(residual) if wanted is None else np.empty((len(wanted.rows), residual.shape[1]), np.float32)
        attention = Attention(
            page_tables=batch.page_tables.ctypes.data,
            slots=batch.slots.ctypes.data,
            kv_lengths=batch.kv_lengths.ctypes.data,
            query_starts=batch.query_starts.ctypes.data,
            num_seqs=len(batch.slots),
            num_heads=self.config.num_heads,
            num_kv_heads=kv.spec.heads,
            head_dim=kv.spec.dim,
            page_size=kv.page_size,
            pages_per_slot=batch.page_tables.shape[2],
            kv_type=KV_TYPES[kv.spec.dtype],
            as_integers=self.rounds,
        )
        step = Step(
            layers=self.described,
            residual=residual.ctypes.data,
            out=out.ctypes.data,
            norm=self.norm.ctypes.data,
            kv_cache=kv.data.ctypes.data,
            kv_places=batch.kv_places.ctypes.data,
            query_factors=address(factors),
            num_layers=len(self.layers),
            num_tokens=len(residual),
            hidden_size=self.config.hidden_size,
            layer_bytes=kv.data.strides[0],
            located=kv.located.ctypes.data,
            table_size=batch.page_tables[0].size,
            attention=attention,
            eps=self.config.norm_eps,
        )
        if wanted is not None:
            step.wanted, step.wanted_starts = wanted.rows.ctypes.data, wanted.starts.ctypes.data
            step.num_wanted = len(wanted.rows)
        for index, table in enumerate(cos_sin):
            step.cos_sin[index], step.rotary_dims[index] = table.ctypes.data, table.shape[1]
        library.get().ingle_layers(ctypes.byref(step))
        return out

    def logits(self, hidden: Floats) -> Floats:
        """[R, vocab_size] for hidden states [R, E]."""
        logits, cap = self.head.multiply(hidden), self.config.logit_softcap
        return logits if cap is None else np.tanh(logits / np.float32(cap)) * np.float32(cap)


def _size(matrices: Sequence[PackedMatrix]) -> tuple[int, int]:
    """Parameters and bytes."""
    return sum(matrix.num_parameters for matrix in matrices), sum(matrix.num_bytes for matrix in matrices)
