"""What operators are told of a model beside its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]
"""Of a gated MLP: x * sigmoid(x), or x * Phi(x) with Phi approximated by tanh (https://arxiv.org/abs/1606.08415). Or
the whole of gpt-oss' gate: x * sigmoid(1.702 * x) times what is gated plus 1, after both were cut off at 7."""
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class AttentionOptions:
    """How scores become weights."""

    scale: float
    """Factor on the products of queries and keys."""
    window: int | None = None
    """How many keys a token sees at most, its own and the last before it; None for all (https://arxiv.org/abs/2310.06825)."""
    softcap: float | None = None
    """Scaled scores s become softcap * tanh(s / softcap) (https://arxiv.org/abs/2408.00118)."""


@dataclass(frozen=True)
class RouterConfig:
    """How a token chooses its experts and what each of them weighs, in Hugging Face's terms."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    """The weights of the chosen experts are made to sum up to 1."""
    routed_scaling_factor: float = 1.0
    num_groups: int = 1
    """Experts lie in groups of equal size; a token chooses among those of its `topk_group` best groups only."""
    topk_group: int = 1
    group_experts: int = 1
    """A group is as good as the sum of the scores of this many of its best experts."""
