"""From a configuration to a running engine: device, type, weights, memory, in that order, each phase timed.

PyTorch is imported only for what needs it, since that takes longer than all else: a dense model on a CPU whose kernels
are ingle's own runs without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ingle.channel import EngineInfo
from ingle.config import EngineConfig
from ingle.device.kernel_choice import choose
from ingle.device.native.device import NativeDevice
from ingle.device.native.load import load_host_decoder
from ingle.engine.engine import Engine
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import free_host_bytes, host_kv_budget, plan_memory
from ingle.engine.pages import PagePool
from ingle.engine.parts import Parts, Startup
from ingle.engine.scheduler import Scheduler
from ingle.engine.worker import Worker
from ingle.errors import ConfigError, printable
from ingle.kernels.cpu import library, threads
from ingle.kernels.cpu.library import KV_ITEMSIZES
from ingle.model.architecture import DecoderConfig
from ingle.model.checkpoint import as_stored
from ingle.model.config_keys import check_keys
from ingle.model.kinds import check_head, check_kind
from ingle.model.registry import decoder_config, is_native, refuse_quantized
from ingle.model.rope import length_notice
from ingle.weights.code_types import CODE_TYPES, CodeType, exact, kept
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from ingle.weights.source import FLOAT_TYPES, open_source

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")
"""Device files of NVIDIA's drivers (nvmap: Jetson's), of Windows' for its Linux subsystem, and of AMD's."""
_HOST_KV_TYPES = {
    "auto": "float16",
    "half": "float16",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float": "float32",
    "float32": "float32",
}
"""By the type that the user wants, the KV cache's where ingle's CPU kernels run. Matrices are kept as they are stored,
but for float32, which is exact."""
_SMALL_BYTES = 256 << 20
"""A model file that one thread reads and packs about as fast as a server's other process starts."""


def build_engine(
    config: EngineConfig, path: Path, report: Callable[[str], None] = lambda stage: None, *, beside_server: bool = False
) -> tuple[Engine, EngineInfo]:
    """Loads the model at `path` (a folder or a .gguf file) and readies an engine for it.

    `report` is told what happens, for people. `beside_server`: another process starts meanwhile, and is as busy.
    Raises `ModelError` and `ConfigError`.
    """
    startup = Startup(report)
    with startup.phase("config", "reading the configuration"):
        gguf = None if path.is_dir() else GgufFile(path, texts=False)
        hf_config = read_config(path, gguf=gguf, rope_scaling=config.rope_override(), rope_theta=config.rope_theta)
        check_kind(path, hf_config)
        refuse_quantized(path, hf_config)
        decoder = decoder_config(hf_config) if is_native(hf_config) else None
        key_notices = [] if decoder is None else check_keys(hf_config)
        device = pick_device(config)
    kernels = _CpuKernels()
    if device == "cpu" and config.cpu_kernels != "torch":
        with startup.phase("kernels", "readying the CPU's kernels, which are compiled when first used on a machine"):
            one_thread = beside_server and path.is_file() and path.stat().st_size < _SMALL_BYTES
            kernels = _start_cpu_kernels(1 if one_thread else _num_threads(config))
        if library.started() and decoder is not None:
            with startup.phase("choice", "comparing them with PyTorch's operators, once for such a model on a machine"):
                kernels = _choose_kernels(config, decoder, gguf, forget=kernels.just_started)
        if not kernels.ours:
            config = dataclasses.replace(config, cpu_kernels="torch")
    if device == "cpu" and decoder is not None and config.cpu_kernels == "auto" and library.started():
        parts = _build_host(config, path, gguf, decoder, hf_config, startup)
    else:
        from ingle.engine.torch_build import build_parts

        parts = build_parts(config, path, gguf, decoder, hf_config, device, startup)
    if library.started():
        library.start(_num_threads(config))
    limits = parts.memory.limits
    overlap = device == "cuda" if config.overlap is None else config.overlap
    scheduler = Scheduler(PagePool(parts.memory.num_pages), limits)
    engine = Engine(scheduler, Worker(parts.runs_on), parts.facts, max_in_flight=2 if overlap else 1, seed=config.seed)
    ropes = () if decoder is None else decoder.ropes
    rope_notices = [notice for rope in ropes if (notice := length_notice(rope, limits.max_model_len)) is not None]
    notices = [*key_notices, *rope_notices, *kernels.notices, *parts.notices, *parts.memory.notices]
    return engine, _info(parts, notices, startup.timings_s)


