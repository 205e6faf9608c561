"""Whether a layout of a model fits a machine, by the engine's own memory plan, and how fast it could be at best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ingle.config import CacheConfig, EngineConfig
from ingle.engine.memory import DeviceMemory, MemoryPlan, activation_bytes, kv_budget, plan_memory
from ingle.engine.roofline import Ceilings, Stored, decode_seconds
from ingle.errors import ConfigError
from ingle.facts import size
from ingle.kv import pages_held
from ingle.model.architecture import DecoderConfig
from ingle.model.share import refusal as size_refusal
from ingle.plan.formats import Held
from ingle.plan.gpus import Gpu
from ingle.plan.layout import Layout, Shard, shard, stages, weight_bytes, weight_sizes
from ingle.plan.machine import Machine

RUNTIME_BYTES = 512 << 20
"""Of a GPU's memory, what its driver and a process's context take before anything is allocated: some 0.4 to 0.6 GiB."""
LEAST_CONTEXT = 512
"""Tokens that a sequence has room for, or a model does not fit."""
_ENOUGH_CONTEXT = 4096
"""With which nobody has to ask for tighter settings, unless a longer one is asked for."""
_ROOMIER: tuple[dict[str, float], ...] = (
    {},
    {"max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.95},
    {"max_num_batched_tokens": 512, "max_num_seqs": 16, "gpu_memory_utilization": 0.99},
)
"""Settings that leave the KV cache more and more memory, the last at the edge of what a GPU has. What the user has set
stays."""
_ON_CPU: tuple[dict[str, float], ...] = ({},)


@dataclass(frozen=True)
class Speed:
    num_seqs: int
    context: int
    """Tokens of each."""
    tokens_per_s: float
    """Of all together, at most."""


@dataclass(frozen=True)
class Fit:
    """What becomes of a layout; bytes are those of the GPU that holds the most weights."""

    layout: Layout
    held: str
    """How weights are held."""
    reason: str | None
    """Why it does not fit; None where it does."""
    refusal: str | None = None
    """Why ingle does not run it yet; None where it does."""
    settings: dict[str, float] = field(default_factory=dict)
    """Options of `ingle serve` beyond those that were given, without which it would not fit so."""
    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_cache_bytes: int = 0
    context: int = 0
    """The longest sequence."""
    num_seqs: dict[int, int] = field(default_factory=dict)
    """How many sequences there is room for at once, by their length; at most --max-num-seqs."""
    one: Speed | None = None
    many: Speed | None = None
    longest: int = 0
    """The longest sequence with `longest_settings`, where that is more than `context`; else 0."""
    longest_settings: dict[str, float] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Case:
    """What is laid out."""

    decoder: DecoderConfig
    held: Held
    kv_dtype: str
    config: EngineConfig
    refusals: tuple[str, ...] = ()
    """Why the model does not run, however it is laid out."""
    lengths: tuple[int, ...] = ()
    """Of which sequences are counted; the longest context that fits is among them."""


def fit(case: Case, layout: Layout, machine: Machine) -> Fit:
    """By the first settings with which there is enough context, or else by those with the most."""
    refusal = next(iter(case.refusals), case.held.refusal)
    name = case.held.name
    if not layout.on_cpu and (why := size_refusal(case.decoder, layout.tensor_parallel)):
        return Fit(layout, name, why, refusal)
    if layout.pipeline_parallel > case.decoder.num_layers:
        return Fit(layout, name, f"{case.decoder.num_layers} layers make no {layout.pipeline_parallel} stages", refusal)
    tried = []
    for settings, config in _rooms(case.config, layout):
        found = _fit(case, layout, machine, config)
        tried.append(replace(found, refusal=refusal, settings=settings if found.fits else {}))
    wanted = case.config.max_model_len
    enough = wanted or min(_ENOUGH_CONTEXT, _longest(case))
    roomiest = max(tried, key=lambda found: found.context)
    best = next((found for found in tried if found.fits and found.context >= enough), roomiest)
    if best.fits and wanted is not None and best.context < wanted:
        return replace(best, reason=f"its KV cache holds {best.context} of the {wanted} tokens that are asked for")
    if best.fits and roomiest.context > best.context:
        return replace(best, longest=roomiest.context, longest_settings=roomiest.settings)
    return best


def least_gpus(case: Case, machine: Machine, layouts: Iterator[Layout]) -> Fit | None:
    """The first of the layouts that fits."""
    return next((found for layout in layouts if (found := fit(case, layout, machine)).fits), None)


def _longest(case: Case) -> int:
    return case.decoder.max_position_embeddings


def _rooms(config: EngineConfig, layout: Layout) -> Iterator[tuple[dict[str, float], EngineConfig]]:
    given = config.options()
    defaults: dict[str, Any] = {"gpu_memory_utilization": CacheConfig().gpu_memory_utilization}
    for settings in _ON_CPU if layout.on_cpu else _ROOMIER:
        free = {name: value for name, value in settings.items() if given[name] == defaults.get(name)}
        yield free, EngineConfig.of(config.model, **{**given, **free})


def _fit(case: Case, layout: Layout, machine: Machine, config: EngineConfig) -> Fit:
    tensor_parallel, decoder = layout.tensor_parallel, case.decoder
    ranges = stages(decoder, case.held, tensor_parallel, layout.pipeline_parallel)
    weights = [weight_bytes(decoder, case.held, each, tensor_parallel, len(ranges)) for each in ranges]
    shards = [shard(decoder, each, tensor_parallel) for each in ranges]
    fullest = max(range(len(ranges)), key=weights.__getitem__)
    activations = 0 if layout.on_cpu else activation_bytes(config, shards[fullest])
    found = Fit(layout, case.held.name, None, None, {}, weights[fullest], activations)
    try:
        plans = [
            _plan(config, part, case.kv_dtype, _memory(machine, layout), taken)
            for part, taken in zip(shards, weights, strict=True)
        ]
    except ConfigError as error:
        return replace(found, reason=_no_room(machine, layout, found, error))
    context = min(plan.limits.max_model_len for plan in plans)
    if context < min(LEAST_CONTEXT, _longest(case)):
        return replace(found, reason=f"beside the weights there is room for {context} tokens", context=context)
    lengths = sorted({length for length in case.lengths if length <= context} | {context})
    num_seqs = {length: min(_sequences(plan, length) for plan in plans) for length in lengths}
    found = replace(
        found,
        kv_cache_bytes=plans[fullest].kv_cache_bytes,
        context=context,
        num_seqs=num_seqs,
    )
    return _with_speed(found, case, machine)


def _memory(machine: Machine, layout: Layout) -> DeviceMemory:
    if layout.on_cpu:
        return machine.host
    gpu = machine.gpu
    assert gpu is not None
    return gpu_memory(gpu)


def gpu_memory(gpu: Gpu) -> DeviceMemory:
    """What the engine finds free of a GPU when it starts."""
    free = gpu.memory_bytes if gpu.free_bytes is None else gpu.free_bytes
    return DeviceMemory(max(free - RUNTIME_BYTES, 0), gpu.memory_bytes)


def _plan(config: EngineConfig, model: Shard, kv_dtype: str, memory: DeviceMemory, taken: int) -> MemoryPlan:
    """As the engine makes it, beside the weights."""
    if memory.free is not None and taken > memory.free:
        raise ConfigError("weights")
    left = memory.beside(taken)
    budget = kv_budget(config, model, left)
    on_gpu = memory.total is not None
    return plan_memory(config, model, model.kv_spec(kv_dtype), on_gpu=on_gpu, budget=budget, free=left.free)


def _no_room(machine: Machine, layout: Layout, found: Fit, error: ConfigError) -> str:
    memory = _memory(machine, layout)
    there = f"{size(memory.free)} are free" if memory.free is not None else "unknown memory"
    share = "its weights take" if layout.num_gpus < 2 else "a GPU's share of the weights takes"
    if memory.free is not None and found.weight_bytes > memory.free:
        return f"{share} {size(found.weight_bytes)}, and {there}"
    if found.activation_bytes and memory.free is not None:
        return (
            f"{share} {size(found.weight_bytes)}, a step up to {size(found.activation_bytes)}: of the {there} "
            "nothing is left for the KV cache"
        )
    return str(error)


def _sequences(plan: MemoryPlan, length: int) -> int:
    limits = plan.limits
    pages = pages_held(limits.windows, length, limits.page_size, limits.max_num_batched_tokens)
    return min((plan.num_pages - 1) // pages, limits.max_num_seqs)


def _with_speed(found: Fit, case: Case, machine: Machine) -> Fit:
    layout = found.layout
    top = machine.cpu if layout.on_cpu else _ceilings(machine.gpu)
    if top is None:
        return found
    decoder = case.decoder
    has = Stored.of(weight_sizes(decoder, case.held), decoder.kv_spec(case.kv_dtype))
    context = _counted(found.num_seqs, case.config.max_model_len)
    num_seqs = max(found.num_seqs[context], 1)
    # Stages take turns: a sequence is in one of them at a time, several are in all of them at once.
    across = _times(top, layout.tensor_parallel)
    one = 1 / decode_seconds(1, context, decoder, has, across)
    in_stage = max(num_seqs // layout.pipeline_parallel, 1)
    busy = min(num_seqs, layout.pipeline_parallel)
    many = busy * in_stage / decode_seconds(in_stage, context, decoder, has, across)
    return replace(found, one=Speed(1, context, one), many=Speed(num_seqs, context, many))


def _counted(num_seqs: dict[int, int], wanted: int | None) -> int:
    """The length of which most is said: that asked for, or a usual one."""
    usual = min(_ENOUGH_CONTEXT, max(num_seqs)) if wanted is None else wanted
    return max((length for length in num_seqs if length <= usual), default=max(num_seqs))


def _ceilings(gpu: Gpu | None) -> Ceilings | None:
    if gpu is None or gpu.bytes_per_s is None or gpu.flops_per_s is None:
        return None
    return Ceilings(gpu.bytes_per_s, gpu.flops_per_s)


def _times(top: Ceilings, count: int) -> Ceilings:
    return Ceilings(top.bytes_per_s * count, top.flops_per_s * count)


def serve_flags(found: Fit, given: Sequence[str]) -> list[str]:
    """Of `ingle serve` for a layout, beside those that the user gave."""
    layout, flags = found.layout, list(given)
    for name, parts in (("tensor", layout.tensor_parallel), ("pipeline", layout.pipeline_parallel)):
        if parts > 1:
            flags += [f"--{name}-parallel-size", str(parts)]
    return flags + setting_flags(found.settings)


def setting_flags(settings: Mapping[str, float]) -> list[str]:
    return [word for option, value in settings.items() for word in (f"--{option.replace('_', '-')}", f"{value:g}")]
