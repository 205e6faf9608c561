"""What a decoder is made of: the dozen choices in which dense families differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ingle.errors import ConfigError
from ingle.kernels.options import Activation, AttentionOptions, RouterConfig
from ingle.kv import CODES, KvSpec, group_layers

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "factors", "ntk_steps"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and its scaling, in Hugging Face's terms."""

    theta: float
    rotary_dim: int
    """Leading dimensions of each head that rotate; the rest pass through."""
    original_max_position_embeddings: int
    """The length that the model was first made for, from which a scaling stretches."""
    type: RopeType = "default"
    """Those of Hugging Face, and "factors", as GGUF files store llama3, and "ntk_steps", as Qwen 1 scales."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor on cos and sin, for the temperature of attention; None for what the type works out."""
    attn_factor: float = 1.0
    """Factor on what "yarn" works out for that."""
    extrapolation_factor: float = 1.0
    """How much of the frequencies that "yarn" would keep it keeps."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    """Divides each inverse frequency: types "factors", and "longrope" within the original length."""
    long_factors: tuple[float, ...] = ()
    """The same for "longrope" beyond the original length."""


@dataclass(frozen=True)
class WeightNames:
    """What a family's checkpoints call their tensors. Several names for one projection are stacked in that order."""

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    lm_head: str = "lm_head"
    layers: str = "model.layers"
    """Prefix of a layer's tensors, before its index."""
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Queries, keys, values: one after the other, or in one tensor."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    attention_out: str = "self_attn.o_proj"
    attention_post_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate, then up: two tensors, or one."""
    mlp_down: str = "mlp.down_proj"
    mlp_post_norm: str = "post_feedforward_layernorm"


@dataclass(frozen=True)
class MoeConfig:
    """The layers whose MLP is a mixture of experts (https://arxiv.org/abs/2101.03961)."""

    router: RouterConfig
    intermediate_size: int
    """Of each expert."""
    layers: frozenset[int]
    """Those that are sparse; the others have a dense MLP."""
    shared_intermediate_size: int = 0
    """Of the expert that every token passes, beside those it chooses; 0 for none."""
    shared_name: str = "shared_expert"
    shared_gate: bool = False
    """What the shared expert gives is scaled by a sigmoid of the token."""
    selection_bias: bool = False
    """A bias on the scores decides which experts are chosen, not what they weigh (https://arxiv.org/abs/2408.15664)."""
    float32_router: bool = False
    router_bias: bool = False
    expert_biases: bool = False
    """All projections of all experts have one."""


LATENT_NORM_EPS = 1e-6
"""Of the norms of latent attention's latents, whatever the configuration says of the others."""


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (https://arxiv.org/abs/2405.04434), in Hugging Face's terms."""

    q_lora_rank: int | None
    """Size of the queries' latent; None where they have none."""
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    """What rotates together are neighbours, not the two halves."""

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers that a token leaves in the cache of a layer: its latent, then the key that heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer with pre-norms, grouped-query attention and a gated MLP or a mixture of experts."""

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
    names: WeightNames = WeightNames()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of Q and K, before the rotation."""
    post_norms: bool = False
    """RMSNorm of what attention and MLP give, before it is added to the residual."""
    one_plus_norms: bool = False
    """Norms multiply by 1 + weight, in float32, where others round first and multiply by the weight."""
    activation: Activation = "silu"
    embedding_scale: float | None = None
    """Factor on the embeddings, rounded to their type."""
    attention_scale: float | None = None
    """Factor on the scores; None for head_dim ** -0.5."""
    windows: tuple[int | None, ...] = ()
    """Of each layer, how many keys a token sees at most, itself included; None for all. Empty: all, in every layer."""
    window_rope: RopeConfig | None = None
    """The rotation in layers with a window, where it is another."""
    sinks: bool = False
    """Each head attends to one more key, of a learned score, whose value is zero (https://arxiv.org/abs/2309.17453)."""
    attention_softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""
    logit_softcap: float | None = None
    """The same for the logits."""
    moe: MoeConfig | None = None
    mla: MlaConfig | None = None
    logn_length: int | None = None
    """Queries of tokens beyond this length n are multiplied by log(length so far) / log(n); None for no such factor."""
    vocab_rows: int | None = None
    """Of embedding and head, where this is one rank's share of a decoder (`ingle.model.share`); None for all."""
    stage: range | None = None
    """The layers of this stage of a pipeline; None for all. Whatever is said of layers counts all of them."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def attended_size(self) -> int:
        """Numbers that attention gives for a token, before its output projection."""
        return self.q_size if self.mla is None else self.num_heads * self.mla.v_head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layers(self) -> range:
        """That are here."""
        return range(self.num_layers) if self.stage is None else self.stage

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether the last norm and the head are here."""
        return self.layers.stop == self.num_layers

    def kv_spec(self, dtype: str) -> KvSpec:
        """The KV cache in a type, a key of `ingle.kv.ITEMSIZES` or one of its `CODES`. Raises `ConfigError`."""
        groups = group_layers(self.windows or (None,) * self.num_layers)
        if self.stage is not None:  # whose tables are those of all layers
            groups = tuple(group.of_layers(self.stage) for group in groups)
        if self.mla is not None:
            if dtype in CODES:
                raise ConfigError(
                    f"--kv-cache-dtype {dtype}: latent attention keeps one vector a token for all heads, a tenth of "
                    "what others do, and that is not held in 8 bits",
                    alternative="leave the flag out",
                )
            return KvSpec(groups, sides=1, heads=1, dim=self.mla.latent_dim, dtype=dtype)
        return KvSpec(groups, sides=2, heads=self.num_kv_heads, dim=self.head_dim, dtype=dtype)

    @property
    def attention_elements_per_token(self) -> int:
        """Numbers that the attention of a layer holds for one token at once, at most."""
        if self.mla is None:
            return 2 * self.q_size + 2 * self.kv_size
        # Queries, then each head's query and result in the latent's space.
        return self.q_size + 2 * self.num_heads * self.mla.kv_lora_rank + 2 * self.mla.latent_dim

    @property
    def mlp_elements_per_token(self) -> int:
        """Numbers that the MLP of a layer holds for one token at once, at most."""
        dense = 3 * self.intermediate_size
        if self.moe is None:
            return dense
        router, inner = self.moe.router, self.moe.intermediate_size
        sparse = (
            router.top_k * (inner + self.hidden_size) + 2 * router.num_experts + 3 * self.moe.shared_intermediate_size
        )
        return max(dense, sparse)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Every rotation that some layer uses."""
        return (self.rope,) if self.window_rope is None else (self.rope, self.window_rope)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def rope_index(self, layer: int) -> int:
        """Which of `ropes` a layer uses."""
        return int(self.window_rope is not None and self.window(layer) is not None)

    def attention(self, layer: int) -> AttentionOptions:
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return AttentionOptions(scale, self.window(layer), self.attention_softcap)
