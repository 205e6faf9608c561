"""GGUF's metadata and tensor names in Hugging Face's terms. Names follow `gguf-py/gguf/constants.py` of llama.cpp."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ingle.errors import ModelError
from ingle.weights.gguf import GgufFile

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
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_MOE_NAMES = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
"""All experts' gates lie in one tensor, and so do their other projections. The first files had a tensor for each."""
_GPT_OSS_NAMES = _MOE_NAMES | {
    "self_attn.sinks": "attn_sinks",
    "post_attention_layernorm": "post_attention_norm",
    "mlp.router": "ffn_gate_inp",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_MOE_KEYS = {"num_experts": ("expert_count", None), "num_experts_per_tok": ("expert_used_count", None)}
_PHI3_NAMES = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}


@dataclass(frozen=True)
class GgufArchitecture:
    """What tells one `general.architecture` from another."""

    model_type: str
    """Hugging Face's `model_type`."""
    class_name: str
    names: Mapping[str, str] = field(default_factory=lambda: _LAYER_NAMES)
    """What a layer's modules are called in the file."""
    keys: Mapping[str, tuple[str, float | bool | None]] = field(default_factory=dict)
    """More of the configuration: the file's key, and the value that llama.cpp takes where the file has none. 0 is none
    too: no window, no cap."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """Flags of the configuration that say of biases whether they are there, and the tensor of the first layer that
    tells. Other families have them always, or never."""
    permutes_qk: bool = False
    """The converter has reordered the rows of the query and key projections, from rotary halves to adjacent pairs."""
    one_plus_norms: bool = False
    """The converter has added 1 to the weights of the norms, which Hugging Face adds when it multiplies."""
    has_experts: bool = False
    keeps_yarn_ends: bool = False
    """Yarn's range of frequencies ends between two of them, which the file does not say."""
    scales_queries_by_width_at: int | None = None
    """The number of layers of the one size that divides queries by sqrt(hidden_size / heads), which the file does not
    say; all others divide by sqrt(head_dim)."""


_ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
MIXTRAL = GgufArchitecture(
    "mixtral",
    "MixtralForCausalLM",
    names=_LAYER_NAMES | _MOE_NAMES,
    keys=_MOE_KEYS,
    permutes_qk=True,
    has_experts=True,
)
"""What a file of the architecture "llama" is that has experts."""
ARCHITECTURES = {
    "llama": GgufArchitecture(
        "llama", "LlamaForCausalLM", biases={**_ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_gate.bias"}, permutes_qk=True
    ),
    "qwen2": GgufArchitecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture("qwen3", "Qwen3ForCausalLM", biases=_ATTENTION_BIAS),
    "qwen2moe": GgufArchitecture(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        names=_LAYER_NAMES | _MOE_NAMES,
        keys=_MOE_KEYS
        | {
            "moe_intermediate_size": ("expert_feed_forward_length", None),
            "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", None),
            "norm_topk_prob": ("expert_weights_norm", False),
        },
        biases={"qkv_bias": "blk.0.attn_q.bias"},
        has_experts=True,
    ),
    "qwen3moe": GgufArchitecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        names=_LAYER_NAMES | _MOE_NAMES,
        keys=_MOE_KEYS
        | {
            "moe_intermediate_size": ("expert_feed_forward_length", None),
            "norm_topk_prob": ("expert_weights_norm", True),
        },
        biases=_ATTENTION_BIAS,
        has_experts=True,
    ),
    "gemma2": GgufArchitecture(
        "gemma2",
        "Gemma2ForCausalLM",
        names=_LAYER_NAMES | _GEMMA_NAMES,
        keys={
            "sliding_window": ("attention.sliding_window", 4096),
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
        },
        biases=_ATTENTION_BIAS,
        one_plus_norms=True,
        scales_queries_by_width_at=46,
    ),
    "gemma3": GgufArchitecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        names=_LAYER_NAMES | _GEMMA_NAMES,
        keys={
            "sliding_window": ("attention.sliding_window", None),
            "final_logit_softcapping": ("final_logit_softcapping", None),
            "rope_local_base_freq": ("rope.freq_base_swa", 10000.0),
            "sliding_window_pattern": ("attention.sliding_window_pattern", None),
        },
        biases=_ATTENTION_BIAS,
        one_plus_norms=True,
        scales_queries_by_width_at=62,
    ),
    "gpt-oss": GgufArchitecture(
        "gpt_oss",
        "GptOssForCausalLM",
        names={key: name for key, name in (_LAYER_NAMES | _GPT_OSS_NAMES).items() if key != "mlp.gate"},
        keys=_MOE_KEYS
        | {
            "intermediate_size": ("expert_feed_forward_length", None),
            "sliding_window": ("attention.sliding_window", 128),
        },
        biases=_ATTENTION_BIAS,
        has_experts=True,
        keeps_yarn_ends=True,
    ),
    "phi3": GgufArchitecture(
        "phi3",
        "Phi3ForCausalLM",
        names=_LAYER_NAMES | _PHI3_NAMES,
        keys={
            "original_max_position_embeddings": ("rope.scaling.original_context_length", None),
            "sliding_window": ("attention.sliding_window", None),
        },
    ),
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

