"""From a configuration to a running engine: device, type, weights, memory, in that order, each phase timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ingle.channel import EngineInfo
from ingle.config import EngineConfig
from ingle.engine.engine import Engine
from ingle.engine.memory import kv_budget, plan_memory
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Scheduler
from ingle.engine.worker import Worker
from ingle.errors import ConfigError
from ingle.kernels.cpu import library, threads
from ingle.model.architecture import DecoderConfig
from ingle.model.decoder import Decoder
from ingle.model.fallback import FallbackPlan, load_fallback, plan_fallback
from ingle.model.interface import Model
from ingle.model.load import load_decoder
from ingle.model.registry import decoder_config, is_native
from ingle.model.rope import length_notice
from ingle.weights.formats import PlainFormat, WeightFormat, total_size
from ingle.weights.hf_config import read_config
from ingle.weights.packed import PackedFormat, PackedWeight
from ingle.weights.source import FLOAT_TYPES, WeightSource, open_source

_DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class _Numerics:
    """What is stored, and computed, in which type."""

    dtype: torch.dtype
    """Of the KV cache."""
    activations: torch.dtype
    products: torch.dtype
    """The coarsest type to which factors of matrix products may be rounded."""
    matrices: WeightFormat
    kernels: str
    """What multiplies and attends, for people."""
    notices: tuple[str, ...] = ()


@dataclass
class _Startup:
    """Reports phases as they begin and keeps their seconds."""

    report: Callable[[str], None]
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, stage: str) -> Iterator[None]:
        self.report(stage)
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 3)


def build_engine(
    config: EngineConfig, path: Path, report: Callable[[str], None] = lambda stage: None
) -> tuple[Engine, EngineInfo]:
    """Loads the model at `path` (a folder or a .gguf file) and readies an engine for it.

    `report` is told what happens, for people. Raises `ModelError` and `ConfigError`.
    """
    startup = _Startup(report)
    with startup.phase("config", "reading the configuration"):
        hf_config = read_config(path, rope_scaling=config.rope_override(), rope_theta=config.rope_theta)
        plan = _plan(config, path, hf_config)
        device = pick_device(config)
    kernel_notices = []
    if device.type == "cpu":
        with startup.phase("kernels", "readying the CPU's kernels, which are compiled when first used on a machine"):
            kernel_notices = _start_cpu_kernels(config)
    numerics = _numerics(config, plan, hf_config, device)
    with startup.phase("weights", f"loading weights of {plan.family} on {device}"):
        source = open_source(path, config.load_format, config.seed, tied=plan.tied_embeddings)
        with contextlib.closing(source):
            stored_types = source.stored_types
            model = _load(config, plan, source, numerics, device)
    if device.type == "cpu" and library.started():
        library.settle_memory()
    with startup.phase("kv_cache", "allocating the KV cache"):
        budget = kv_budget(config, model.config, device)
        memory = plan_memory(config, model.config, dtype=numerics.dtype, device=device, budget=budget)
        if isinstance(model, Decoder) and memory.limits.max_model_len < model.max_model_len:
            model = model.with_length(memory.limits.max_model_len)
        use_graphs = device.type == "cuda" and not config.enforce_eager
        worker = Worker(
            model, memory.limits, memory.num_pages, device, numerics.dtype,
            use_graphs=use_graphs, own_threads=isinstance(numerics.matrices, PackedFormat),
        )  # fmt: skip
        scheduler = Scheduler(PagePool(memory.num_pages), memory.limits)
    overlap = device.type == "cuda" if config.overlap is None else config.overlap
    engine = Engine(scheduler, worker, overlap=overlap, seed=config.seed)
    num_parameters, weight_bytes = total_size(model.parameters())
    quantized = [kind for kind in stored_types if kind not in FLOAT_TYPES]
    info = EngineInfo(
        max_model_len=memory.limits.max_model_len,
        vocab_size=model.config.vocab_size,
        max_num_seqs=memory.limits.max_num_seqs,
        num_pages=memory.num_pages,
        page_size=memory.limits.page_size,
        device=_device_name(device),
        dtype=_name(numerics.dtype),
        product_dtype=_name(numerics.products),
        factors=_factors(model, numerics),
        kernels=numerics.kernels,
        family=model.config.family,
        num_parameters=num_parameters,
        stored_types=stored_types,
        expanded_types=[kind for kind in quantized if kind not in numerics.matrices.kept_types],
        kept_types=[kind for kind in quantized if kind in numerics.matrices.kept_types],
        weight_bytes=weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        notices=[
            *_plan_notices(plan, memory.limits.max_model_len),
            *kernel_notices,
            *numerics.notices,
            *memory.notices,
        ],
        timings_s=startup.timings_s,
    )
    return engine, info


def _plan(config: EngineConfig, path: Path, hf_config: dict[str, Any]) -> DecoderConfig | FallbackPlan:
    """What will run the model: a family of ingle's own, else transformers' code."""
    if is_native(hf_config):
        return decoder_config(hf_config)
    if config.rope_scaling is not None or config.rope_theta is not None:
        raise ConfigError(
            f"--rope-scaling and --rope-theta: model_type {hf_config['model_type']!r} is run by transformers' code, "
            "which they do not reach; write rope_scaling or rope_theta into its config.json"
        )
    return plan_fallback(path, hf_config, trust_remote_code=config.trust_remote_code)


def _plan_notices(plan: DecoderConfig | FallbackPlan, max_model_len: int) -> list[str]:
    if isinstance(plan, FallbackPlan):
        return [plan.notice]
    notices = (length_notice(rope, max_model_len) for rope in plan.ropes)
    return [notice for notice in notices if notice is not None]


def _wanted_length(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device) -> int:
    """The longest sequence, as far as that is known before the weights are loaded: some tables are made for it.

    Whatever the model claims, it is not longer than a KV cache of all the memory that is left now.
    """
    length = config.max_model_len or model.max_position_embeddings
    if config.num_gpu_blocks_override is not None:
        return length
    room = kv_budget(config, model, device) // (model.kv_elements_per_token * dtype.itemsize)
    return max(min(length, room), 1)


def _load(
    config: EngineConfig,
    plan: DecoderConfig | FallbackPlan,
    source: WeightSource,
    numerics: _Numerics,
    device: torch.device,
) -> Model:
    dtype = numerics.activations
    if isinstance(plan, FallbackPlan):
        seed = config.seed if config.load_format == "dummy" else None
        return load_fallback(plan, dtype=dtype, device=device, max_model_len=config.max_model_len, dummy_seed=seed)
    length = _wanted_length(config, plan, dtype, device)
    return load_decoder(plan, source, matrices=numerics.matrices, dtype=dtype, device=device, max_model_len=length)


def _start_cpu_kernels(config: EngineConfig) -> list[str]:
    """Sets the threads of this process, and readies ingle's kernels if they are wanted."""
    num_threads = config.threads or threads.default_count()
    torch.set_num_threads(num_threads)
    if config.cpu_kernels == "torch":
        return []
    failure = library.start(num_threads)
    return [] if failure is None else [f"PyTorch's operators run in place of ingle's CPU kernels: {failure}"]


