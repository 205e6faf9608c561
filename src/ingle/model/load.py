"""Builds a decoder from a weight source: each parameter is allocated once, on its device, and read into place."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ingle.model.architecture import DecoderConfig
from ingle.model.decoder import Decoder, DecoderLayer
from ingle.model.layers import Attention, GatedMLP, Linear, RMSNorm
from ingle.model.rope import cos_sin_table
from ingle.weights.source import WeightSource


@dataclass(frozen=True)
class Loader:
    """Reads named tensors of `source` as `dtype` onto `device`."""

    source: WeightSource
    dtype: torch.dtype
    device: torch.device

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        return self.stacked([name], [shape[0]], *shape[1:])

    def stacked(self, names: list[str], num_rows: list[int], *row_shape: int) -> torch.Tensor:
        """The tensors `names`, of `num_rows` rows each, one below the other in a single tensor."""
        out = torch.empty(sum(num_rows), *row_shape, dtype=self.dtype, device=self.device)
        for name, part in zip(names, out.split_with_sizes(num_rows), strict=True):
            self.source.load_into(name, part)
        return out

    def linear(self, names: list[str], num_rows: list[int], in_features: int, *, bias: bool) -> Linear:
        """One matrix product for the projections `names` of the same input."""
        weight = self.stacked([f"{name}.weight" for name in names], num_rows, in_features)
        return Linear(weight, self.stacked([f"{name}.bias" for name in names], num_rows) if bias else None)


def load_decoder(
    config: DecoderConfig,
    source: WeightSource,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
) -> Decoder:
    """Reads every parameter. Raises `ModelError` for missing or misshapen ones."""
    load = Loader(source, dtype, device)
    embedding = load.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    tied = config.tied_embeddings or "lm_head.weight" not in source
    lm_head = embedding if tied else load.tensor("lm_head.weight", config.vocab_size, config.hidden_size)

    # Two threads: reading a file and converting its numbers overlap; more would fight over memory bandwidth.
    with ThreadPoolExecutor(max_workers=2) as threads:
        prefixes = [f"model.layers.{index}" for index in range(config.num_layers)]
        layers = tuple(threads.map(lambda prefix: _load_layer(config, load, prefix), prefixes))
    return Decoder(
        config=config,
        embedding=embedding,
        layers=layers,
        norm=RMSNorm(load.tensor("model.norm.weight", config.hidden_size), config.norm_eps),
        lm_head=Linear(lm_head),
        cos_sin=cos_sin_table(config.rope, max_model_len, config.max_position_embeddings).to(device),
    )


def _load_layer(config: DecoderConfig, load: Loader, prefix: str) -> DecoderLayer:
    def norm(name: str, size: int) -> RMSNorm:
        return RMSNorm(load.tensor(f"{prefix}.{name}.weight", size), config.norm_eps)

    def linear(names: list[str], num_rows: list[int], in_features: int, *, bias: bool) -> Linear:
        return load.linear([f"{prefix}.{name}" for name in names], num_rows, in_features, bias=bias)

    hidden, inner = config.hidden_size, config.intermediate_size
    return DecoderLayer(
        input_norm=norm("input_layernorm", hidden),
        attention=Attention(
            qkv=linear(
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                [config.q_size, config.kv_size, config.kv_size],
                hidden,
                bias=config.qkv_bias,
            ),
            out=linear(["self_attn.o_proj"], [hidden], config.q_size, bias=config.output_bias),
            q_norm=norm("self_attn.q_norm", config.head_dim) if config.qk_norm else None,
            k_norm=norm("self_attn.k_norm", config.head_dim) if config.qk_norm else None,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
        ),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        mlp=GatedMLP(
            gate_up=linear(["mlp.gate_proj", "mlp.up_proj"], [inner, inner], hidden, bias=config.mlp_bias),
            down=linear(["mlp.down_proj"], [hidden], inner, bias=config.mlp_bias),
        ),
    )
