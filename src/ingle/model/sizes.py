"""A model's sizes, from which memory, tables and the roofline are planned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class KvLayout:
    """What a token adds to the KV cache of a layer: [sides, heads, dim] numbers."""

    sides: int
    """2 for keys and values; 1 for a latent, which is both."""
    heads: int
    dim: int

    @property
    def num_elements(self) -> int:
        return self.sides * self.heads * self.dim


class ModelConfig(Protocol):
    """`DecoderConfig` says what each one is."""

    @property
    def family(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def mlp_elements_per_token(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_size(self) -> int: ...
    @property
    def attention_elements_per_token(self) -> int: ...
    @property
    def kv_layout(self) -> KvLayout: ...
    @property
    def kv_elements_per_token(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True)
class Mixture:
    """The experts of all layers together, of which a token reads and computes its share only."""

    num_experts: int
    """Of a layer."""
    top_k: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True)
class WeightSizes:
    """Parameters and bytes of a loaded model, each pair of numbers in that order."""

    total: tuple[int, int]
    head: tuple[int, int]
    """The output head's matrix."""
    looked_up: tuple[int, int]
    """The embedding's, where it is not the head's as well."""
    mixture: Mixture | None = None
