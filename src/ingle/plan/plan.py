"""The plan of a model for a machine: formats, memory, layouts that fit and those that do not, the command to type."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ingle.config import EngineConfig
from ingle.description import Offer
from ingle.engine import native_build
from ingle.engine.startup import Numerics, dtype_on_gpu
from ingle.errors import ConfigError, ModelError
from ingle.kv import ITEMSIZES, KvSpec, cache_dtype
from ingle.model.share import MAX_SIZE, sizes_for
from ingle.plan.fit import Case, Fit, fit, least_gpus
from ingle.plan.formats import Held, in_codes
from ingle.plan.layout import Layout
from ingle.plan.layout import weight_sizes as sizes_of
from ingle.plan.machine import Machine
from ingle.plan.outline import Outline, read_outline
from ingle.weights import code_types
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.quantized.config import read_quantization
from ingle.weights.quantized.flag import check_flag
from ingle.weights.quantized.scheme import Target

LENGTHS = (1024, 4096, 16384, 32768, 131072)
"""Of sequences that are counted."""
_TARGETS: tuple[Target, ...] = ("int8", "int4")
"""That are shown beside what the model is; fp8 takes what int8 does."""
_MAX_PIPELINE = 64


@dataclass(frozen=True)
class Format:
    """Weights in one way."""

    name: str
    num_bytes: int
    refusal: str | None
    """Why ingle does not hold them so; None where it does."""


@dataclass(frozen=True)
class Least:
    """The fewest GPUs of a kind that carry the model."""

    held: str
    by_tensor_parallel: int | None
    by_pipeline: int | None


@dataclass(frozen=True)
class Plan:
    outline: Outline
    machine: Machine
    formats: tuple[Format, ...]
    kv: KvSpec
    """On a GPU, or on the CPU where there is none."""
    fits: tuple[Fit, ...]
    tensor_parallel_sizes: tuple[int, ...]
    """In which the model can be split, up to the number of GPUs or 8."""
    least: tuple[Least, ...]
    """Of the machine's kind of GPU; empty without one."""
    cpu_weight_bytes: int | None
    """On the CPU of whatever machine; None where the CPU is not to be used."""
    notices: tuple[str, ...]
    offers: tuple[Offer, ...] = ()
    """The formats in which a hub has the model."""
    choice: str | None = None
    """Which of them was taken and why, where nobody asked for one."""

    @property
    def best(self) -> Fit | None:
        """What to serve: of layouts that fit those that ingle runs, the fastest; else the fastest of the others."""
        fitting = [found for found in self.fits if found.fits]
        running = [found for found in fitting if found.refusal is None]
        return max(running or fitting, key=_worth, default=None)


def _worth(found: Fit) -> tuple[bool, int, float, int]:
    """GPUs before the CPU; then what needs no tight settings, is fast, and holds a long context."""
    return (
        not found.layout.on_cpu,
        -len(found.settings),
        0.0 if found.many is None else found.many.tokens_per_s,
        found.context * found.layout.tensor_parallel,
    )


def make_plan(path: Path, config: EngineConfig, machine: Machine) -> Plan:
    """For the model at `path`: a folder, a GGUF file or a config.json.

    Raises `ModelError` for files that do not describe a decoder, `ConfigError` for a quantization that is not theirs.
    """
    outline = read_outline(path, config)
    target = _target(outline, config)
    on_cpu = machine.gpu is None
    on_gpu = config.parallel.device != "cpu"
    if on_cpu and config.parallel.device == "cuda":
        raise ConfigError("--device cuda: there is no GPU here to plan for; --gpus names others")
    if not on_gpu and not machine.is_here:
        raise ConfigError("--device cpu: --gpus names another machine's GPUs", alternative="leave one of them out")
    notices = list(outline.notices)
    gpu_numerics = _on_gpu(outline, config, machine)
    cpu_numerics = native_build.numerics(config)
    held_gpu, held_cpu = (_held(outline, each, target) for each in (gpu_numerics, cpu_numerics))
    if not on_cpu and on_gpu:
        notices += gpu_numerics.notices
    gpu_case = Case(outline.decoder, held_gpu, gpu_numerics.kv_dtype, config, outline.refusals, LENGTHS)
    cpu_case = replace(gpu_case, held=held_cpu, kv_dtype=cpu_numerics.kv_dtype)
    fits = [fit(gpu_case, layout, machine) for layout in _layouts(gpu_case, machine)] if on_gpu else []
    if machine.is_here and config.parallel.device != "cuda":
        fits.append(fit(cpu_case, Layout(on_cpu=True), machine))
    most = max(machine.num_gpus, 8)
    return Plan(
        outline=outline,
        machine=machine,
        formats=tuple(_formats(outline, (held_cpu,) if on_cpu else (held_gpu,), gpu_numerics)),
        kv=outline.decoder.kv_spec((cpu_numerics if on_cpu else gpu_numerics).kv_dtype),
        fits=tuple(fits),
        tensor_parallel_sizes=tuple(sizes_for(outline.decoder, most)),
        least=() if on_cpu or not on_gpu else tuple(_least(gpu_case, machine, gpu_numerics)),
        cpu_weight_bytes=None if config.parallel.device == "cuda" else sizes_of(outline.decoder, held_cpu).total[1],
        notices=tuple(dict.fromkeys(notices)),
    )


