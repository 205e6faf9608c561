"""GGUF's metadata and tensor names in Hugging Face's terms. Names follow `gguf-py/gguf/constants.py` of llama.cpp."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any

from ingle.errors import ModelError
from ingle.weights.gguf import GgufFile


@dataclass(frozen=True)
class GgufArchitecture:
    """What tells one `general.architecture` from another."""

    model_type: str
    """Hugging Face's `model_type`."""
    class_name: str
    permutes_qk: bool
    """The converter has reordered the rows of the query and key projections, from rotary halves to adjacent pairs."""


ARCHITECTURES = {
    "llama": GgufArchitecture("llama", "LlamaForCausalLM", permutes_qk=True),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM", permutes_qk=False),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", permutes_qk=False),
}

_REQUIRED_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OPTIONAL_KEYS = {
    "num_key_value_heads": "attention.head_count_kv",
    "rope_theta": "rope.freq_base",
}

_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HF_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")

_MAX_ROPE_FACTORS = 4096

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_tensor_name(hf_name: str) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`; None for a name that GGUF has no word for."""
    match = _HF_NAME.fullmatch(hf_name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    if layer is None:
        return f"{_TOP_NAMES[module]}.{kind}" if module in _TOP_NAMES else None
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}" if module in _LAYER_NAMES else None


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Raises `ModelError` for an architecture that is missing or not supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: GGUF architecture {reprlib.repr(name)} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The `config.json` that the model would have, its values as the file gives them: the caller checks their ranges.

    Raises `ModelError` when the metadata lacks a value that the model cannot be built without, or describes a model
    that is not a plain dense decoder in one file.
    """
    architecture = architecture_of(file)
    _refuse_unsupported(file)
    embedding = file.tensors.get("token_embd.weight")
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_act": "silu",
        **{key: _require(file, gguf_key) for key, gguf_key in _REQUIRED_KEYS.items()},
        **{key: _get(file, gguf_key) for key, gguf_key in _OPTIONAL_KEYS.items()},
        **{key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")},
        "head_dim": _get(file, "attention.key_length", _get(file, "rope.dimension_count")),
        "vocab_size": embedding.shape[0] if embedding is not None else _require(file, "vocab_size"),
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "torch_dtype": _FLOAT_TYPES.get(next(iter(file.parameters_by_type), "")),
    }


def _refuse_unsupported(file: GgufFile) -> None:
    if file.metadata.get("split.count", 1) != 1:
        raise ModelError(
            f"{file.path}: one part of a model that is split over several GGUF files, which is not supported; "
            "join them with `llama-gguf-split --merge`"
        )
    if _get(file, "expert_count", 0) != 0:
        raise ModelError(f"{file.path}: a mixture-of-experts model, which is not supported yet")
    head_dim = _get(file, "attention.key_length")
    if head_dim != _get(file, "attention.value_length"):
        raise ModelError(f"{file.path}: keys and values have heads of different sizes, which is not supported")
    if head_dim is not None and head_dim != _get(file, "rope.dimension_count", head_dim):
        raise ModelError(f"{file.path}: only a part of each head is rotated, which is not supported")
    if _get(file, "rope.scaling.attn_factor", 1.0) != 1.0:
        raise ModelError(f"{file.path}: {_full(file, 'rope.scaling.attn_factor')} other than 1 is not supported")


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """As llama.cpp reads it: type linear and factor 1 (which it also writes as 0) unless the metadata says otherwise.

    The llama3 scaling has no metadata of its own. The converter works it out into a divisor for each rotary frequency,
    the tensor `rope_freqs.weight`, which is given as the type `factors`.
    """
    kind = _get(file, "rope.scaling.type", "linear")
    factor = _get(file, "rope.scaling.factor", _get(file, "rope.scale_linear")) or 1.0
    if "rope_freqs.weight" in file.tensors:
        if kind not in ("none", "linear") or factor != 1.0:
            raise ModelError(f"{file.path}: rope_freqs.weight together with another rope scaling is not supported")
        return {"rope_type": "factors", "factors": _rope_factors(file)}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(f"{file.path}: rope scaling {reprlib.repr(kind)} is not supported, only linear and yarn")
    scaling = {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": _get(file, "rope.scaling.original_context_length"),
        "beta_fast": _get(file, "rope.scaling.yarn_beta_fast"),
        "beta_slow": _get(file, "rope.scaling.yarn_beta_slow"),
    }
    return {key: value for key, value in scaling.items() if value is not None}


def _rope_factors(file: GgufFile) -> list[float]:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.num_elements > _MAX_ROPE_FACTORS:
        raise ModelError(f"{file.path}: rope_freqs.weight is {tensor.type} {tensor.shape}, not a short F32 vector")
    return [float(factor) for factor in tensor.data.view("<f4")]


def _full(file: GgufFile, key: str) -> str:
    return f"{file.metadata['general.architecture']}.{key}"


def _get(file: GgufFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(_full(file, key), default)


def _require(file: GgufFile, key: str) -> Any:
    value = _get(file, key)
    if value is None:
        raise ModelError(f"{file.path}: the metadata has no {_full(file, key)}, which the model cannot do without")
    return value
