"""From a configuration to a running engine, each phase timed: the files are read, the memory is planned, the model is
loaded, the engine starts.

PyTorch is imported only for what needs it, since that takes longer than all else: a model of ingle's own families runs
without on a CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ingle.channel import EngineInfo
from ingle.config import EngineConfig
from ingle.device.kernel_choice import choose
from ingle.engine import native_build
from ingle.engine.check import open_model
from ingle.engine.engine import Engine
from ingle.engine.grammar import Grammars
from ingle.engine.memory import free_host_bytes
from ingle.engine.pages import PagePool
from ingle.engine.ranks import ending, gather, layout_of, load_on, started_early
from ingle.engine.scheduler import Scheduler
from ingle.engine.startup import Loaded, Numerics, OpenModel, Startup
from ingle.engine.worker import Worker
from ingle.errors import ConfigError, printable
from ingle.kernels.cpu import library, threads
from ingle.model.architecture import DecoderConfig
from ingle.model.rope import length_notice
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.gguf import GgufFile
from ingle.weights.source import FLOAT_TYPES

if TYPE_CHECKING:
    from ingle.text.grammar import Vocabulary
    from ingle.text.tokenizer import Tokenizer

_SERVER_ITL_MS = 100.0
"""What people find fluent: ten tokens a second and more."""
_SMALL_BYTES = 256 << 20
"""A model file that one thread reads and packs about as fast as a server's other process starts."""


def build_engine(
    config: EngineConfig,
    path: Path,
    report: Callable[[str], None] = lambda stage: None,
    *,
    checked: Callable[[], None] = lambda: None,
    beside_server: bool = False,
    tokenizer: Callable[[], Tokenizer] | None = None,
    memory: int | None = None,
) -> tuple[Engine, EngineInfo]:
    """Loads the model at `path` (a folder or a .gguf file) and readies an engine for it.

    `report` is told what happens, for people; `checked` is called when nothing is left that could be refused before
    kernels and weights are touched. `beside_server`: another process starts meanwhile, and is as busy; somebody watches
    tokens as they come. `tokenizer`
    gives the model's for the first answer that is bound to a grammar; by default it is read then. `memory`: a file in
    memory that outlasts this process, for a host cache.
    Raises `ModelError` and `ConfigError`.
    """
    if config.target_itl_ms is None:
        config = dataclasses.replace(config, target_itl_ms=_SERVER_ITL_MS if beside_server else 0.0)
    if (count := config.parallel.data_parallel_size) > 1:
        raise ConfigError(
            f"--data-parallel-size {count}: this command has one engine", alternative="leave the flag out"
        )
    startup = Startup(report)
    team = started_early(config)
    with startup.phase("config", "reading the configuration"), ending(team):
        device, opened = open_model(config, path)
        if config.cache.has_tiers:
            from ingle.engine.tiers.build import check_tiers

            check_tiers(config, memory)
    checked()
    with contextlib.closing(opened):
        kernels, layout = CpuKernels(ours=False), layout_of(config, device, opened)
        if device == "cpu" and layout.num_ranks == 1:
            kernels = _ready_cpu_kernels(config, opened, startup, beside_server)
        if kernels.ours and opened.decoder is not None:
            numerics = native_build.numerics(config)
            loaded = native_build.load(config, opened, opened.decoder, numerics, startup)
        elif layout.num_ranks > 1:
            own_kernels = config.parallel.gpu_kernels != "torch"
            crew = gather(config, layout, device, startup, team, own_kernels=own_kernels)
            numerics, loaded = load_on(crew, config, path, opened, startup)
        else:
            with startup.phase("pytorch", "importing PyTorch"):
                from ingle.engine import torch_build
            runner = torch_build.TorchRunner(config, device, our_kernels=kernels.ours)
            numerics, loaded = runner.load(opened, startup)
        pool = PagePool(loaded.memory.num_pages)
        keeper = None
        if config.cache.has_tiers:
            with startup.phase("prompt_cache", "looking through the prompt cache"):
                from ingle.engine.tiers.build import build_tiers, in_words

                keeper = build_tiers(config, opened, numerics, loaded, pool, memory, layout)
    if library.started():
        library.start(_num_threads(config))
    overlap = device == "cuda" if config.overlap is None else config.overlap
    scheduler = Scheduler(pool, loaded.memory.limits, lower=keeper)

    def vocabulary() -> Vocabulary:
        from ingle.text.load import load_tokenizer  # which takes a start's time, and most servers never need

        read = load_tokenizer(path) if tokenizer is None else tokenizer()
        return read.for_grammars(loaded.facts.vocab_size)

    engine = Engine(
        scheduler,
        Worker(loaded.device),
        loaded.facts,
        max_in_flight=max(loaded.memory.limits.num_turns, 2 if overlap else 1),
        seed=config.seed,
        grammars=Grammars(vocabulary, forcing=not overlap),  # no token is forced upon a step in flight
        keeper=keeper,
    )
    notices = [*opened.notices, *_rope_notices(opened, loaded), *kernels.notices, *numerics.notices, *loaded.notices]
    info = _info(opened, numerics, loaded, notices, startup)
    return engine, info if keeper is None else msgspec.structs.replace(info, prompt_cache=in_words(config, keeper))