def _numerics(
    config: EngineConfig, plan: DecoderConfig | FallbackPlan, hf_config: dict[str, Any], device: torch.device
) -> _Numerics:
    """float32 on a CPU is exact: weights decoded to float32 and multiplied by PyTorch."""
    ours = device.type == "cpu" and config.cpu_kernels == "auto" and library.started()
    packs = ours and isinstance(plan, DecoderConfig)
    if packs and config.dtype not in ("float", "float32"):
        dtype = torch.float16 if config.dtype == "auto" else _DTYPES[config.dtype]
        kernels = f"ingle's for {library.instructions()}"
        return _Numerics(dtype, torch.float32, torch.bfloat16, PackedFormat(), kernels)
    dtype, notices = pick_dtype(config, hf_config, device)
    beside = " and Triton's" if device.type == "cuda" else " and ingle's" if ours and dtype == torch.float32 else ""
    kernels = f"PyTorch's{beside}"
    return _Numerics(dtype, dtype, dtype, PlainFormat(dtype, device), kernels, tuple(notices))


def _factors(model: Model, numerics: _Numerics) -> list[str]:
    """Of matrix products, for people: packed matrices have their own."""
    packed = [weight.factors for weight in model.parameters() if isinstance(weight, PackedWeight)]
    return sorted(frozenset().union(*packed)) if packed else [_name(numerics.products)]


def pick_device(config: EngineConfig) -> torch.device:
    """Raises `ConfigError` when a GPU is asked for and PyTorch sees none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: PyTorch sees no GPU here; give --device cpu, or check the driver with nvidia-smi"
        )
    wanted = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(wanted, 0) if wanted == "cuda" else torch.device("cpu")


def pick_dtype(config: EngineConfig, hf_config: dict[str, Any], device: torch.device) -> tuple[torch.dtype, list[str]]:
    """The type to compute in, and what to tell the user about it."""
    if config.dtype != "auto":
        return _DTYPES[config.dtype], []
    stored = _DTYPES.get(str(hf_config.get("torch_dtype")), torch.bfloat16)
    if device.type == "cuda":
        if stored != torch.bfloat16 or torch.cuda.get_device_capability(device) >= (8, 0):
            return (torch.bfloat16 if stored == torch.float32 else stored), []
        return torch.float16, ["dtype bfloat16 -> float16: this GPU does not compute bfloat16"]
    if _cpu_multiplies_bfloat16():
        return torch.bfloat16, []
    return torch.float32, [f"dtype {_name(stored)} -> float32: this CPU does not multiply it natively"]


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "amx", "bf16"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
