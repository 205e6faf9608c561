"""What the engine asks of a model. Two things answer: ingle's own decoder, and transformers' code (`fallback`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from ingle.kernels.batch import Batch
from ingle.weights.formats import Weight


class ModelConfig(Protocol):
    """The sizes from which the engine plans memory and tables; `DecoderConfig` says what each one is."""

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
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def q_size(self) -> int: ...
    @property
    def kv_size(self) -> int: ...
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


class Model(Protocol):
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may capture a step: nothing in it depends on the host or on the values of tensors."""
        ...

    @property
    def embedding(self) -> Weight:
        """[vocab_size, hidden_size]"""
        ...

    @property
    def head(self) -> Weight:
        """[vocab_size, hidden_size]; the very object of `embedding` where they are tied."""
        ...

    @property
    def mixture(self) -> Mixture | None:
        """The part of `parameters` that are experts; None for a dense model, and for one that does not tell."""
        ...

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into kv_cache.

        kv_cache: [num_layers, 2, num_pages, page_size, num_kv_heads, head_dim].
        """
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] for hidden states [R, E]."""
        ...

    def parameters(self) -> Iterator[torch.Tensor | Weight]:
        """Vectors and matrices; the same object may come twice."""
        ...
