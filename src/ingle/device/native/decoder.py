"""A decoder on a CPU, without PyTorch: arrays, and all layers in one call of the CPU's kernels.

Between the operators of a small model Python takes longer than they do, and importing PyTorch takes longer than all
else that a start needs. The call does what `Decoder.forward` does, with the same operators in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import (
    ACTIVATIONS,
    KV_TYPES,
    SCORINGS,
    Attention,
    Layer,
    Matrix,
    Projection,
    Step,
)
from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MoeConfig
from ingle.model.mixture_names import mixture_names
from ingle.model.rope import cos_sin_tables, query_factors
from ingle.model.sizes import Mixture, WeightSizes
from ingle.weights.code_types import CodeType
from ingle.weights.packed_matrix import PackedMatrix, load_matrix
from ingle.weights.source import FLOATS, ExpertNames, WeightSource

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HostKv:
    """Keys and values of all layers. NumPy knows no bfloat16, so their numbers are only the kernels' to read."""

    data: npt.NDArray[np.uint8]
    """[num_layers, 2, num_pages, bytes of a page], zeros in the beginning."""
    page_size: int
    dtype: str
    """A key of `KV_TYPES`."""


@dataclass(frozen=True)
class HostBatch:
    """T tokens of B sequences; decoding sequences, with one token each, come first."""

    token_ids: Ints
    """[T]"""
    positions: Ints
    """[T]"""
    kv_slots: Ints
    """[T], where each token's key and value go: page * page_size + offset."""
    slots: Ints
    """[B]"""
    kv_lengths: Ints
    """[B], tokens of each sequence that its last token attends to, itself included."""
    query_starts: Ints
    """[B + 1], each sequence's first row in T."""
    page_tables: npt.NDArray[np.int32]
    """[S, P], the pages of every slot."""


@dataclass(frozen=True)
class _Linear:
    matrix: PackedMatrix
    bias: Floats | None
    described: Projection
    """As the kernels know it."""

    @classmethod
    def of(cls, matrix: PackedMatrix, bias: Floats | None) -> _Linear:
        parts = [ctypes.pointer(part.matrix) for part in matrix.parts]
        pointers = (ctypes.POINTER(Matrix) * len(parts))(*parts)
        described = Projection(parts=pointers, bias=_address(bias), num_parts=len(parts), rows=matrix.num_rows)
        return cls(matrix, bias, described)


@dataclass(frozen=True)
class _HostMlp:
    gate_up: _Linear
    down: _Linear

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return (self.gate_up, self.down)

    @property
    def vectors(self) -> tuple[Floats, ...]:
        return ()

    def fields(self) -> dict[str, object]:
        """Of `library.Layer`."""
        return {"gate_up": self.gate_up.described, "down": self.down.described}


@dataclass(frozen=True)
class _HostMixture:
    """`ingle.model.moe.SparseMoe`."""

    router: Floats
    """[num_experts, hidden_size]"""
    selection_bias: Floats | None
    experts: tuple[_HostMlp, ...]
    shared: _HostMlp | None
    shared_gate: Floats | None
    """[hidden_size]"""
    described: library.Mixture

    @classmethod
    def of(
        cls,
        config: RouterConfig,
        router: Floats,
        selection_bias: Floats | None,
        experts: tuple[_HostMlp, ...],
        shared: _HostMlp | None,
        shared_gate: Floats | None,
    ) -> _HostMixture:
        described = library.Mixture(
            router=_address(router),
            selection_bias=_address(selection_bias),
            gate_up=(Projection * len(experts))(*(expert.gate_up.described for expert in experts)),
            down=(Projection * len(experts))(*(expert.down.described for expert in experts)),
            shared_gate=_address(shared_gate),
            num_experts=config.num_experts,
            top_k=config.top_k,
            num_groups=config.num_groups,
            topk_group=config.topk_group,
            group_experts=config.group_experts,
            scaling=config.routed_scaling_factor,
            scoring=SCORINGS[config.scoring],
            normalizes=config.norm_topk_prob,
        )
        if shared is not None:
            described.shared_gate_up, described.shared_down = shared.gate_up.described, shared.down.described
        return cls(router, selection_bias, experts, shared, shared_gate, described)

    @property
    def expert_linears(self) -> tuple[_Linear, ...]:
        return tuple(linear for expert in self.experts for linear in expert.linears)

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return self.expert_linears + (() if self.shared is None else self.shared.linears)

    @property
    def vectors(self) -> tuple[Floats, ...]:
        given = (self.router, self.selection_bias, self.shared_gate)
        return tuple(vector for vector in given if vector is not None)

    def fields(self) -> dict[str, object]:
        """Of `library.Layer`."""
        return {"mixture": ctypes.pointer(self.described)}


