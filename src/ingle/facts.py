"""What a model is, in words: the same for the start-up line, `ingle show` and `ingle verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingle.channel import EngineInfo

_KIB = 1024


def count(number: int) -> str:
    """Of parameters: 134.5 M."""
    for unit, scale in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f}{unit}"
    return str(number)


def size(num_bytes: int) -> str:
    """In units of 1024: 0.25 GiB."""
    for unit, scale in (("GiB", _KIB**3), ("MiB", _KIB**2)):
        if num_bytes >= scale / 10:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / _KIB:.1f} KiB"


def decimal_size(num_bytes: int) -> str:
    """In units of 1000, as hubs count what is downloaded: 4.37 GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} kB"


def types(numbers: Mapping[str, int]) -> str:
    """Of stored types and how many numbers each holds: Q4_1 79%, Q8_0 21%, F32 0%."""
    total = sum(numbers.values())
    return ", ".join(f"{kind} {share / total:.0%}" for kind, share in numbers.items() if total)


def sampling_defaults(defaults: Mapping[str, Any], source: str = "") -> str:
    """What the model's files recommend, and where: temperature 0.6, top_p 0.95 (generation_config.json); or none."""
    return ", ".join(f"{name} {value:g}" for name, value in defaults.items()) + f" ({source})" * bool(source) or "none"


def loaded(info: EngineInfo) -> str:
    """Family, parameters, how they are stored, held and computed, and where."""
    stored = types(info.stored_types) or "random numbers"
    fates = ((info.kept_types, "kept as stored"), (info.expanded_types, "expanded at load"))
    held = ", ".join(f"{' and '.join(kinds)} {fate}" for kinds, fate in fates if kinds)
    return (
        f"{info.family}, {count(info.num_parameters)} parameters, stored as {stored}; "
        f"{size(info.weight_bytes)} of weights{f' ({held})' if held else ''} on {info.device}, "
        f"multiplied as {' and '.join(info.factors)}; kernels: {info.kernels}"
    )


def started(info: EngineInfo, default_sampling: Mapping[str, Any], sampling_source: str = "") -> str:
    """All that a model was started with."""
    kept = f"; prefixes are kept in {' and '.join(info.prompt_cache)}" if info.prompt_cache else ""
    return (
        f"{loaded(info)}; context {info.max_model_len} tokens, {info.num_pages} pages of {info.page_size} "
        f"({size(info.kv_cache_bytes)} in {info.kv_dtype}){kept}; the model's sampling defaults: "
        f"{sampling_defaults(default_sampling, sampling_source)}"
    )
