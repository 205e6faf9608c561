"""A plan in words, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from ingle import facts
from ingle.config import CacheConfig, EngineConfig, ParallelConfig, WeightsConfig, parse_bytes
from ingle.engine.memory import activation_bytes
from ingle.plan.fit import RUNTIME_BYTES, Fit, Speed, serve_flags, setting_flags
from ingle.plan.plan import Least, Plan

_COLUMNS = ("layout", "weights", "KV cache", "context", "sequences", "tokens/s of one", "of all")
_UPPER_BOUND = (
    "tokens/s are upper bounds, from memory bandwidth and rate alone, and count no time between GPUs; engines reach 30 "
    "to 90 % of them"
)


def lines(plan: Plan, name: str, config: EngineConfig) -> Iterator[str]:
    yield from _model(plan, name)
    yield from _prompt_cache(plan, config)
    yield ""
    yield _machine(plan)
    yield from _table(plan)
    yield from _remarks(plan)
    yield ""
    yield from _command(plan, name, config)


def _model(plan: Plan, name: str) -> Iterator[str]:
    outline, decoder = plan.outline, plan.outline.decoder
    stored = f", stored as {facts.types(outline.stored_types)}" if outline.stored_types else ""
    yield (
        f"{name}: {decoder.family}, {facts.count(outline.num_parameters)} parameters{stored}, context "
        f"{decoder.max_position_embeddings} tokens"
    )
    if plan.offers:
        yield f"  on offer     {', '.join(map(str, plan.offers))}"
    if plan.choice is not None:
        yield f"  choice       {plan.choice}"
    ways = (f"{way.name} {facts.size(way.num_bytes)}{' *' if way.refusal else ''}" for way in plan.formats)
    yield f"  weights      {', '.join(ways)}"
    whole = _sequence_bytes(plan, decoder.max_position_embeddings)
    windows = ", less beyond its windows" if any(plan.kv.windows) else ""
    yield (
        f"  KV cache     {facts.size(plan.kv.token_bytes)} a token in {plan.kv.dtype}{windows}; "
        f"{facts.size(whole)} a sequence of {decoder.max_position_embeddings} tokens"
    )
    if plan.machine.gpu is not None:
        step = activation_bytes(EngineConfig.of(name), decoder)
        yield f"  activations  up to {facts.size(step)} a step of 8192 tokens on one GPU; fewer tokens take less"
    yield from (f"  notice: {notice}" for notice in plan.notices)
    if any(way.refusal for way in plan.formats):
        yield "  * does not run here yet, or is an estimate"


def _prompt_cache(plan: Plan, config: EngineConfig) -> Iterator[str]:
    """What is kept below the device, and how many tokens of prompts that is."""
    cache = config.cache
    tiers = [("host memory", "--host-cache", cache.host_cache)]
    if cache.disk_cache is not None:
        tiers.append((cache.disk_cache, "--disk-cache-size", cache.disk_cache_size))
    for where, flag, limit in tiers:
        if limit is not None:
            num_bytes = parse_bytes(flag, limit)
            tokens = num_bytes // plan.kv.token_bytes
            yield f"  prompt cache {facts.size(num_bytes)} of {where}: the prefixes of {tokens:,} tokens"


def _sequence_bytes(plan: Plan, length: int) -> int:
    """What a sequence holds while it is decoded."""
    kv = plan.kv
    held = sum(length if window is None else min(length, window) for window in kv.windows)
    return held * kv.num_places * kv.layer_bytes


def _machine(plan: Plan) -> str:
    machine, gpu = plan.machine, plan.machine.gpu
    here = "this machine: " if machine.is_here else ""
    if gpu is None:
        free = machine.host.free
        memory = "unknown memory" if free is None else f"{facts.size(free)} of memory that are free"
        return f"{here}a CPU, {memory}"
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    parts = [f"{facts.size(gpu.memory_bytes)}"]
    if gpu.free_bytes is not None:
        parts.append(f"{facts.size(free)} free")
    if gpu.bytes_per_s is not None and gpu.flops_per_s is not None:
        parts.append(f"{gpu.bytes_per_s / 1e9:,.0f} GB/s, {gpu.flops_per_s / 1e12:,.0f} TFLOP/s by its {gpu.source}")
    else:
        parts.append("speed unknown: a name such as 3090:8 brings estimates of tokens/s")
    return f"{here}{machine.num_gpus} x {gpu.name}: {', '.join(parts)}"


def _table(plan: Plan) -> Iterator[str]:
    rows = [_COLUMNS, *(_row(found) for found in plan.fits if found.fits)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if len(rows) > 1:
        yield from ("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
                    for row in rows)  # fmt: skip
    yield from (f"  {found.layout.name:<{widths[0]}}  does not fit: {_why(plan, found)}"
                for found in plan.fits if not found.fits)  # fmt: skip
    if not plan.machine.is_here and plan.cpu_weight_bytes is not None:
        yield f"  {'CPU':<{widths[0]}}  {facts.size(plan.cpu_weight_bytes)} of memory, and the KV cache"


def _row(found: Fit) -> tuple[str, ...]:
    counted = found.one.context if found.one is not None else max(found.num_seqs)
    shown = [(length, count) for length, count in found.num_seqs.items() if length <= counted][-2:]
    return (
        f"{found.layout.name}{' *' if found.refusal else ''}",
        facts.size(found.weight_bytes),
        facts.size(found.kv_cache_bytes),
        str(found.context),
        ", ".join(f"{count} of {length}" for length, count in shown),
        _speed(found.one),
        _speed(found.many) + (f" ({found.many.num_seqs} of {found.many.context})" if found.many else ""),
    )


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    return f"<= {speed.tokens_per_s:,.0f}" if speed.tokens_per_s >= 10 else f"<= {speed.tokens_per_s:.1f}"


def _why(plan: Plan, found: Fit) -> str:
    layout, reason = found.layout, found.reason or ""
    if layout.tensor_parallel > 1 and layout.tensor_parallel not in plan.tensor_parallel_sizes:
        sizes = ", ".join(map(str, plan.tensor_parallel_sizes))
        as_pipeline = any(each.layout.pipeline_parallel == layout.num_gpus for each in plan.fits if each.fits)
        tail = f"; {layout.num_gpus} GPUs work as PP" if as_pipeline else ""
        return f"{reason}: TP can be {sizes}{tail}"
    return reason


def _remarks(plan: Plan) -> Iterator[str]:
    for found in plan.fits:
        if found.settings:
            edge = ", and nothing else may use the GPUs" if "max_num_seqs" in found.settings else ""
            yield f"  {found.layout.name}: with {' '.join(setting_flags(found.settings))}{edge}"
        if found.longest:
            more = " ".join(setting_flags(found.longest_settings))
            yield f"  {found.layout.name}: up to {found.longest} tokens with {more}"
    if plan.least:
        yield f"  at least so many of these GPUs: {'; '.join(map(_least, plan.least))}"
    for refusal in dict.fromkeys(found.refusal for found in plan.fits if found.refusal):
        layouts = ", ".join(found.layout.name for found in plan.fits if found.refusal == refusal and found.fits)
        if layouts:
            yield f"  * {layouts}: does not run here yet: {refusal}"
    if any(found.one for found in plan.fits):
        yield f"  {_UPPER_BOUND}"


def _least(each: Least) -> str:
    if each.by_pipeline == each.by_tensor_parallel:
        return f"{each.held} {each.by_pipeline or 'more than any layout takes'}"
    ways = ((each.by_pipeline, "by pipeline"), (each.by_tensor_parallel, "by tensor parallelism"))
    return f"{each.held} {', '.join(f'{count} {how}' for count, how in ways if count is not None)}"


def _command(plan: Plan, name: str, config: EngineConfig) -> Iterator[str]:
    best = plan.best
    if best is None:
        more = next((each for each in plan.least if each.by_pipeline or each.by_tensor_parallel), None)
        count = min(filter(None, (more.by_pipeline, more.by_tensor_parallel)), default=None) if more else None
        tail = f": {count} of these GPUs would carry it" if count else ""
        yield f"nothing of this fits{tail}; a quantized or smaller model takes less, or a shorter --max-model-len"
        return
    yield from _replicas(plan, best, name, config)
    command = serve_line(best, name, config)
    yield f"to serve it: {command}" if best.refusal is None else f"once it runs: {command}"


def _replicas(plan: Plan, best: Fit, name: str, config: EngineConfig) -> Iterator[str]:
    """Where one GPU holds as much context as the fastest layout."""
    whole = next((found for found in plan.fits if found.layout.num_gpus == 1 and found.fits), None)
    if whole is not None and best.layout.num_gpus > 1 and whole.refusal is None and whole.context >= best.context:
        command = f"{serve_line(whole, name, config)} --data-parallel-size {best.layout.num_gpus}"
        yield f"for most requests a second: {command}"


_OF_LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size")
"""Options that the layout says."""


def serve_line(found: Fit, name: str, config: EngineConfig) -> str:
    given = _given_flags(config)
    if found.layout.on_cpu and "--device" not in given:
        given += ["--device", "cpu"]
    return shlex.join(["ingle", "serve", name, *serve_flags(found, given)])


def _given_flags(config: EngineConfig) -> list[str]:
    """What the user said beyond defaults."""
    flags: list[str] = []
    defaults = EngineConfig(config.model)
    groups: Sequence[Any] = (config, config.weights, config.cache, config.parallel)
    plain = {WeightsConfig, CacheConfig, ParallelConfig}
    for group, default in zip(groups, (defaults, defaults.weights, defaults.cache, defaults.parallel), strict=True):
        for option in fields(group):
            value = getattr(group, option.name)
            told = option.name in _OF_LAYOUT or value == getattr(default, option.name)
            if option.name == "model" or type(value) in plain or told:
                continue
            flag = option.name.replace("_", "-")
            if value is True or value is False:
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
    return flags


def as_dict(plan: Plan, name: str, config: EngineConfig) -> dict[str, Any]:
    """For programs: bytes, tokens, and names as in the table."""
    outline, gpu, best = plan.outline, plan.machine.gpu, plan.best
    decoder = outline.decoder
    return {
        "model": name,
        "family": decoder.family,
        "num_parameters": outline.num_parameters,
        "max_position_embeddings": decoder.max_position_embeddings,
        "stored_types": dict(outline.stored_types),
        "stored_bytes": outline.stored_bytes,
        "formats": [asdict(way) for way in plan.formats],
        "offers": [asdict(offer) for offer in plan.offers],
        "choice": plan.choice,
        "kv_cache": {
            "dtype": plan.kv.dtype,
            "bytes_per_token": plan.kv.token_bytes,
            "bytes_per_sequence": _sequence_bytes(plan, decoder.max_position_embeddings),
        },
        "machine": {
            "num_gpus": plan.machine.num_gpus,
            "gpu": None if gpu is None else asdict(gpu),
            "free_host_bytes": plan.machine.host.free,
            "runtime_bytes_per_gpu": RUNTIME_BYTES,
        },
        "tensor_parallel_sizes": list(plan.tensor_parallel_sizes),
        "layouts": [_fit_dict(found, name, config) for found in plan.fits],
        "least_gpus": [asdict(each) for each in plan.least],
        "refusals": list(outline.refusals),
        "notices": list(plan.notices),
        "command": None if best is None else serve_line(best, name, config),
        "runs": best is not None and best.refusal is None,
    }


def _fit_dict(found: Fit, name: str, config: EngineConfig) -> dict[str, Any]:
    values = asdict(found)
    layout = values.pop("layout")
    return {
        "name": found.layout.name,
        **layout,
        "num_gpus": found.layout.num_gpus,
        "fits": found.fits,
        **values,
        "num_seqs": {str(length): count for length, count in found.num_seqs.items()},
        "command": serve_line(found, name, config) if found.fits else None,
    }