@dataclass(frozen=True)
class _HostLayer:
    input_norm: Floats
    qkv: _Linear
    q_norm: Floats | None
    k_norm: Floats | None
    out: _Linear
    attention_post_norm: Floats | None
    mlp_norm: Floats
    mlp: _HostMlp | _HostMixture
    mlp_post_norm: Floats | None

    @property
    def linears(self) -> tuple[_Linear, ...]:
        return (self.qkv, self.out, *self.mlp.linears)

    @property
    def vectors(self) -> list[Floats]:
        norms = (self.input_norm, self.q_norm, self.k_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm)
        given = (*norms, *self.mlp.vectors, *(linear.bias for linear in self.linears))
        return [vector for vector in given if vector is not None]

    def described(self, config: DecoderConfig, index: int) -> Layer:
        options = config.attention(index)
        return Layer(
            qkv=self.qkv.described,
            out=self.out.described,
            **self.mlp.fields(),
            input_norm=_address(self.input_norm),
            q_norm=_address(self.q_norm),
            k_norm=_address(self.k_norm),
            attention_post_norm=_address(self.attention_post_norm),
            mlp_norm=_address(self.mlp_norm),
            mlp_post_norm=_address(self.mlp_post_norm),
            window=options.window or 0,
            scale=options.scale,
            softcap=options.softcap or 0.0,
            qk_eps=config.norm_eps if config.qk_norm else 0.0,
            activation=ACTIVATIONS[config.activation],
            rope=config.rope_index(index),
        )


