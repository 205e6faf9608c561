"""What configurations say of quantized weights: config.json, or the files that quantizers put beside it."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ingle.errors import ModelError
from ingle.weights.checked import Checked
from ingle.weights.hf_config import MAX_CONFIG_BYTES, read_json_object
from ingle.weights.quantized import patterns
from ingle.weights.quantized.scheme import Quantization, Rule, Scheme, always
from ingle.weights.quantized.tables import Table

_KEYS = ("quantization_config", "compression_config")
_BESIDE = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": "auto-round",
}
"""What quantizers write beside a config.json that is silent, and the method of one that does not name it."""
_OF_AWQ = ("w_bit", "q_group_size", "zero_point")
"""What AutoAWQ's settings have, and those of GPTQ do not."""
_ALTERNATIVE = "give the model's unquantized folder, or a GGUF file of it"
_MAX_GROUP = 1 << 20
_GPTQ_BITS, _AWQ_BITS, _PACKED_BITS = (2, 3, 4, 8), (4,), (4, 8)


def read_quantization(path: Path, config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of the folder at `path`, with this configuration, are quantized; None where they are not.

    Raises `ModelError` for a method, or a form of one, that ingle does not read.
    """
    said = _said(path, config)
    if said is not None:
        quantization = _of(path, *said)
        return quantization if quantization.schemes else None
    if _by_mlx(config):
        _refuse(path, "MLX", "quantization in config.json")
    return None


def cache_made_for(path: Path, config: Mapping[str, Any]) -> str | None:
    """The type, for people, that keys and values are to have in the eyes of who quantized the folder at `path`."""
    said = _said(path, config)
    if said is None or not isinstance(said[0], Mapping):
        return None
    settings = said[0]
    inner = settings.get("quantization")  # as ModelOpt's own file has it
    for place in (settings, inner if isinstance(inner, Mapping) else {}):
        scheme, algorithm = place.get("kv_cache_scheme"), place.get("kv_cache_quant_algo")
        if isinstance(scheme, Mapping):
            kind, bits = scheme.get("type"), scheme.get("num_bits", 8)
            return f"{'int' if kind == 'int' else 'fp'}{bits if type(bits) is int and 0 < bits < 17 else 8}"
        if algorithm in ("FP8", "INT8", "NVFP4"):
            return str(algorithm).lower()
        exported = place.get("export")
        if scheme in ("static", "dynamic"):  # AutoFP8's
            return "fp8"
        if place.get("kv_cache_quant_config") or (isinstance(exported, Mapping) and exported.get("kv_cache_group")):
            return "fp8"  # Quark's
    return None


def _said(path: Path, config: Mapping[str, Any]) -> tuple[object, str, str | None] | None:
    """What is said of quantized weights, in which file, and under which key of it."""
    for key in _KEYS:
        settings = config.get(key)
        if settings and not (_by_mlx(config) and not (isinstance(settings, Mapping) and settings.get("quant_method"))):
            return settings, "config.json", key
    if _by_mlx(config):
        return None
    for name, method in _BESIDE.items():
        if path.is_dir() and (path / name).is_file():
            beside = read_json_object(path / name, MAX_CONFIG_BYTES)
            unnamed = "awq" if method == "gptq" and any(key in beside for key in _OF_AWQ) else method
            return {**beside, "quant_method": beside.get("quant_method") or unnamed}, name, None
    return None


def _by_mlx(config: Mapping[str, Any]) -> bool:
    """Whose files name no method."""
    settings = config.get("quantization")
    return isinstance(settings, Mapping) and "bits" in settings


def _of(path: Path, settings: object, file: str, key: str | None) -> Quantization:
    where = f"{key} in {file}" if key else file
    if not isinstance(settings, Mapping):
        _refuse(path, "a method without a name", where)
    method = settings.get("quant_method")
    if not method and any(settings.get(key) is True for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # as transformers takes it
    name = str(method).lower().removeprefix("intel/") if method else ""
    reader = _READERS.get(name)
    if reader is None:
        _refuse(path, method or "a method without a name", where)
    values = Checked(settings, f"{path / file if path.is_dir() else path}", f"{key}." if key else "")
    return reader(values, f"{path}: {where}")


def _refuse(path: Path, method: object, where: str) -> NoReturn:
    shown = reprlib.repr(method)
    raise ModelError(
        f"{path}: its weights are quantized by {shown} ({where}), which ingle does not read", alternative=_ALTERNATIVE
    )


def _form(values: Checked, key: str, known: Sequence[str], default: str) -> str:
    """One of several forms of a method. Raises `ModelError` for those that are not read."""
    value = values.values.get(key)
    value = default if value is None else value
    if not isinstance(value, str) or value.lower() not in known:
        values.fail(f"{key} is {reprlib.repr(value)}, and ingle reads {' and '.join(known)}; {_ALTERNATIVE}")
    return value.lower()


def _bits(values: Checked, known: Sequence[int], *keys: str) -> int:
    key = next((key for key in keys if key in values), keys[0])
    bits = values.integer(key, most=64)
    if bits not in known:
        values.fail(f"{key} is {bits}, and ingle reads {', '.join(map(str, known))} of this method; {_ALTERNATIVE}")
    return bits


def _group_size(values: Checked, default: int | None, *keys: str) -> int | None:
    """None for one scale a row, which is written as -1 or 0."""
    key = next((key for key in keys if key in values), None)
    if key is None:
        return default
    size = values.integer(key, least=-1, most=_MAX_GROUP)
    return None if size <= 0 else size


def _names(values: Checked, *keys: str) -> list[str]:
    return [name for key in keys for name in values.items(key, str, "names")]


# ---- methods


def _gptq(values: Checked, source: str) -> Quantization:
    key = "format" if "checkpoint_format" not in values and "format" in values else "checkpoint_format"
    form = _form(values, key, ("gptq", "gptq_v2"), "gptq")
    scheme = Scheme(
        "gptq",
        _bits(values, _GPTQ_BITS, "bits", "w_bit", "wbits"),
        group_size=_group_size(values, 128, "group_size", "groupsize", "q_group_size"),
        zero_offset=int(form == "gptq"),
        has_zeros=True,
    )
    kept = _names(values, "modules_to_not_convert")
    rules = [Rule(partial(patterns.contains, tuple(kept)), None)] if kept else []
    rules += _gptq_exceptions(values, scheme)
    return Quantization("GPTQ", source, (*rules, Rule(always, scheme)))


def _gptq_exceptions(values: Checked, scheme: Scheme) -> list[Rule]:
    """GPTQModel's `dynamic`: patterns of modules, `-:` before those that are left, `+:` those that differ."""
    rules = []
    section = values.section("dynamic", "dynamic.")
    for pattern in section.values:
        if not isinstance(pattern, str):
            values.refuse("dynamic", "not an object of patterns")
        matches = partial(patterns.matches_regex, pattern.removeprefix("-:").removeprefix("+:"))
        if pattern.startswith("-:"):
            rules.append(Rule(matches, None))
            continue
        inner = section.section(pattern, f"dynamic.{pattern[:80]}.")
        bits = _bits(inner, _GPTQ_BITS, "bits") if "bits" in inner else scheme.bits
        group_size = _group_size(inner, scheme.group_size, "group_size")
        rules.append(Rule(matches, replace(scheme, bits=bits, group_size=group_size)))
    return rules


def _awq(values: Checked, source: str) -> Quantization:
    key = next((key for key in ("version", "checkpoint_format", "format") if key in values), "version")
    form = _form(values, key, ("gemm", "gemv", "exllama", "ipex"), "gemm")  # the last two are kernels for the first
    scheme = Scheme(
        "gemv" if form == "gemv" else "awq",
        _bits(values, _AWQ_BITS, "bits", "w_bit"),
        group_size=_group_size(values, 128, "group_size", "q_group_size"),
        has_zeros=True,  # the kernels of these forms read them in any case
    )
    kept = _names(values, "modules_to_not_convert", "ignore")
    rules = [Rule(partial(patterns.contains, tuple(kept)), None)] if kept else []
    return Quantization("AWQ", source, (*rules, Rule(always, scheme)))


def _auto_round(values: Checked, source: str) -> Quantization:
    """AutoRound packs as one of the others do; layers of other bits stand in `extra_config`."""
    said = values.values.get("data_type")
    if said not in (None, "int"):
        values.refuse("data_type", f"and ingle reads whole numbers (int) of this method; {_ALTERNATIVE}")
    base = _AUTO_ROUND[_form(values, "packing_format", tuple(_AUTO_ROUND), "auto_round:auto_gptq")](values, source)
    (scheme,) = base.schemes
    rules = []
    extra = values.section("extra_config", "extra_config.")
    for name in map(str, extra.values):
        inner = extra.section(name, f"extra_config.{name[:80]}.")
        bits = inner.integer("bits", scheme.bits, most=64)
        other = None if bits >= 16 else replace(
            scheme, bits=_bits(inner, _GPTQ_BITS, "bits") if "bits" in inner else bits,
            group_size=_group_size(inner, scheme.group_size, "group_size"),
        )  # fmt: skip
        is_pattern = any(sign in name for sign in "*\\^$[(|+")
        rules.append(Rule(partial(patterns.matches_regex if is_pattern else patterns.is_module, name), other))
    return Quantization("AutoRound", source, (*rules, *base.rules))


def _unshifted_gptq(values: Checked, source: str) -> Quantization:
    """AutoRound's own: GPTQ's, with zeros as they are meant."""
    of_gptq = _gptq(values, source)
    rules = tuple(Rule(rule.matches, rule.scheme and replace(rule.scheme, zero_offset=0)) for rule in of_gptq.rules)
    return replace(of_gptq, rules=rules)


def _bitsandbytes(values: Checked, source: str) -> Quantization:
    kept = _names(values, "llm_int8_skip_modules")
    rules = [Rule(partial(patterns.contains, tuple(kept)), None)] if kept else []
    if values.flag("load_in_8bit", False) or values.flag("_load_in_8bit", False):
        return Quantization("bitsandbytes", source, (*rules, Rule(always, Scheme("scb", 8))))
    table = _form(values, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")
    scheme = Scheme("blocks", 4, table="nf4" if table == "nf4" else "fp4")
    return Quantization("bitsandbytes", source, (*rules, Rule(always, scheme)))


def _fp8(values: Checked, source: str) -> Quantization:
    """DeepSeek's and Qwen's in blocks; those of AutoFP8 and Meta's with a scale a matrix or a row."""
    _form(values, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    sizes = values.items("weight_block_size", int, "two whole numbers")
    if sizes and (len(sizes) != 2 or min(sizes) < 1 or max(sizes) > _MAX_GROUP):
        values.refuse("weight_block_size", "not two whole numbers above 0")
    rows, columns = sizes or (1, None)
    scheme = Scheme("whole", 8, is_float=True, group_size=columns, block_rows=rows, quantizes_inputs=True)
    kept = _names(values, "modules_to_not_convert", "ignored_layers")
    rules = [Rule(partial(patterns.contains, tuple(kept)), None)] if kept else []
    return Quantization("FP8", source, (*rules, Rule(always, scheme)))


def _modelopt(values: Checked, source: str) -> Quantization:
    """NVIDIA's: what is said stands under `quantization` in a file of its own, or flat in config.json.

    One without `quant_algo` may be about keys and values alone.
    """
    inner = values.section("quantization", "quantization.") if "quantization" in values else values
    if "quant_algo" not in inner and ("kv_cache_quant_algo" in inner or "kv_cache_scheme" in inner):
        return Quantization("ModelOpt", source, ())
    kept = _names(inner, "exclude_modules", "ignore")
    rules = [Rule(partial(patterns.is_glob, tuple(kept)), None)]
    if str(inner.values.get("quant_algo")).lower() != "mixed_precision":
        return Quantization("ModelOpt", source, (*rules, Rule(always, _modelopt_scheme(inner))))
    layers = inner.section("quantized_layers", "quantized_layers.")
    for name in map(str, layers.values):
        scheme = _modelopt_scheme(layers.section(name, f"quantized_layers.{name[:80]}."))
        rules.append(Rule(partial(patterns.is_module, name), scheme))
    return Quantization("ModelOpt", source, tuple(rules))


_MODELOPT = ("fp8", "fp8_pb_wo", "fp8_pc_pt", "fp8_per_channel_per_token", "nvfp4", "w4a16_nvfp4",
             "mxfp8")  # fmt: skip


def _modelopt_scheme(values: Checked) -> Scheme:
    algorithm = _form(values, "quant_algo", _MODELOPT, "")
    if "nvfp4" in algorithm:
        return Scheme("nibbles", 4, group_size=_group_size(values, 16, "group_size"), table="nvfp4")
    if algorithm == "mxfp8":
        return Scheme("whole", 8, True, _group_size(values, 32, "group_size"))
    weights_alone = algorithm == "fp8_pb_wo"
    block = 128 if weights_alone else None
    return Scheme("whole", 8, True, block, block or 1, quantizes_inputs=not weights_alone)


def _quark(values: Checked, source: str) -> Quantization:
    """AMD's: one scheme for all layers, others for those whose names fit a pattern."""
    rules = [Rule(partial(patterns.is_glob, tuple(_names(values, "exclude"))), None)]
    layers = values.section("layer_quant_config", "layer_quant_config.")
    for name in map(str, layers.values):
        scheme = _quark_scheme(layers.section(name, f"layer_quant_config.{name[:80]}."))
        rules.append(Rule(partial(patterns.is_glob, (name,)), scheme))
    whole = values.section("global_quant_config", "global_quant_config.")
    if whole.values.get("weight"):
        rules.append(Rule(always, _quark_scheme(whole)))
    return Quantization("Quark", source, tuple(rules))


def _quark_scheme(values: Checked) -> Scheme:
    weights = values.section("weight", "weight.")
    kind = _form(weights, "dtype", ("fp8_e4m3", "int8", "fp4"), "")
    if kind == "fp4":
        if _form(weights, "scale_format", ("e8m0",), "e8m0") and weights.integer("group_size", 32) != 32:
            weights.refuse("group_size", f"and ingle reads groups of 32 of fp4; {_ALTERNATIVE}")
        return Scheme("nibbles", 4, group_size=32, table="mxfp4")
    _form(weights, "qscheme", ("per_tensor", "per_channel"), "per_tensor")
    if kind == "int8":
        return Scheme("whole", 8, has_zeros=weights.values.get("symmetric") is False)
    return Scheme("whole", 8, is_float=True, quantizes_inputs=bool(values.values.get("input_tensors")))


def _compressed_tensors(values: Checked, source: str) -> Quantization:
    for key in ("sparsity_config", "transform_config"):
        section = values.section(key)
        if section.values and str(section.values.get("format", "")) != "dense":
            values.refuse(key, f"which ingle does not read; {_ALTERNATIVE}")
    rules = [Rule(partial(patterns.is_target, name), None) for name in _names(values, "ignore")]
    groups = values.section("config_groups", "config_groups.")
    for name in groups.values:
        group = groups.section(str(name), f"config_groups.{str(name)[:80]}.")
        scheme = _compressed_scheme(group, str(values.values.get("format") or ""))
        rules += [Rule(partial(patterns.is_target, target), scheme) for target in _names(group, "targets")]
    if not any(rule.scheme is not None for rule in rules) and "kv_cache_scheme" not in values:
        values.fail("config_groups names no layers that are quantized")
    return Quantization("compressed-tensors", source, tuple(rules))


_NIBBLES: dict[str, tuple[Table, int]] = {"mxfp4-pack-quantized": ("mxfp4", 32), "nvfp4-pack-quantized": ("nvfp4", 16)}
"""And the numbers that share a scale."""
_COMPRESSED_FORMS = (
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mxfp8-quantized",
    *_NIBBLES,
)


def _compressed_scheme(group: Checked, default: str) -> Scheme:
    form = _form(group, "format", _COMPRESSED_FORMS, default)
    weights = group.section("weights", "weights.")
    is_float = _form(weights, "type", ("int", "float"), "int") == "float"
    packed = form == "pack-quantized"
    if form in _NIBBLES:
        table, size = _NIBBLES[form]
        if not is_float or _bits(weights, (4,), "num_bits") != 4 or weights.integer("group_size", size) != size:
            group.refuse("weights", f"and {form} has floats of 4 bits in groups of {size}")
        return Scheme("nibbles", 4, group_size=size, table=table)
    if is_float and packed:
        group.refuse("weights", f"packed floats, which ingle does not read; {_ALTERNATIVE}")
    bits = _bits(weights, (8,) if is_float else _PACKED_BITS, "num_bits")
    strategy = _form(weights, "strategy", ("tensor", "channel", "group", "block"), "tensor")
    rows, columns = 1, None
    if form == "mxfp8-quantized":
        return Scheme("whole", 8, True, weights.integer("group_size", 32, most=_MAX_GROUP))
    if strategy == "group":
        columns = weights.integer("group_size", most=_MAX_GROUP)
    elif strategy == "block":
        sizes = weights.items("block_structure", int, "two whole numbers")
        if len(sizes) != 2 or min(sizes) < 1 or max(sizes) > _MAX_GROUP:
            weights.refuse("block_structure", "not two whole numbers above 0")
        rows, columns = sizes
    has_zeros = not weights.flag("symmetric", True) and not is_float
    of_inputs = is_float and bool(group.section("input_activations").values)
    return Scheme(
        "packed" if packed else "whole", bits, is_float, columns, rows, has_zeros=has_zeros, quantizes_inputs=of_inputs
    )


def _mxfp4(values: Checked, source: str) -> Quantization:
    """gpt-oss': `weights/single_experts.py` has its tensors."""
    scheme = Scheme("nibbles", 4, group_size=32, table="mxfp4")
    return Quantization("MXFP4", source, (Rule(always, scheme),))


_READERS: dict[str, Callable[[Checked, str], Quantization]] = {
    "gptq": _gptq,
    "gptq_marlin": _gptq,
    "gptqmodel": _gptq,
    "awq": _awq,
    "awq_marlin": _awq,
    "auto-round": _auto_round,
    "autoround": _auto_round,
    "auto_round": _auto_round,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "modelopt_fp8": _modelopt,
    "modelopt_fp4": _modelopt,
    "nvfp4": _modelopt,
    "mxfp4": _mxfp4,
    "quark": _quark,
    "compressed-tensors": _compressed_tensors,
    "sparseml": _compressed_tensors,
}
_AUTO_ROUND: dict[str, Callable[[Checked, str], Quantization]] = {
    "auto_round:auto_gptq": _gptq,
    "auto_round:gptq": _gptq,
    "auto_round:auto_gptq:exllamav2": _gptq,
    "auto_gptq": _gptq,
    "gptq": _gptq,
    "auto_round": _unshifted_gptq,
    "auto_round:exllamav2": _unshifted_gptq,
    "auto_round:tritonv2": _unshifted_gptq,
    "auto_round:auto_awq": _awq,
    "auto_round:awq": _awq,
    "auto_awq": _awq,
    "awq": _awq,
}