def _rope_notices(opened: OpenModel, loaded: Loaded) -> list[str]:
    ropes = () if opened.decoder is None else opened.decoder.ropes
    length = loaded.memory.limits.max_model_len
    return [notice for rope in ropes if (notice := length_notice(rope, length)) is not None]


def _info(opened: OpenModel, numerics: Numerics, loaded: Loaded, notices: list[str], startup: Startup) -> EngineInfo:
    memory, facts = loaded.memory, loaded.facts
    num_parameters, weight_bytes = facts.weights.total
    quantized = [kind for kind in loaded.stored_types if kind not in FLOAT_TYPES]
    return EngineInfo(
        max_model_len=memory.limits.max_model_len,
        vocab_size=facts.vocab_size,
        max_num_seqs=memory.limits.max_num_seqs,
        num_pages=memory.num_pages,
        page_size=memory.limits.page_size,
        device=loaded.device_name,
        dtype=numerics.dtype,
        kv_dtype=numerics.kv_dtype,
        product_dtype=numerics.product_dtype,
        factors=sorted(loaded.factors),
        kernels=numerics.kernels,
        family=facts.model.family,
        writes_text=opened.files.pooling is None,
        hidden_size=facts.model.hidden_size,
        num_parameters=num_parameters,
        stored_types=loaded.stored_types,
        expanded_types=[kind for kind in quantized if kind not in numerics.kept_types],
        kept_types=[kind for kind in quantized if kind in numerics.kept_types],
        weight_bytes=weight_bytes,
        kv_cache_bytes=memory.kv_cache_bytes,
        notices=[printable(notice) for notice in [*notices, *memory.notices]],
        timings_s=startup.timings_s,
    )


@dataclass(frozen=True)
class CpuKernels:
    """Whether ingle's run, and what there is to tell about it."""

    ours: bool = True
    notices: tuple[str, ...] = ()


def _ready_cpu_kernels(config: EngineConfig, opened: OpenModel, startup: Startup, beside_server: bool) -> CpuKernels:
    """Starts them, and compares them with PyTorch's operators where that was not done before."""
    if config.parallel.cpu_kernels == "torch":
        return CpuKernels(ours=False)
    just_started = not library.started()
    with startup.phase("kernels", "readying the CPU's kernels, which are compiled when first used on a machine"):
        path = opened.files.path
        one_thread = beside_server and path.is_file() and path.stat().st_size < _SMALL_BYTES
        failure = library.start(1 if one_thread else _num_threads(config), startup.report)
    if failure is not None:
        return CpuKernels(False, (f"PyTorch's operators run in place of ingle's CPU kernels: {failure}",))
    codes = opened.files.quantization is not None or opened.rounding is not None
    rounds = config.parallel.cpu_activations == "int8"  # which only ingle's do
    if opened.decoder is None or codes or rounds:  # of codes PyTorch has no fast products
        return CpuKernels()
    with startup.phase("choice", "choosing between them and PyTorch's operators, measured once for such a model"):
        kernels = _choose_kernels(config, opened.decoder, opened.files.gguf)
    if just_started and not kernels.ours:  # nobody else in this process uses them
        library.forget()
    return kernels


def _choose_kernels(config: EngineConfig, decoder: DecoderConfig, gguf: GgufFile | None) -> CpuKernels:
    stored = {} if gguf is None else gguf.parameters_by_type
    mostly = next((kind for kind in stored if kind in CODE_TYPES), "F32")
    chosen = choose(decoder, native_build.code_type_of(config)(mostly), library.path(), _num_threads(config))
    if chosen.failure is not None:
        return CpuKernels(notices=(f"ingle's CPU kernels were not compared with PyTorch's: {chosen.failure}",))
    free = free_host_bytes()
    if chosen.ours or (free is not None and 4 * sum(stored.values()) > free):  # PyTorch's need them decoded to float32
        return CpuKernels()
    notice = (
        f"PyTorch's operators run in place of ingle's CPU kernels for {library.instructions()}: as measured, they are "
        f"{1 / (chosen.ratio or 1):.1f} times as fast on this machine"
    )
    return CpuKernels(False, (notice,))


def _num_threads(config: EngineConfig) -> int:
    return config.parallel.threads or threads.default_count()