def _info(parts: Parts, notices: list[str], timings_s: dict[str, float]) -> EngineInfo:
    memory, facts = parts.memory, parts.facts
    num_parameters, weight_bytes = facts.weights.total
    quantized = [kind for kind in parts.stored_types if kind not in FLOAT_TYPES]
    return EngineInfo(
        max_model_len=memory.limits.max_model_len,
        vocab_size=facts.vocab_size,
        max_num_seqs=memory.limits.max_num_seqs,
        num_pages=memory.num_pages,
        page_size=memory.limits.page_size,
        device=parts.device,
        dtype=parts.dtype,
        product_dtype=parts.product_dtype,
        factors=sorted(parts.factors),
        kernels=parts.kernels,
        family=facts.model.family,
        num_parameters=num_parameters,
        stored_types=parts.stored_types,
        expanded_types=[kind for kind in quantized if kind not in parts.kept_types],
        kept_types=[kind for kind in quantized if kind in parts.kept_types],
        weight_bytes=weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        notices=[printable(notice) for notice in notices],
        timings_s=timings_s,
    )


def pick_device(config: EngineConfig) -> Literal["cpu", "cuda"]:
    """Raises `ConfigError` when a GPU is asked for and PyTorch sees none."""
    if config.device == "cpu" or (config.device == "auto" and not _gpu_driver_is_there()):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if config.device == "cuda":
        raise ConfigError(
            "--device cuda: PyTorch sees no GPU here; give --device cpu, or check the driver with nvidia-smi"
        )
    return "cpu"


def _gpu_driver_is_there() -> bool:
    """Without one PyTorch sees no GPU, and need not be asked."""
    return sys.platform not in ("linux", "darwin") or any(Path(file).exists() for file in _GPU_DRIVERS)


@dataclass(frozen=True)
class _CpuKernels:
    """Whether ingle's run, and what there is to tell about it."""

    ours: bool = True
    just_started: bool = False
    notices: tuple[str, ...] = ()


def _start_cpu_kernels(num_threads: int) -> _CpuKernels:
    """Readies ingle's kernels, to load on so many threads."""
    before = library.started()
    failure = library.start(num_threads)
    if failure is not None:
        notice = f"PyTorch's operators run in place of ingle's CPU kernels: {failure}"
        return _CpuKernels(ours=False, notices=(notice,))
    return _CpuKernels(just_started=not before)


def _choose_kernels(
    config: EngineConfig, decoder: DecoderConfig, gguf: GgufFile | None, *, forget: bool
) -> _CpuKernels:
    """What is faster here; `forget`: nobody else in this process uses the started ones."""
    stored = {} if gguf is None else gguf.parameters_by_type
    mostly = next((kind for kind in stored if kind in CODE_TYPES), "F32")
    chosen = choose(decoder, _code_type_of(config)(mostly), library.path(), _num_threads(config))
    if chosen.failure is not None:
        return _CpuKernels(notices=(f"ingle's CPU kernels were not compared with PyTorch's: {chosen.failure}",))
    free = free_host_bytes()
    if chosen.ours or (free is not None and 4 * sum(stored.values()) > free):  # PyTorch's need them decoded to float32
        return _CpuKernels()
    notice = (
        f"PyTorch's operators run in place of ingle's CPU kernels for {library.instructions()}: as measured, they are "
        f"{1 / (chosen.ratio or 1):.1f} times as fast on this machine"
    )
    if forget:
        library.forget()
    return _CpuKernels(ours=False, notices=(notice,))


def _code_type_of(config: EngineConfig) -> Callable[[str], CodeType]:
    """How ingle's kernels hold what is stored in a type."""
    return exact if _HOST_KV_TYPES[config.dtype] == "float32" else kept


def _num_threads(config: EngineConfig) -> int:
    return config.threads or threads.default_count()


# ---- without PyTorch


def _build_host(
    config: EngineConfig,
    path: Path,
    gguf: GgufFile | None,
    decoder: DecoderConfig,
    hf_config: dict[str, Any],
    startup: Startup,
) -> Parts:
    dtype = _HOST_KV_TYPES[config.dtype]
    with startup.phase("weights", f"loading weights of {decoder.family} on cpu"):
        source = open_source(path, config.load_format, config.seed, gguf=gguf)
        with contextlib.closing(source):
            check_head(path, hf_config, source, decoder.names.lm_head)
            stored_types = source.stored_types
            decoder, notices = as_stored(decoder, source)
            model = load_host_decoder(decoder, source, _code_type_of(config))
    library.settle_memory()
    with startup.phase("kv_cache", "allocating the KV cache"):
        budget = host_kv_budget(config)
        memory = plan_memory(
            config, decoder, kv_itemsize=KV_ITEMSIZES[dtype], on_gpu=False, budget=budget, free=free_host_bytes()
        )
        model = model.with_length(memory.limits.max_model_len)
        device = NativeDevice(model, memory.limits, memory.num_pages, dtype)
    return Parts(
        runs_on=device,
        facts=EngineFacts(model.config, model.sizes(), on_gpu=False, kv_itemsize=KV_ITEMSIZES[dtype]),
        memory=memory,
        stored_types=stored_types,
        kept_types=frozenset(CODE_TYPES) if dtype != "float32" else frozenset(),
        device="cpu",
        dtype=dtype,
        product_dtype="bfloat16" if dtype != "float32" else dtype,
        factors=model.factors,
        kernels=f"ingle's for {library.instructions()}",
        notices=tuple(notices),
    )
