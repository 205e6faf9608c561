"""What a decoder is made of: the dozen choices in which dense families differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its scaling, in Hugging Face's terms."""

    theta: float
    rotary_dim: int
    """Leading dimensions of each head that rotate; the rest pass through."""
    type: Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    """type "factors": divides each inverse frequency, as GGUF files store Llama 3's scaling."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norms, grouped-query attention and a gated MLP."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of Q and K, before the rotation."""
    activation: Activation = "silu"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token adds to the KV cache, all layers together."""
        return 2 * self.num_layers * self.kv_size
