"""How a model is laid over several GPUs: tensor parallelism splits every matrix, pipeline parallelism the layers.

What one GPU then holds is a model of its own to the engine's memory plan: a `Shard`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ingle.kv import ITEMSIZES, KvSpec, group_layers
from ingle.model.architecture import DecoderConfig
from ingle.model.count import count_experts, count_layer
from ingle.model.share import Division
from ingle.model.sizes import Mixture, WeightSizes
from ingle.model.stages import divided
from ingle.plan.formats import Held


@dataclass(frozen=True)
class Layout:
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    on_cpu: bool = False

    @property
    def num_gpus(self) -> int:
        return 0 if self.on_cpu else self.tensor_parallel * self.pipeline_parallel

    @property
    def name(self) -> str:
        if self.on_cpu:
            return "CPU"
        if self.num_gpus == 1:
            return "1 GPU"
        parts = (("TP", self.tensor_parallel), ("PP", self.pipeline_parallel))
        return " x ".join(f"{kind} {size}" for kind, size in parts if size > 1)


@dataclass(frozen=True)
class Shard:
    """What one GPU has of a model, as the memory plan sees a model (`ingle.model.sizes.ModelConfig`)."""

    family: str
    vocab_size: int
    hidden_size: int
    mlp_elements_per_token: int
    num_layers: int
    head_dim: int
    q_size: int
    attention_elements_per_token: int
    windows: tuple[int | None, ...]
    max_position_embeddings: int
    kv_sides: int
    kv_heads: int
    kv_dim: int

    def kv_spec(self, dtype: str) -> KvSpec:
        groups = group_layers(self.windows or (None,) * self.num_layers)
        return KvSpec(groups, self.kv_sides, self.kv_heads, self.kv_dim, dtype)


def shard(decoder: DecoderConfig, layers: range, tensor_parallel: int) -> Shard:
    """The last layers have the logits, which every GPU has whole."""
    share = share_config(decoder, tensor_parallel)
    kv = share.kv_spec(next(iter(ITEMSIZES)))
    return Shard(
        family=share.family,
        vocab_size=share.vocab_size if layers.stop == decoder.num_layers else 1,
        hidden_size=share.hidden_size,
        mlp_elements_per_token=share.mlp_elements_per_token,
        num_layers=len(layers),
        head_dim=share.head_dim,
        q_size=share.q_size,
        attention_elements_per_token=share.attention_elements_per_token,
        windows=tuple(share.windows[layer] for layer in layers) if share.windows else (),
        max_position_embeddings=share.max_position_embeddings,
        kv_sides=kv.sides,
        kv_heads=kv.heads,
        kv_dim=kv.dim,
    )


@lru_cache(maxsize=64)
def share_config(decoder: DecoderConfig, tensor_parallel: int) -> DecoderConfig:
    """What each of so many GPUs has of every layer."""
    return decoder if tensor_parallel == 1 else Division.of(decoder, tensor_parallel).share


def stages(decoder: DecoderConfig, held: Held, tensor_parallel: int, num_stages: int) -> list[range]:
    """The layers of each stage of a pipeline, such that the fullest holds as little as it can.

    Raises `ValueError` for more stages than layers.
    """
    sizes = [_layer_bytes(decoder, held, tensor_parallel, layer) for layer in range(decoder.num_layers)]
    ends = _end_bytes(decoder, held, tensor_parallel)
    sizes[0] += ends
    sizes[-1] += ends
    return divided(sizes, num_stages)


def weight_bytes(decoder: DecoderConfig, held: Held, layers: range, tensor_parallel: int, num_stages: int) -> int:
    """Of one GPU."""
    total = sum(_layer_bytes(decoder, held, tensor_parallel, layer) for layer in layers)
    first, last = layers.start == 0, layers.stop == decoder.num_layers
    copies = first + last - (first and last and decoder.tied_embeddings)
    norm = int(decoder.hidden_size * held.other_bytes) if last else 0
    return total + norm + copies * _end_bytes(decoder, held, tensor_parallel)


def _layer_bytes(decoder: DecoderConfig, held: Held, tensor_parallel: int, layer: int) -> int:
    count = count_layer(share_config(decoder, tensor_parallel), layer)
    return int((count.matrices + count.experts) * held.matrix_bytes + count.repeated * held.other_bytes)


def _end_bytes(decoder: DecoderConfig, held: Held, tensor_parallel: int) -> int:
    """Of the embedding, and of the head."""
    rows = share_config(decoder, tensor_parallel).vocab_rows or decoder.vocab_size
    return int(rows * decoder.hidden_size * held.other_bytes)


def weight_sizes(decoder: DecoderConfig, held: Held) -> WeightSizes:
    """Of the whole model, for the roofline."""
    counts = [count_layer(decoder, layer) for layer in range(decoder.num_layers)]
    end = decoder.vocab_size * decoder.hidden_size
    matrices = sum(count.matrices + count.experts for count in counts)
    others = sum(count.repeated for count in counts) + decoder.hidden_size
    ends = end * (1 if decoder.tied_embeddings else 2)
    mixture = None
    if decoder.moe is not None:
        experts = count_experts(decoder, decoder.moe.layers)
        router = decoder.moe.router
        mixture = Mixture(router.num_experts, router.top_k, experts, int(experts * held.matrix_bytes))
    return WeightSizes(
        total=(matrices + others + ends, int(matrices * held.matrix_bytes + (others + ends) * held.other_bytes)),
        head=(end, int(end * held.other_bytes)),
        looked_up=(0, 0) if decoder.tied_embeddings else (end, int(end * held.other_bytes)),
        mixture=mixture,
    )
