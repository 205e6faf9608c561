"""A model's configuration in one normal form, from `config.json` of any transformers or from GGUF metadata."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ingle.errors import ModelError
from ingle.weights.checked import Checked
from ingle.weights.gguf import GgufFile
from ingle.weights.gguf_hf import config_from_gguf
from ingle.weights.hf_defaults import DEFAULTS, NATIVE_TYPES, RENAMED, TEXT_CONFIGS
from ingle.weights.pointer import refuse_pointer

MAX_CONFIG_BYTES = 16 << 20

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
    "rms_norm_eps",
)
# The largest believable value of each whole number: beyond it the file is damaged or means harm.
_MAX_INTS = {
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1 << 12,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "head_dim": 1 << 14,
    "qk_nope_head_dim": 1 << 14,
    "qk_rope_head_dim": 1 << 14,
    "v_head_dim": 1 << 14,
    "q_lora_rank": 1 << 20,
    "kv_lora_rank": 1 << 20,
    "max_position_embeddings": 1 << 31,
    "vocab_size": 1 << 24,
    "sliding_window": 1 << 31,
    "sliding_window_pattern": 1 << 12,
    "seq_length": 1 << 31,
}
_MAX_NUMBERS = {
    "rms_norm_eps": 1.0,
    "query_pre_attn_scalar": 1e15,
    "attn_logit_softcapping": 1e15,
    "final_logit_softcapping": 1e15,
    "rope_local_base_freq": 1e15,
}
"""Of numbers above 0."""
_BOOLS = (
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "qkv_bias",
    "norm_topk_prob",
    "use_sliding_window",
    "no_bias",
    "use_dynamic_ntk",
    "use_logn_attn",
)
_DTYPES = ("float16", "bfloat16", "float32")

_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_POSITIVE = (
    "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "attn_factor", "extrapolation_factor",
    "beta_fast", "beta_slow",
)  # fmt: skip
_ROPE_STRETCHES = ("factor", "short_factor", "long_factor", "factors")
"""What only a scaling has, whose name must then be there."""
_ROPE_WITH_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
_ROPE_FACTORS = {"factors": ("factors",), "longrope": ("short_factor", "long_factor")}
_ROPE_RENAMED = {"su": "longrope"}


def read_config(
    path: Path,
    *,
    gguf: GgufFile | None = None,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """The configuration of the model at `path`, a Hugging Face folder or a GGUF file, with Hugging Face's key names.

    Values of null are left out, and these keys have one form whichever way they were written:

    - `torch_dtype`: "float16", "bfloat16", "float32", or None (not said, or the weights are quantized). Also read from
      `dtype`, its name since transformers 5.
    - `rope_theta`: float; `partial_rotary_factor`: in (0, 1], if given. Also read from `rope_parameters`, where
      transformers 5 puts them.
    - `rope_scaling`: None, or a dict with `rope_type` (never "default"; legacy `type` is renamed) and its values:
      finite numbers, and with every factor that linear, dynamic, yarn and llama3 need. dynamic, yarn, llama3 and
      longrope always have `original_max_position_embeddings`, and longrope `short_factor` and `long_factor`, divisors
      of the rotary frequencies. A GGUF file has `{"rope_type": "factors", "factors": [...]}` in place of
      llama3: the divisor of each of the head_dim / 2 rotary frequencies. Of rope parameters that differ by layer type,
      these are those of full attention, and `rope_local_base_freq` is the base in layers with a window.
    - `num_key_value_heads`, `head_dim`, `tie_word_embeddings`: always there for a model type of
      `ingle.model.registry`, as are `hidden_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads`,
      `vocab_size`, `max_position_embeddings` and `rms_norm_eps`. Other model types may describe themselves differently.

    `rope_scaling` and `rope_theta` take the place of the model's own, in layers without a window. linear and dynamic
    then stretch `max_position_embeddings` by their factor; yarn does so always, from its original length.
    `gguf` is the file at `path`, where somebody has read it already.

    Raises `ModelError` for a file that is missing, damaged or larger than 16 MiB, and for values out of range.
    """
    config = read_raw(path, gguf)
    return normalize_config(config_file(path), config, rope_scaling=rope_scaling, rope_theta=rope_theta)


def config_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def read_raw(path: Path, gguf: GgufFile | None = None) -> dict[str, Any]:
    """What `read_config` makes its configuration of, as it is written."""
    if path.is_dir():
        config = read_json_object(config_file(path), MAX_CONFIG_BYTES)
        if "model_type" not in config:
            refuse_pointer(config_file(path))  # such as a hub's refusal, which is JSON too
        return config
    return config_from_gguf(gguf or GgufFile(path))


def normalize_config(
    path: Path,
    config: dict[str, Any],
    *,
    rope_scaling: Mapping[str, Any] | None = None,
    rope_theta: float | None = None,
) -> dict[str, Any]:
    """The part of `read_config` after reading. `path` is what errors name."""
    return _Normalizer(str(path), config, rope_scaling, rope_theta).normalize()


def read_json_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises `ModelError` if it is missing, too large, or anything else."""
    try:
        if not path.is_file():
            refuse_pointer(path)
            raise ModelError(f"{path}: no such file")
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
        if len(text) > max_bytes:
            raise ModelError(f"{path}: larger than {max_bytes} bytes, which is no {path.name} of a model")
        value = json.loads(text)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__}, not an object")
    return value


