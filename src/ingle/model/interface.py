"""What the engine asks of a model. Two things answer: ingle's own decoder, and transformers' code (`fallback`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from ingle.kernels.batch import Batch, KvCache
from ingle.kernels.group import Border, LogitsShare
from ingle.model.sizes import Mixture, ModelConfig
from ingle.weights.matrix import Weight


class Model(Protocol):
    """Tokens in, hidden states out; `logits` turns the rows that are asked for into logits."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may capture a step: nothing in it depends on the host or on the values of tensors."""
        ...

    @property
    def border(self) -> Border | None:
        """Of a stage of a pipeline to those before and behind it; None for a whole model."""
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

    def forward(self, batch: Batch, kv_cache: KvCache) -> torch.Tensor:
        """Hidden states [T, E] after the last norm. Writes the step's keys and values into kv_cache."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, vocab_size] for hidden states [R, E]."""
        ...

    def logits_share(self, hidden: torch.Tensor) -> LogitsShare | None:
        """Of `logits` the part that is here, where ranks have parts; None where all of them are here."""
        ...

    def parameters(self) -> Iterator[torch.Tensor | Weight]:
        """Vectors and matrices; the same object may come twice."""
        ...
