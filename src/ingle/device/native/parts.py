"""The parts of a decoder's layer: their weights, and the structures by which the CPU's kernels know them.

A structure points into arrays and other structures, which its part keeps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingle.kernels.cpu import library
from ingle.kernels.cpu.library import ACTIVATIONS, SCORINGS, Layer, Matrix, Projection
from ingle.kernels.options import RouterConfig
from ingle.model.architecture import DecoderConfig, MlaConfig
from ingle.weights.packed_matrix import PackedMatrix

Floats = npt.NDArray[np.float32]


def address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data


def _given(*vectors: Floats | None) -> list[Floats]:
    return [vector for vector in vectors if vector is not None]


@dataclass(frozen=True)
class Linear:
    matrix: PackedMatrix
    bias: Floats | None
    described: Projection

    @classmethod
    def of(cls, matrix: PackedMatrix, bias: Floats | None) -> Linear:
        parts = [ctypes.pointer(part.matrix) for part in matrix.parts]
        pointers = (ctypes.POINTER(Matrix) * len(parts))(*parts)
        described = Projection(parts=pointers, bias=address(bias), num_parts=len(parts), rows=matrix.num_rows)
        return cls(matrix, bias, described)


class Part(Protocol):
    """What stands in a place of a layer."""

    @property
    def matrices(self) -> list[PackedMatrix]: ...

    @property
    def expert_matrices(self) -> list[PackedMatrix]:
        """Those of them that are experts' of a mixture."""
        ...

    @property
    def vectors(self) -> list[Floats]: ...

    def fields(self) -> dict[str, object]:
        """Of `library.Layer`."""
        ...


@dataclass(frozen=True)
class NativeAttention:
    """Up to the output projection: `ingle.model.layers.Attention`."""

    qkv: Linear
    q_norm: Floats | None
    k_norm: Floats | None
    sinks: Floats | None = None

    @property
    def matrices(self) -> list[PackedMatrix]:
        return [self.qkv.matrix]

    @property
    def expert_matrices(self) -> list[PackedMatrix]:
        return []

    @property
    def vectors(self) -> list[Floats]:
        return _given(self.q_norm, self.k_norm, self.qkv.bias, self.sinks)

    def fields(self) -> dict[str, object]:
        vectors = {"q_norm": address(self.q_norm), "k_norm": address(self.k_norm), "sinks": address(self.sinks)}
        return {"qkv": self.qkv.described, **vectors}


@dataclass(frozen=True)
class NativeLatentAttention:
    """Up to the output projection: `ingle.model.mla.LatentAttention`."""

    q_down: Linear | None
    """To the queries' own latent, where they have one."""
    q_norm: Floats | None
    q_up: Linear
    kv_down: Linear
    kv_norm: Floats
    key_up: tuple[PackedMatrix, ...]
    """Of each head, [kv_lora_rank, qk_nope_head_dim]"""
    value_up: tuple[PackedMatrix, ...]
    """Of each head, [v_head_dim, kv_lora_rank]"""
    described: library.Latent

    @classmethod
    def of(
        cls,
        config: MlaConfig,
        queries: tuple[Linear | None, Floats | None, Linear],
        keys: tuple[Linear, Floats],
        key_up: tuple[PackedMatrix, ...],
        value_up: tuple[PackedMatrix, ...],
        eps: float,
    ) -> NativeLatentAttention:
        """`queries` and `keys`: each time what leads down, the latent's norm, and what leads queries up."""
        (q_down, q_norm, q_up), (kv_down, kv_norm) = queries, keys
        described = library.Latent(
            q_up=q_up.described,
            kv_down=kv_down.described,
            key_up=_pointers(key_up),
            value_up=_pointers(value_up),
            q_norm=address(q_norm),
            kv_norm=address(kv_norm),
            num_heads=len(key_up),
            rank=config.kv_lora_rank,
            nope_dim=config.qk_nope_head_dim,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            eps=eps,
            interleaved=config.rope_interleave,
        )
        if q_down is not None:
            described.q_down = q_down.described
        return cls(q_down, q_norm, q_up, kv_down, kv_norm, key_up, value_up, described)

    @property
    def _linears(self) -> list[Linear]:
        return [linear for linear in (self.q_down, self.q_up, self.kv_down) if linear is not None]

    @property
    def matrices(self) -> list[PackedMatrix]:
        return [*(linear.matrix for linear in self._linears), *self.key_up, *self.value_up]

    @property
    def expert_matrices(self) -> list[PackedMatrix]:
        return []

    @property
    def vectors(self) -> list[Floats]:
        return _given(self.q_norm, self.kv_norm, *(linear.bias for linear in self._linears))

    def fields(self) -> dict[str, object]:
        return {"latent": ctypes.pointer(self.described)}