@dataclass(frozen=True)
class HostDecoder:
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    config: DecoderConfig
    embedding: PackedMatrix
    """[vocab_size, hidden_size]"""
    layers: tuple[_HostLayer, ...]
    described: ctypes.Array[Layer]
    """`layers` as the kernels know them: they point into them."""
    norm: Floats
    head: PackedMatrix
    """[vocab_size, hidden_size]; the very object of `embedding` where they are tied."""
    cos_sin: tuple[Floats, ...] = ()
    """For each of the config's rotations, float32 [max_model_len, rotary_dim], once `with_length` has made them."""
    query_factors: Floats | None = None
    """[max_model_len], what rotated queries are multiplied by; None where that is 1 at all positions."""

    @property
    def mixture(self) -> Mixture | None:
        if self.config.moe is None:
            return None
        router = self.config.moe.router
        mixtures = [layer.mlp for layer in self.layers if isinstance(layer.mlp, _HostMixture)]
        matrices = [linear.matrix for mixture in mixtures for linear in mixture.expert_linears]
        num_parameters = sum(matrix.num_parameters for matrix in matrices)
        return Mixture(router.num_experts, router.top_k, num_parameters, sum(matrix.num_bytes for matrix in matrices))

    @property
    def max_model_len(self) -> int:
        """The longest sequence that there are rotations for."""
        return len(self.cos_sin[0])

    def with_length(self, max_model_len: int) -> HostDecoder:
        """The decoder for sequences of at most `max_model_len` tokens, on which some rotations depend."""
        return replace(
            self,
            cos_sin=cos_sin_tables(self.config, max_model_len, np),
            query_factors=query_factors(self.config, max_model_len),
        )

    @property
    def matrices(self) -> list[PackedMatrix]:
        """Each once."""
        matrices = [linear.matrix for layer in self.layers for linear in layer.linears]
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

    def forward(self, batch: HostBatch, kv: HostKv) -> Floats:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into the cache."""
        residual = self.embedding.rows(batch.token_ids)
        if self.config.embedding_scale is not None:
            residual *= np.float32(self.config.embedding_scale)
        cos_sin = [table[batch.positions] for table in self.cos_sin]
        factors = None if self.query_factors is None else self.query_factors[batch.positions]
        out = np.empty_like(residual)
        attention = Attention(
            page_tables=batch.page_tables.ctypes.data,
            slots=batch.slots.ctypes.data,
            kv_lengths=batch.kv_lengths.ctypes.data,
            query_starts=batch.query_starts.ctypes.data,
            num_seqs=len(batch.slots),
            num_heads=self.config.num_heads,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            page_size=kv.page_size,
            pages_per_slot=batch.page_tables.shape[1],
            kv_type=KV_TYPES[kv.dtype],
        )
        step = Step(
            layers=self.described,
            residual=residual.ctypes.data,
            out=out.ctypes.data,
            norm=self.norm.ctypes.data,
            kv_cache=kv.data.ctypes.data,
            kv_slots=batch.kv_slots.ctypes.data,
            query_factors=_address(factors),
            num_layers=len(self.layers),
            num_tokens=len(residual),
            hidden_size=self.config.hidden_size,
            layer_bytes=kv.data.strides[0],
            attention=attention,
            eps=self.config.norm_eps,
        )
        for index, table in enumerate(cos_sin):
            step.cos_sin[index], step.rotary_dims[index] = table.ctypes.data, table.shape[1]
        library.get().ingle_layers(ctypes.byref(step))
        return out

    def logits(self, hidden: Floats) -> Floats:
        """[R, vocab_size] for hidden states [R, E]."""
        logits, cap = self.head.multiply(hidden), self.config.logit_softcap
        return logits if cap is None else np.tanh(logits / np.float32(cap)) * np.float32(cap)


def suits(config: DecoderConfig) -> bool:
    """Whether the kernels know all the parts of this decoder."""
    return config.mla is None


def load_host_decoder(
    config: DecoderConfig, source: WeightSource, code_type_of: Callable[[str], CodeType]
) -> HostDecoder:
    """Reads every parameter of a decoder that is as `checkpoint.as_stored` says; the length is to be set.

    `code_type_of` decides how matrices are held, as for `packed_matrix.load_matrix`.
    Raises `ModelError` for missing or misshapen ones.
    """
    read, names = _Reader(source, config, code_type_of), config.names
    embedding = read.matrix([names.embedding], [config.vocab_size], config.hidden_size)
    tied, rows = config.tied_embeddings, [config.vocab_size]
    head = embedding if tied else read.matrix([names.lm_head], rows, config.hidden_size)
    layers = tuple(read.layer(index) for index in range(config.num_layers))
    return HostDecoder(
        config=config,
        embedding=embedding,
        layers=layers,
        described=(Layer * len(layers))(*(layer.described(config, index) for index, layer in enumerate(layers))),
        norm=read.norm(names.norm, config.hidden_size),
        head=head,
    )


@dataclass(frozen=True)
class _Reader:
    source: WeightSource
    config: DecoderConfig
    code_type_of: Callable[[str], CodeType]

    def layer(self, index: int) -> _HostLayer:
        config, names, prefix = self.config, self.config.names, f"{self.config.names.layers}.{index}"
        hidden = config.hidden_size

        def norm(name: str, size: int = hidden) -> Floats:
            return self.norm(f"{prefix}.{name}", size)

        def linear(modules: Sequence[str], num_rows: Sequence[int], columns: int, *, bias: bool) -> _Linear:
            return self.linear([f"{prefix}.{name}" for name in modules], num_rows, columns, bias=bias)

        qkv_rows = [config.q_size, config.kv_size, config.kv_size]
        return _HostLayer(
            input_norm=norm(names.input_norm),
            qkv=linear(names.qkv, qkv_rows, hidden, bias=config.qkv_bias),
            q_norm=norm(names.q_norm, config.head_dim) if config.qk_norm else None,
            k_norm=norm(names.k_norm, config.head_dim) if config.qk_norm else None,
            out=linear([names.attention_out], [hidden], config.q_size, bias=config.output_bias),
            attention_post_norm=norm(names.attention_post_norm) if config.post_norms else None,
            mlp_norm=norm(names.mlp_norm),
            mlp=self.mlp(index, prefix),
            mlp_post_norm=norm(names.mlp_post_norm) if config.post_norms else None,
        )

    def mlp(self, index: int, prefix: str) -> _HostMlp | _HostMixture:
        config, names = self.config, self.config.names
        if config.moe is not None and index in config.moe.layers:
            return self.mixture(config.moe, prefix)
        hidden, inner = config.hidden_size, config.intermediate_size
        gate_up, down = [f"{prefix}.{name}" for name in names.gate_up], f"{prefix}.{names.mlp_down}"
        return _HostMlp(
            gate_up=self.linear(gate_up, [inner, inner], hidden, bias=config.mlp_bias),
            down=self.linear([down], [hidden], inner, bias=config.mlp_bias),
        )

    def mixture(self, config: MoeConfig, prefix: str) -> _HostMixture:
        names, hidden = mixture_names(self.source, config, prefix), self.config.hidden_size
        num_experts, shared_size = config.router.num_experts, config.shared_intermediate_size
        return _HostMixture.of(
            config.router,
            router=self.float_matrix(names.router, num_experts, hidden),
            selection_bias=self.source.floats(names.selection_bias, num_experts) if config.selection_bias else None,
            experts=tuple(self.expert(expert, config.intermediate_size) for expert in names.experts),
            shared=self.expert(names.shared, shared_size) if shared_size else None,
            shared_gate=self.float_matrix(names.shared_gate, 1, hidden) if config.shared_gate else None,
        )

    def expert(self, names: ExpertNames, inner: int) -> _HostMlp:
        hidden, rows = self.config.hidden_size, [2 * inner // len(names.gate_up)] * len(names.gate_up)
        return _HostMlp(
            gate_up=_Linear.of(self.tensors(names.gate_up, rows, hidden), None),
            down=_Linear.of(self.tensors([names.down], [hidden], inner), None),
        )

    def float_matrix(self, name: str, num_rows: int, columns: int) -> Floats:
        """[num_rows, columns], exactly as it is stored."""
        shape = self.source.shape(name)
        if num_rows == 1 and shape is not None and len(shape) == 1:  # GGUF's converter drops dimensions of 1
            return self.source.floats(name, columns)
        rows = self.source.stored_rows(name, num_rows, columns)
        if rows.type in FLOATS:
            return FLOATS[rows.type](rows.data)
        return self.tensors([name], [num_rows], columns).rows(np.arange(num_rows))

    def linear(self, modules: Sequence[str], num_rows: Sequence[int], columns: int, *, bias: bool) -> _Linear:
        """One matrix product for the projections `modules` of the same input; a single name has all the rows."""
        num_rows = num_rows if len(modules) > 1 else [sum(num_rows)]
        matrix = self.matrix(modules, num_rows, columns)
        if not bias:
            return _Linear.of(matrix, None)
        biases = [self.source.floats(f"{name}.bias", rows) for name, rows in zip(modules, num_rows, strict=True)]
        return _Linear.of(matrix, np.concatenate(biases))

    def matrix(self, modules: Sequence[str], num_rows: Sequence[int], columns: int) -> PackedMatrix:
        return self.tensors([f"{name}.weight" for name in modules], num_rows, columns)

    def tensors(self, names: Sequence[str], num_rows: Sequence[int], columns: int) -> PackedMatrix:
        return load_matrix(self.source, names, num_rows, columns, self.code_type_of)

    def norm(self, module: str, size: int) -> Floats:
        weight = self.source.floats(f"{module}.weight", size)
        return weight + np.float32(1) if self.config.one_plus_norms else weight


def _size(matrices: Sequence[PackedMatrix]) -> tuple[int, int]:
    """Parameters and bytes."""
    return sum(matrix.num_parameters for matrix in matrices), sum(matrix.num_bytes for matrix in matrices)


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data