_OTHER_KEYS = frozenset((
    "vocab_size", "attention.key_length", "attention.value_length", "expert_count", "rope.dimension_count",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scale_linear", "rope.scaling.finetuned", "pooling_type",
    "attention.layer_norm_epsilon",
))  # fmt: skip
"""Read below, or of no account."""
_YARN_KEYS = ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor")

_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_HF_NAME = re.compile(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)")

_MAX_ROPE_FACTORS = 4096
_RANK = 4
"""llama.cpp's number of a pooling that scores texts."""

_FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def gguf_tensor_name(hf_name: str, architecture: GgufArchitecture) -> str | None:
    """`model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`; None for a name that GGUF has no word for."""
    match = _HF_NAME.fullmatch(f"{hf_name}.weight" if hf_name.endswith(".sinks") else hf_name)
    if match is None:
        return None
    layer, module, kind = match.groups()
    if layer is None:
        return f"{_TOP_NAMES[module]}.{kind}" if module in _TOP_NAMES else None
    if architecture.has_experts and (expert := _EXPERT.fullmatch(module)):
        return f"blk.{layer}.ffn_{expert[2]}.{expert[1]}.{kind}"
    return f"blk.{layer}.{architecture.names[module]}.{kind}" if module in architecture.names else None


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Raises `ModelError` for an architecture that is missing or not supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ModelError(
            f"{file.path}: GGUF architecture {reprlib.repr(name)} is not supported, only {', '.join(ARCHITECTURES)}",
            alternative="the model's Hugging Face folder may run, by transformers' code",
        )
    architecture = ARCHITECTURES[name]
    if bool(_get(file, "expert_count", 0)) == architecture.has_experts:
        return architecture
    if name == "llama":
        return MIXTRAL
    raise ModelError(
        f"{file.path}: {_full(file, 'expert_count')} is {reprlib.repr(_get(file, 'expert_count'))}, and a {name} has "
        + ("experts" if architecture.has_experts else "none")
    )


