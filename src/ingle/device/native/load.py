"""Reads a decoder for the CPU's kernels from a weight source, without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ingle.device.native.decoder import NativeDecoder
from ingle.device.native.parts import (
    Floats,
    Linear,
    NativeAttention,
    NativeLatentAttention,
    NativeLayer,
    NativeMixture,
    NativeMlp,
    Part,
)
from ingle.kernels.cpu.library import Layer
from ingle.model.architecture import LATENT_NORM_EPS, DecoderConfig, MlaConfig, MoeConfig
from ingle.model.mixture_names import bias_of, mixture_names
from ingle.model.rope import cos_sin_tables, query_factors
from ingle.weights.code_types import CodeType
from ingle.weights.packed_matrix import PackedMatrix, load_matrix, pack_matrix
from ingle.weights.source import FLOATS, ExpertNames, StoredRows, WeightSource


def load_native_decoder(
    config: DecoderConfig,
    source: WeightSource,
    max_model_len: int,
    code_type_of: Callable[[str], CodeType],
    count_layers: Callable[[int], None] = lambda done: None,
    *,
    rounds: bool = False,
) -> NativeDecoder:
    """Reads every parameter of a decoder that is as `checkpoint.as_stored` says, for sequences of up to that length.

    `code_type_of` decides how matrices are held, as for `packed_matrix.load_matrix`; `count_layers` is told how many
    layers are there; `rounds` is the decoder's.
    Raises `ModelError` for missing or misshapen ones.
    """
    read, names = _Reader(source, config, code_type_of), config.names
    embedding = read.matrix([names.embedding], [config.vocab_size], config.hidden_size)
    tied, rows = config.tied_embeddings, [config.vocab_size]
    head = embedding if tied else read.matrix([names.lm_head], rows, config.hidden_size)
    layers = []
    for index in range(config.num_layers):
        layers.append(read.layer(index))
        count_layers(index + 1)
    return NativeDecoder(
        config=config,
        embedding=embedding,
        layers=tuple(layers),
        described=(Layer * len(layers))(*(layer.described(config, index) for index, layer in enumerate(layers))),
        norm=read.norm(names.norm, config.hidden_size),
        head=head,
        cos_sin=cos_sin_tables(config, max_model_len, np),
        query_factors=query_factors(config, max_model_len),
        rounds=rounds,
    )


@dataclass(frozen=True)
class _Reader:
    source: WeightSource
    config: DecoderConfig
    code_type_of: Callable[[str], CodeType]

    def layer(self, index: int) -> NativeLayer:
        config, names, prefix = self.config, self.config.names, f"{self.config.names.layers}.{index}"
        hidden = config.hidden_size

        def norm(name: str) -> Floats:
            return self.norm(f"{prefix}.{name}", hidden)

        return NativeLayer(
            input_norm=norm(names.input_norm),
            attention=self.attention(prefix) if config.mla is None else self.latent_attention(config.mla, prefix),
            out=self.linear(
                [f"{prefix}.{names.attention_out}"], [hidden], config.attended_size, bias=config.output_bias
            ),
            attention_post_norm=norm(names.attention_post_norm) if config.post_norms else None,
            mlp_norm=norm(names.mlp_norm),
            mlp=self.mlp(index, prefix),
            mlp_post_norm=norm(names.mlp_post_norm) if config.post_norms else None,
        )

    def attention(self, prefix: str) -> Part:
        config, names = self.config, self.config.names
        qkv, rows = [f"{prefix}.{name}" for name in names.qkv], [config.q_size, config.kv_size, config.kv_size]
        return NativeAttention(
            qkv=self.linear(qkv, rows, config.hidden_size, bias=config.qkv_bias),
            q_norm=self.norm(f"{prefix}.{names.q_norm}", config.head_dim) if config.qk_norm else None,
            k_norm=self.norm(f"{prefix}.{names.k_norm}", config.head_dim) if config.qk_norm else None,
            sinks=self.source.floats(f"{prefix}.{names.sinks}", config.num_heads) if config.sinks else None,
        )

    def latent_attention(self, mla: MlaConfig, prefix: str) -> Part:
        config, hidden = self.config, self.config.hidden_size

        def linear(name: str, num_rows: int, columns: int, *, bias: bool = False) -> Linear:
            return self.linear([f"{prefix}.self_attn.{name}"], [num_rows], columns, bias=bias)

        q_rank, rank = mla.q_lora_rank, mla.kv_lora_rank
        q_down = q_norm = None
        if q_rank is not None:
            q_down = linear("q_a_proj", q_rank, hidden, bias=config.qkv_bias)
            q_norm = self.norm(f"{prefix}.self_attn.q_a_layernorm", q_rank)
        q_up = linear("q_proj" if q_rank is None else "q_b_proj", config.q_size, q_rank or hidden)
        kv_down = linear("kv_a_proj_with_mqa", rank + mla.qk_rope_head_dim, hidden, bias=config.qkv_bias)
        kv_norm = self.norm(f"{prefix}.self_attn.kv_a_layernorm", rank)
        up_rows = config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        heads = self.float_matrix(f"{prefix}.self_attn.kv_b_proj.weight", up_rows, rank)
        key_up, value_up = np.split(heads.reshape(config.num_heads, -1, rank), [mla.qk_nope_head_dim], axis=1)
        return NativeLatentAttention.of(
            mla,
            queries=(q_down, q_norm, q_up),
            keys=(kv_down, kv_norm),
            key_up=tuple(self.packed(matrix.T) for matrix in key_up),
            value_up=tuple(self.packed(matrix) for matrix in value_up),
            eps=LATENT_NORM_EPS,
        )

    def mlp(self, index: int, prefix: str) -> Part:
        config, names = self.config, self.config.names
        if config.moe is not None and index in config.moe.layers:
            return self.mixture(config.moe, prefix)
        hidden, inner = config.hidden_size, config.intermediate_size
        gate_up, down = [f"{prefix}.{name}" for name in names.gate_up], f"{prefix}.{names.mlp_down}"
        return NativeMlp(
            gate_up=self.linear(gate_up, [inner, inner], hidden, bias=config.mlp_bias),
            down=self.linear([down], [hidden], inner, bias=config.mlp_bias),
        )

    def mixture(self, config: MoeConfig, prefix: str) -> Part:
        names, hidden = mixture_names(self.source, config, prefix), self.config.hidden_size
        num_experts, shared_size = config.router.num_experts, config.shared_intermediate_size
        return NativeMixture.of(
            config.router,
            routing=(
                self.float_matrix(names.router, num_experts, hidden),
                self.source.floats(names.router_bias, num_experts) if config.router_bias else None,
            ),
            selection_bias=self.source.floats(names.selection_bias, num_experts) if config.selection_bias else None,
            experts=tuple(self.expert(each, config.intermediate_size, config.expert_biases) for each in names.experts),
            shared=self.expert(names.shared, shared_size) if shared_size else None,
            shared_gate=self.float_matrix(names.shared_gate, 1, hidden) if config.shared_gate else None,
        )

    def expert(self, names: ExpertNames, inner: int, has_biases: bool = False) -> NativeMlp:
        hidden, rows = self.config.hidden_size, [2 * inner // len(names.gate_up)] * len(names.gate_up)

        def linear(tensors: Sequence[str], num_rows: list[int], columns: int) -> Linear:
            biases = [self.source.floats(bias_of(name), size) for name, size in zip(tensors, num_rows, strict=True)]
            return Linear.of(self.tensors(tensors, num_rows, columns), np.concatenate(biases))

        if has_biases:
            return NativeMlp(linear(names.gate_up, rows, hidden), linear([names.down], [hidden], inner))
        return NativeMlp(
            gate_up=Linear.of(self.tensors(names.gate_up, rows, hidden), None),
            down=Linear.of(self.tensors([names.down], [hidden], inner), None),
        )

    def float_matrix(self, name: str, num_rows: int, columns: int) -> Floats:
        """[num_rows, columns], exactly as it is stored."""
        shape = self.source.shape(name)
        if num_rows == 1 and shape is not None and len(shape) == 1:  # GGUF's converter drops dimensions of 1
            return self.source.floats(name, columns)
        if not self.source.is_coded(name):
            rows = self.source.stored_rows(name, num_rows, columns)
            if rows.type in FLOATS:
                return FLOATS[rows.type](rows.data)
        return self.tensors([name], [num_rows], columns).rows(np.arange(num_rows))

    def packed(self, matrix: Floats) -> PackedMatrix:
        """As one that is stored in float32 would be."""
        stored = StoredRows("F32", np.ascontiguousarray(matrix).view(np.uint8))
        return pack_matrix([stored], matrix.shape[1], self.code_type_of)

    def linear(self, modules: Sequence[str], num_rows: Sequence[int], columns: int, *, bias: bool) -> Linear:
        """One matrix product for the projections `modules` of the same input; a single name has all the rows."""
        num_rows = num_rows if len(modules) > 1 else [sum(num_rows)]
        matrix = self.matrix(modules, num_rows, columns)
        if not bias:
            return Linear.of(matrix, None)
        biases = [self.source.floats(f"{name}.bias", rows) for name, rows in zip(modules, num_rows, strict=True)]
        return Linear.of(matrix, np.concatenate(biases))

    def matrix(self, modules: Sequence[str], num_rows: Sequence[int], columns: int) -> PackedMatrix:
        return self.tensors([f"{name}.weight" for name in modules], num_rows, columns)

    def tensors(self, names: Sequence[str], num_rows: Sequence[int], columns: int) -> PackedMatrix:
        return load_matrix(self.source, names, num_rows, columns, self.code_type_of)

    def norm(self, module: str, size: int) -> Floats:
        weight = self.source.floats(f"{module}.weight", size)
        return weight + np.float32(1) if self.config.one_plus_norms else weight