class _Normalizer:
    """`source` is what errors name."""

    def __init__(
        self,
        source: str,
        config: dict[str, Any],
        rope_scaling: Mapping[str, Any] | None = None,
        rope_theta: float | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.rope_scaling = rope_scaling
        self.rope_theta = rope_theta

    @property
    def values(self) -> Checked:
        return Checked(self.config, self.source)

    def normalize(self) -> dict[str, Any]:
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or not model_type or not model_type.isprintable():
            self.values.refuse("model_type", "not the name of a model family")
        if model_type in TEXT_CONFIGS:
            self.take_text_config(model_type)
        self.fill_in(model_type)
        self.check_values()
        self.normalize_dtype()
        self.normalize_rope(model_type)
        if model_type in NATIVE_TYPES:
            self.complete()
        return self.config

    def take_text_config(self, model_type: str) -> None:
        """The decoder's part, under the name of the whole; what it leaves unsaid may stand beside it."""
        self.config = {**self.config, **self.values.section("text_config").values, "model_type": model_type}

    def fill_in(self, model_type: str) -> None:
        named = {name: self.config[key] for key, name in RENAMED.get(model_type, {}).items() if key in self.config}
        complete = DEFAULTS.get(model_type, {}) | self.config | named
        self.config = {key: value for key, value in complete.items() if value is not None}
        if self.config.get("use_sliding_window") is False:  # then the size may be anything: transformers writes 0
            self.config.pop("sliding_window", None)

    def check_values(self) -> None:
        values = self.values
        for key, most in _MAX_INTS.items():
            values.optional_integer(key, most=most)
        for key, largest in _MAX_NUMBERS.items():
            values.optional_number(key, most=largest)
        for key in _BOOLS:
            values.flag(key)
        for key in ("bos_token_id", "eos_token_id"):
            if any(type(token) is not int for token in _as_list(self.config.get(key, []))):
                values.refuse(key, "not a token id")
        if "seq_length" in values:
            _check_length(values, "seq_length")
        values.optional_integer("max_window_layers", least=0)
        values.items("layer_types", str, "names")

    def normalize_dtype(self) -> None:
        dtype = self.config.pop("dtype", self.config.get("torch_dtype"))
        self.config["torch_dtype"] = dtype if dtype in _DTYPES else None

    def normalize_rope(self, model_type: str) -> None:
        key = "rope_parameters" if "rope_parameters" in self.config else "rope_scaling"
        rope = dict(self.values.section(key).values)
        self.config.pop("rope_parameters", None)
        if any(isinstance(value, dict) for value in rope.values()):
            if model_type not in NATIVE_TYPES:
                self.config["rope_parameters"] = rope
                return
            rope = self.split_by_layer_type(rope)
        rope = {name: value for name, value in rope.items() if value is not None}
        theta = rope.pop("rope_theta", self.config.get("rope_theta", 10000.0))
        self.config["rope_theta"] = theta if self.rope_theta is None else self.rope_theta
        self.config["rope_theta"] = _check_theta(self.values, "rope_theta")
        if "partial_rotary_factor" in rope:
            self.config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        self.values.optional_number("partial_rotary_factor", most=1.0)
        if self.rope_scaling is None:
            self.config["rope_scaling"] = self.checked_scaling(rope, model_type)
        else:
            self.override_scaling(self.rope_scaling, model_type, rope.get("original_max_position_embeddings"))

    def override_scaling(self, rope: Mapping[str, Any], model_type: str, own_original: Any) -> None:
        """Takes the scaling of the command line, which stands for a longer context than the model's own.

        yarn with a factor alone stretches the context in which the model was trained: `own_original` where its files
        say that it was stretched before.
        """
        if rope.get("rope_type", rope.get("type")) == "yarn" and "factor" in rope:
            stated = self.config.get("original_max_position_embeddings", own_original)
            trained = self.config.get("max_position_embeddings") if stated is None else stated
            rope = {"original_max_position_embeddings": trained, **rope}
        if "original_max_position_embeddings" in rope:
            self.config.pop("original_max_position_embeddings", None)
        scaling = self.scaling_giver().checked_scaling(dict(rope), model_type)
        if scaling is not None and scaling["rope_type"] in ("linear", "dynamic"):
            self.stretch(scaling["factor"] * self.config.get("max_position_embeddings", 0))
        self.config["rope_scaling"] = scaling

    def scaling_giver(self) -> _Normalizer:
        """Names in its errors whoever gave the rope scaling."""
        return self if self.rope_scaling is None else _Normalizer("--rope-scaling", self.config)

    def stretch(self, length: float) -> None:
        """Raises the context to `length`, as far as it is a believable one."""
        if "max_position_embeddings" in self.config:
            most = min(length, _MAX_INTS["max_position_embeddings"])
            self.config["max_position_embeddings"] = max(self.config["max_position_embeddings"], int(most))

    def split_by_layer_type(self, rope: dict[str, Any]) -> dict[str, Any]:
        """The parameters of layers with full attention; the base of those with a window goes where Gemma 3 has it."""
        local = rope.get("sliding_attention", {})
        full = rope.get("full_attention", {})
        if not isinstance(local, dict) or not isinstance(full, dict) or len(rope) > 2:
            Checked({"rope_parameters": rope}, self.source).refuse(
                "rope_parameters", "not an object for full_attention and one for sliding_attention"
            )
        values = Checked(
            {"rope_theta": self.config.get("rope_local_base_freq", 10000.0), **local}, self.source, "sliding_attention "
        )
        if local.get("rope_type", "default") != "default":
            values.refuse("rope_type", "not default, all that is supported there")
        self.config["rope_local_base_freq"] = _check_theta(values, "rope_theta")
        return full

    def checked_scaling(self, rope: dict[str, Any], model_type: str) -> dict[str, Any] | None:
        values, named = Checked(rope, self.source, "rope "), Checked(rope, self.source)
        kind = rope.get("rope_type", rope.pop("type", None))
        stretches = next((key for key in _ROPE_STRETCHES if rope.get(key, 1) != 1), None)
        if kind is None and stretches is not None:
            named.refuse("rope_type", f"not the name of a rope scaling, which its {stretches} needs")
        kind = rope["rope_type"] = "default" if kind is None else kind
        if not isinstance(kind, str):
            named.refuse("rope_type", "not the name of a rope scaling")
        kind = rope["rope_type"] = _ROPE_RENAMED.get(kind, kind)
        if kind == "yarn" and model_type == "phi3":
            kind = rope["rope_type"] = "longrope"  # so the first Phi-3 checkpoints call it
        if kind == "default":
            return None
        if kind == "yarn" and "factor" not in rope:
            self.set_factor(rope)
        for key in _ROPE_NEEDS.get(kind, ()):
            _check_factor(values, key)
        if kind == "dynamic":
            _check_length(self.values, "max_position_embeddings")
            rope["original_max_position_embeddings"] = self.config["max_position_embeddings"]
        if kind in _ROPE_WITH_ORIGINAL_LENGTH:
            self.set_original_length(rope)
        for key, value in rope.items():
            if key in _ROPE_POSITIVE:
                _check_factor(values, key)
            elif key != "rope_type" and not all(_is_finite(item) for item in _as_list(value)):
                values.refuse(key, "not a finite number or a list of them")
        if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
            values.refuse("high_freq_factor", "not above low_freq_factor")
        return rope

    def set_factor(self, rope: dict[str, Any]) -> None:
        """Where none is stated, the context that the model is sold with says how far it was stretched."""
        original, stretched = rope.get("original_max_position_embeddings"), self.config.get("max_position_embeddings")
        if type(original) is int and type(stretched) is int and original > 0:
            rope["factor"] = stretched / original

    def set_original_length(self, rope: dict[str, Any]) -> None:
        """`original_max_position_embeddings`, which some files have outside the scaling, and then mean that one."""
        key = "original_max_position_embeddings"
        stated = self.config.get(key, rope.get(key))
        rope[key] = self.config.get("max_position_embeddings") if stated is None else stated
        _check_length(Checked(rope, self.source), key)
        if rope["rope_type"] == "yarn" and stated is not None:
            self.stretch(rope["factor"] * stated)

    def complete(self) -> None:
        """What a dense decoder of a known model type needs: present, or given the default that transformers gives."""
        config, values = self.config, self.values
        for key in _REQUIRED:
            if key not in config:
                values.fail(f"has no {key}, which the model cannot do without")
        heads = config["num_attention_heads"]
        if heads % config.setdefault("num_key_value_heads", heads):
            values.refuse("num_key_value_heads", f"not a divisor of {heads} attention heads")
        if "head_dim" not in config and config["hidden_size"] % heads:
            values.refuse("hidden_size", f"not a multiple of {heads} attention heads")
        head_dim = config.setdefault("head_dim", config["hidden_size"] // heads)
        if head_dim % 2:
            values.refuse("head_dim", "not even, as rotary embedding needs")
        config.setdefault("tie_word_embeddings", False)
        rotary_dim = int(head_dim * config.get("partial_rotary_factor", 1.0))
        scaling = config.get("rope_scaling") or {}
        stretches_base = scaling.get("rope_type") == "dynamic" or (config["model_type"] == "qwen" and not scaling)
        least = 4 if stretches_base else 2  # the base of two dimensions has no power to stretch
        if rotary_dim < least or rotary_dim % 2:
            values.fail(f"{rotary_dim} dimensions rotate, not an even number from {least} to head_dim {head_dim}")
        for key in _ROPE_FACTORS.get(scaling.get("rope_type", ""), ()):
            _check_factors(Checked(scaling, self.scaling_giver().source, "rope "), key, rotary_dim // 2)


def _check_theta(values: Checked, key: str) -> float:
    """The base of rotary frequencies."""
    return values.number(key, above=1.0, most=1e15)


def _check_factor(values: Checked, key: str) -> None:
    """A factor or a number of rotations: positive, and not so far from 1 that powers of it overflow."""
    values.number(key, least=1e-9, most=1e9)


def _check_factors(values: Checked, key: str, count: int) -> None:
    """Divisors of as many rotary frequencies."""
    factors = values.values.get(key)
    if not isinstance(factors, list) or len(factors) != count:
        values.refuse(key, f"not a list of {count} numbers")
    for factor in factors:
        Checked({key: factor}, values.source, "rope ").number(key)


def _check_length(values: Checked, key: str) -> None:
    """A number of tokens of which the logarithm is taken."""
    values.number(key, least=2, most=_MAX_INTS["max_position_embeddings"])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
