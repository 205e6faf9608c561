"""Writes checkpoints as llama.cpp's `convert_hf_to_gguf.py` would, by the `gguf` package's own table of names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.weights.gguf_blocks import random_blocks

ARCHITECTURES = {
    "gpt_oss": "gpt-oss",
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
F32 = gguf.GGMLQuantizationType.F32


def write_gguf_model(
    folder: Path,
    path: Path,
    matrices: gguf.GGMLQuantizationType = F32,
    max_part_tensors: int = 0,
    *,
    stacks_experts: bool = True,
    random_types: Sequence[str] = (),
) -> Path:
    """The checkpoint in `folder`, its matrices stored as `matrices` where their rows allow, as one .gguf file.

    With `max_part_tensors` it is split into files of so many tensors, and the path of the first is returned. Without
    `stacks_experts` each expert has tensors of its own, as in the first files of Mixtral.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(
        path, arch, split_max_tensors=max_part_tensors, small_first_shard=bool(max_part_tensors)
    )  # fmt: skip
    _add_metadata(writer, config)
    _add_experts(writer, config)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors = load_file(folder / "model.safetensors")
    if config["model_type"] == "gpt_oss":
        tensors = _apart(tensors)
    tensors = (_stacked(tensors) if stacks_experts else tensors) | _rope_tensors(config)
    turns = cycle(random_types)
    for name, values in tensors.items():
        stored_name = _expert_name(name) or names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored_name is not None, f"the gguf package has no name for {name}"
        values = _converted(config, arch, name, values)
        is_matrix = values.ndim > 1 and not name.endswith(
            ("mlp.gate.weight", "moe.gate.weight", "router.weight", ".bias")
        )
        if random_types and is_matrix and name != "model.embed_tokens.weight":
            kind_name, columns = next(turns), values.shape[-1]
            std = columns**-0.5
            data = random_blocks(kind_name, values.size // columns, columns, std=std, seed=len(stored_name))
            writer.add_tensor(
                stored_name, data.reshape(*values.shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind_name]
            )
        elif is_matrix and values.shape[-1] % gguf.GGML_QUANT_SIZES[matrices][0] == 0:
            writer.add_tensor(stored_name, gguf.quantize(values, matrices), raw_dtype=matrices)
        else:
            writer.add_tensor(stored_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return parts[0] if parts else path


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] != "gemma2":
        writer.add_rope_freq_base(rope["rope_theta"])
    if config["model_type"] == "phi3":
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        writer.add_sliding_window(config["sliding_window"] or 0)
        original = rope.get("original_max_position_embeddings") or config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
    else:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["model_type"].startswith(("gemma", "gpt_oss")):
        writer.add_sliding_window(config["sliding_window"])
        for key, add in (
            ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
            ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ):
            if config.get(key) is not None:
                add(config[key])


def _add_experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    num_experts = config.get("num_experts", config.get("num_local_experts"))
    if num_experts is not None:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _expert_name(name: str) -> str | None:
    match = EXPERT.fullmatch(name)
    if match is None:
        return None
    layer, expert, projection = match.groups()
    return f"blk.{layer}.ffn_{PROJECTIONS.get(projection, projection).removesuffix('_proj')}.{expert}.weight"


def _apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss' gates and up projections in tensors of their own, outputs before inputs."""
    made: dict[str, np.ndarray] = {}
    for name, values in tensors.items():
        experts, found, kind = name.rpartition(".experts.")
        suffix = "bias" if kind.endswith("_bias") else "weight"
        rows = values.swapaxes(-1, -2) if found and suffix == "weight" else values
        if kind.startswith("gate_up_proj"):
            for first, part in enumerate(("gate_proj", "up_proj")):
                made[f"{experts}.experts.{part}.{suffix}"] = np.ascontiguousarray(rows[:, first::2])
        elif kind.startswith("down_proj"):
            made[f"{experts}.experts.down_proj.{suffix}"] = np.ascontiguousarray(rows)
        else:
            made[f"{name}.weight" if name.endswith(".sinks") else name] = values
    return made


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the experts of a layer in one tensor, under the names by which the package knows it."""
    experts: dict[str, dict[int, np.ndarray]] = {}
    others = {}
    for name, values in tensors.items():
        if match := EXPERT.fullmatch(name):
            layer, expert, projection = match.groups()
            stack = f"model.layers.{layer}.mlp.experts.{PROJECTIONS.get(projection, projection)}.weight"
            experts.setdefault(stack, {})[int(expert)] = values
        else:
            others[name] = values
    return others | {name: np.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def _rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "longrope":
        return {}
    return {f"rope_factors_{kind}.weight": np.array(rope[f"{kind}_factor"], np.float32) for kind in ("long", "short")}


def _converted(config: dict[str, Any], arch: str, name: str, values: np.ndarray) -> np.ndarray:
    values = values.squeeze()
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if arch == "llama" and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
    return values