def _pointers(matrices: Sequence[PackedMatrix]) -> ctypes.Array[ctypes._Pointer[Matrix]]:
    """Of matrices of one part each."""
    pointers = [ctypes.pointer(part.matrix) for matrix in matrices for part in matrix.parts]
    return (ctypes.POINTER(Matrix) * len(pointers))(*pointers)


@dataclass(frozen=True)
class NativeMlp:
    gate_up: Linear
    down: Linear

    @property
    def matrices(self) -> list[PackedMatrix]:
        return [self.gate_up.matrix, self.down.matrix]

    @property
    def expert_matrices(self) -> list[PackedMatrix]:
        return []

    @property
    def vectors(self) -> list[Floats]:
        return _given(self.gate_up.bias, self.down.bias)

    def fields(self) -> dict[str, object]:
        return {"gate_up": self.gate_up.described, "down": self.down.described}


@dataclass(frozen=True)
class NativeMixture:
    """`ingle.model.moe.SparseMoe`."""

    router: Floats
    """[num_experts, hidden_size]"""
    router_bias: Floats | None
    selection_bias: Floats | None
    experts: tuple[NativeMlp, ...]
    shared: NativeMlp | None
    shared_gate: Floats | None
    """[hidden_size]"""
    described: library.Mixture

    @classmethod
    def of(
        cls,
        config: RouterConfig,
        routing: tuple[Floats, Floats | None],
        selection_bias: Floats | None,
        experts: tuple[NativeMlp, ...],
        shared: NativeMlp | None,
        shared_gate: Floats | None,
    ) -> NativeMixture:
        """`routing`: the router's matrix, and its bias."""
        router, router_bias = routing
        described = library.Mixture(
            router=address(router),
            router_bias=address(router_bias),
            selection_bias=address(selection_bias),
            gate_up=(Projection * len(experts))(*(expert.gate_up.described for expert in experts)),
            down=(Projection * len(experts))(*(expert.down.described for expert in experts)),
            shared_gate=address(shared_gate),
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
        return cls(router, router_bias, selection_bias, experts, shared, shared_gate, described)

    @property
    def expert_matrices(self) -> list[PackedMatrix]:
        return [matrix for expert in self.experts for matrix in expert.matrices]

    @property
    def matrices(self) -> list[PackedMatrix]:
        return self.expert_matrices + ([] if self.shared is None else self.shared.matrices)

    @property
    def vectors(self) -> list[Floats]:
        experts = [vector for expert in self.experts for vector in expert.vectors]
        return _given(self.router, self.router_bias, self.selection_bias, self.shared_gate, *experts)

    def fields(self) -> dict[str, object]:
        return {"mixture": ctypes.pointer(self.described)}


@dataclass(frozen=True)
class NativeLayer:
    input_norm: Floats
    attention: Part
    out: Linear
    attention_post_norm: Floats | None
    mlp_norm: Floats
    mlp: Part
    mlp_post_norm: Floats | None

    @property
    def matrices(self) -> list[PackedMatrix]:
        return [*self.attention.matrices, self.out.matrix, *self.mlp.matrices]

    @property
    def vectors(self) -> list[Floats]:
        norms = (self.input_norm, self.attention_post_norm, self.mlp_norm, self.mlp_post_norm)
        return _given(*norms, *self.attention.vectors, self.out.bias, *self.mlp.vectors)

    def described(self, config: DecoderConfig, index: int) -> Layer:
        options = config.attention(index)
        return Layer(
            out=self.out.described,
            **self.attention.fields(),
            **self.mlp.fields(),
            input_norm=address(self.input_norm),
            attention_post_norm=address(self.attention_post_norm),
            mlp_norm=address(self.mlp_norm),
            mlp_post_norm=address(self.mlp_post_norm),
            window=options.window or 0,
            scale=options.scale,
            softcap=options.softcap or 0.0,
            qk_eps=config.norm_eps if config.qk_norm else 0.0,
            activation=ACTIVATIONS[config.activation],
            rope=config.rope_index(index),
        )