def _on_gpu(outline: Outline, config: EngineConfig, machine: Machine) -> Numerics:
    """As the engine chooses it for such a card."""
    gpu = machine.gpu
    # Scales of packed codes are of float16, and so are products with them.
    stored = "float16" if outline.quantization is not None and outline.torch_dtype is None else outline.torch_dtype
    dtype, notices = dtype_on_gpu(config.weights.dtype, stored, computes_bfloat16=gpu is None or gpu.computes_bfloat16)
    numerics = Numerics.of_floats(dtype, cache_dtype(config.cache.kv_cache_dtype, dtype), "", notices)
    by_triton = code_types.BLOCKS_ON_GPU and (gpu is None or gpu.computes_bfloat16)
    return numerics.keeping_blocks() if outline.is_gguf and by_triton and dtype != "float32" else numerics


def _target(outline: Outline, config: EngineConfig) -> Target | None:
    """What weights are to be rounded to. A configuration may be all that there is of a folder."""
    folder = outline.path if outline.is_gguf or outline.path.is_dir() else outline.path.parent
    quantization = None
    if not outline.is_gguf:
        with contextlib.suppress(ModelError):  # which is told as the outline's
            quantization = read_quantization(outline.path, outline.hf_config)
    return check_flag(config.weights.quantization, folder, quantization)


def _rounds_not(outline: Outline) -> str | None:
    """Why no weights of the model are rounded while they are loaded; None where they would be."""
    if outline.is_gguf or outline.quantization is not None:
        return "the model is quantized already, and held so"
    return None if outline.is_native else "transformers' code runs the model, for which no weights are rounded"


def _held(outline: Outline, numerics: Numerics, target: Target | None) -> Held:
    """How the engine holds the weights, or would."""
    floats = ITEMSIZES[numerics.dtype]
    quantized = outline.quantization
    if target is not None:
        return in_codes(target, floats, _rounds_not(outline))
    if quantized is None:
        each = numerics.weight_bytes(outline.decoder, outline.stored_types) / outline.num_parameters
        kept = numerics.kept_types.intersection(outline.stored_types)
        return Held("as stored" if kept else _type_name(numerics), each, each)
    matrix = quantized.bits / 8
    if outline.stored_bytes is not None:  # what is stored says it exactly
        whole = sizes_of(outline.decoder, Held("", 1.0, 0.0)).total[1]
        rest = outline.num_parameters - whole
        matrix = max(outline.stored_bytes - rest * floats, 0) / whole
    return Held(f"as stored ({quantized.name})", matrix, floats, quantized.group_size)


def _type_name(numerics: Numerics) -> str:
    is_native = not numerics.kept_types.isdisjoint(CODE_TYPES)
    return {4: "float32", 2: "bfloat16"}[numerics.float_itemsize] if is_native else numerics.dtype


def _formats(outline: Outline, held: tuple[Held, ...], numerics: Numerics) -> Iterator[Format]:
    if outline.stored_bytes is not None:
        yield Format(f"in its files ({outline.files})", outline.stored_bytes, None)
    floats = ITEMSIZES[numerics.dtype]
    quantized = outline.quantization is not None
    ways = [*held, *([Held(numerics.dtype, floats, floats)] if quantized or outline.is_gguf else [])]
    ways += [in_codes(target, floats, _rounds_not(outline)) for target in _TARGETS if not quantized]
    seen = set()
    for way in ways:
        if way.name not in seen:
            seen.add(way.name)
            refusal = outline.refusals[0] if quantized and outline.refusals else way.refusal
            yield Format(way.name, sizes_of(outline.decoder, way).total[1], refusal)


def _layouts(case: Case, machine: Machine) -> Iterator[Layout]:
    """One GPU; all ways to split matrices; the shortest pipeline that may fit; all GPUs by both. Or that asked for."""
    count, asked = machine.num_gpus, case.config.parallel
    if count == 0:
        return
    if asked.asks_for_ranks:
        size, pipeline = asked.tensor_parallel_size, asked.pipeline_parallel_size
        whole = max(sizes_for(case.decoder, min(count // pipeline, MAX_SIZE)), default=1)
        tensor = whole if isinstance(size, str) else size
        if tensor * pipeline > count:
            raise ConfigError(f"{Layout(tensor, pipeline).name} takes {tensor * pipeline} GPUs, and there are {count}")
        yield Layout(tensor, pipeline)
        return
    yield Layout()
    sizes = sizes_for(case.decoder, min(count, MAX_SIZE))
    yield from (Layout(size) for size in sizes if size > 1)
    if count > 1 and count not in sizes:
        yield Layout(count)
    stages = [size for size in range(2, min(count, _MAX_PIPELINE) + 1) if size <= case.decoder.num_layers]
    first = next((size for size in stages if fit(case, Layout(1, size), machine).fits), None)
    yield from (Layout(1, size) for size in dict.fromkeys((first or count, count)) if size > 1)
    for size in sizes:
        if size > 1 and count % size == 0 and count // size > 1:
            yield Layout(size, count // size)


def _least(case: Case, machine: Machine, numerics: Numerics) -> Iterator[Least]:
    floats = ITEMSIZES[numerics.dtype]
    for held in (case.held, *(in_codes(target, floats, None) for target in _TARGETS)):
        if held is not case.held and case.held.matrix_bytes <= held.matrix_bytes:
            continue
        this = dataclasses.replace(case, held=held, refusals=(), lengths=())
        splits = (Layout(size) for size in sizes_for(case.decoder, MAX_SIZE))
        by_tensor = least_gpus(this, machine, splits)
        most = min(_MAX_PIPELINE, case.decoder.num_layers)
        by_pipeline = least_gpus(this, machine, (Layout(1, size) for size in range(1, most + 1)))
        yield Least(
            held.name,
            None if by_tensor is None else by_tensor.layout.num_gpus,
            None if by_pipeline is None else by_pipeline.layout.num_gpus,
        )