def config_from_gguf(file: GgufFile) -> dict[str, Any]:
    """The `config.json` that the model would have, its values as the file gives them: the caller checks their ranges.

    Raises `ModelError` when the metadata lacks a value that the model cannot be built without, or describes a model
    whose attention is not supported.
    """
    architecture = architecture_of(file)
    _refuse_unsupported(file)
    embedding = file.tensors.get("token_embd.weight")
    scaling = _rope_scaling(file, architecture)
    return {
        **_unread(file, architecture, scaling),
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_act": "silu",
        **{key: _require(file, gguf_key) for key, gguf_key in _REQUIRED_KEYS.items()},
        **{key: _get(file, gguf_key) for key, gguf_key in _OPTIONAL_KEYS.items()},
        **{key: file.metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")},
        **{key: _get(file, gguf_key, default) or None for key, (gguf_key, default) in architecture.keys.items()},
        **_head(file, architecture),
        **_sliding_layers(file),
        "vocab_size": embedding.shape[0] if embedding is not None else _require(file, "vocab_size"),
        "rope_scaling": scaling,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{key: name in file.tensors for key, name in architecture.biases.items()},
        "torch_dtype": _FLOAT_TYPES.get(next(iter(file.parameters_by_type), "")),
    }


def _refuse_unsupported(file: GgufFile) -> None:
    pooling = _get(file, "pooling_type", 0)
    if pooling == _RANK or "cls.output.weight" in file.tensors or "cls.weight" in file.tensors:
        held = f"{_full(file, 'pooling_type')} rank" if pooling == _RANK else "a classifier"
        raise ModelError(
            f"{file.path}: holds {architecture_of(file).class_name} with {held}: a model that scores texts and writes "
            "none; a reranker that answers yes or no is served as it was published, before it was made into this"
        )
    if _get(file, "attention.key_length") != _get(file, "attention.value_length"):
        raise ModelError(f"{file.path}: keys and values have heads of different sizes, which is not supported")


def _unread(file: GgufFile, architecture: GgufArchitecture, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """Numbers and flags of the architecture that nothing here reads, by the file's keys: somebody has to ask of each
    whether it changes what the model computes."""
    kind = None if scaling is None else scaling["rope_type"]
    read = {*_OTHER_KEYS, *_REQUIRED_KEYS.values(), *_OPTIONAL_KEYS.values()}
    read |= {key for key, _ in architecture.keys.values()} | {*(_YARN_KEYS if kind == "yarn" else ())}
    read |= {"rope.scaling.attn_factor"} if kind == "longrope" else set()
    prefix = _full(file, "")
    named = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if _is_usual_scale(file, named.get("attention.scale")):
        del named["attention.scale"]
    return {key: value for key, value in named.items() if key not in read and isinstance(value, (int, float))}


def _is_usual_scale(file: GgufFile, scale: Any) -> bool:
    width, heads = _get(file, "embedding_length"), _get(file, "attention.head_count")
    if not isinstance(scale, float) or not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return False
    head_dim = _get(file, "attention.key_length", width // heads)
    return isinstance(head_dim, int) and head_dim > 0 and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)


def _head(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any]:
    """`head_dim`, how much of it rotates, and the scale of queries where the family has one of its own."""
    width, heads = _require(file, "embedding_length"), _require(file, "attention.head_count")
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1:
        return {}  # the caller says what is wrong with them
    head_dim = _get(file, "attention.key_length", width // heads)
    rotary_dim = _get(file, "rope.dimension_count", head_dim)
    head = {"head_dim": head_dim}
    if rotary_dim != head_dim:
        if architecture.permutes_qk:
            raise ModelError(f"{file.path}: only a part of each head is rotated, which is not supported")
        if not isinstance(rotary_dim, int) or not isinstance(head_dim, int) or not 0 < rotary_dim < head_dim:
            raise ModelError(f"{file.path}: {reprlib.repr(rotary_dim)} of {head_dim} dimensions of a head are rotated")
        head["partial_rotary_factor"] = rotary_dim / head_dim
    if architecture.scales_queries_by_width_at is not None:
        by_width = _require(file, "block_count") == architecture.scales_queries_by_width_at
        head["query_pre_attn_scalar"] = width // heads if by_width else head_dim
    return head


def _sliding_layers(file: GgufFile) -> dict[str, Any]:
    """A pattern may be the length of a period, or a flag for each layer."""
    pattern = _get(file, "attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        return {}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return {"layer_types": kinds, "sliding_window_pattern": None}


def _rope_scaling(file: GgufFile, architecture: GgufArchitecture) -> dict[str, Any] | None:
    """As llama.cpp reads it: type linear and factor 1 (which it also writes as 0) unless the metadata says otherwise.

    The llama3 scaling has no metadata of its own. The converter works it out into a divisor for each rotary frequency,
    the tensor `rope_freqs.weight`, which is given as the type `factors`. Nor has longrope: two such tensors tell.
    """
    if "rope_factors_long.weight" in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _rope_factors(file, "rope_factors_long.weight"),
            "short_factor": _rope_factors(file, "rope_factors_short.weight"),
            "attention_factor": _get(file, "rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": _require(file, "rope.scaling.original_context_length"),
        }
    kind = _get(file, "rope.scaling.type", "linear")
    factor = _get(file, "rope.scaling.factor", _get(file, "rope.scale_linear")) or 1.0
    if "rope_freqs.weight" in file.tensors:
        if kind not in ("none", "linear") or factor != 1.0:
            raise ModelError(f"{file.path}: rope_freqs.weight together with another rope scaling is not supported")
        return {"rope_type": "factors", "factors": _rope_factors(file, "rope_freqs.weight")}
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
    if kind == "yarn":
        attn_factors = [_get(file, f"rope.scaling.{key}", 1.0) for key in ("attn_factor", "yarn_attn_factor")]
        if all(isinstance(factor, float) for factor in attn_factors) and attn_factors != [1.0, 1.0]:
            scaling["attn_factor"] = attn_factors[0] * attn_factors[1]
        scaling["truncate"] = False if architecture.keeps_yarn_ends else None
        extrapolation = _get(file, "rope.scaling.yarn_ext_factor", -1.0)
        scaling["extrapolation_factor"] = None if extrapolation in (-1.0, 1.0) else extrapolation  # -1: not set
    return {key: value for key, value in scaling.items() if value is not None}


def _rope_factors(file: GgufFile, name: str) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None:
        raise ModelError(f"{file.path}: has no tensor {name}, which the model needs")
    if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.num_elements > _MAX_ROPE_FACTORS:
        raise ModelError(f"{file.path}: {name} is {tensor.type} {tensor.shape}, not a short F32 vector")
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
