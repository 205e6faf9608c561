"""Runs the benchmarks of `ingle bench`, and prints what came out."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ingle import facts
from ingle.bench.ceilings import measure_ceilings
from ingle.bench.cli import LatencyOptions, Profile, StartupOptions, Throughput
from ingle.bench.latency import measure_latency
from ingle.bench.latency import table as table_of_latency
from ingle.bench.profile import profile_decode, profile_prefill, table
from ingle.bench.startup import measure_startup
from ingle.bench.throughput import Measured, Result, capture_all, limit_of, measure, warm_up
from ingle.bench.workloads import Workload, select
from ingle.channel import EngineInfo
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.engine.roofline import Ceilings, Least
from ingle.errors import ConfigError
from ingle.hub.resolve import ensure_model
from ingle.kernels.cpu import threads
from ingle.request import Sampling
from ingle.server.offline import OfflineReplicas
from ingle.version import __version__

_MAX_MODEL_LEN = 4096
"""Unless the flag says otherwise: what the workloads need."""


def startup(options: StartupOptions) -> None:
    config = _config(options.engine)
    results = measure_startup(config, ensure_model(config.model).path)
    for result in results:
        print(result.described())
    if options.output is not None:
        options.output.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")


def profile(options: Profile) -> None:
    engine, _, _ = _engine(options.engine)
    results = [profile_prefill(engine, num_seqs=options.num_prompts, context=options.prompt_tokens)]
    results += [profile_decode(engine, num_seqs=n, context=options.context) for n in options.num_seqs]
    for result in results:
        print(table(result))
    if options.output is not None:
        options.output.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")


def latency(options: LatencyOptions) -> None:
    if min(options.batch_size, options.input_len, options.output_len, options.num_iters) < 1:
        raise ConfigError("--batch-size, --input-len, --output-len and --num-iters are 1 at least")
    engine, info, path = _engine(options.engine)
    if options.input_len + options.output_len > info.max_model_len:
        raise ConfigError(
            f"--input-len {options.input_len} and --output-len {options.output_len} are more than the context of "
            f"{info.max_model_len} tokens; --max-model-len sets it"
        )
    ceilings = _ceilings(engine, info)
    workload = Workload("latency", ((options.input_len, options.output_len),) * options.batch_size)
    result = measure_latency(
        engine, info, workload, ceilings, num_iters=options.num_iters, num_iters_warmup=options.num_iters_warmup,
        sampling=Sampling(temperature=options.temperature), report=_status,
    )  # fmt: skip
    print(table_of_latency(result))
    if options.output is not None:
        _write(options.output, "latency", info, path, ceilings, [result.as_dict()])


def throughput(options: Throughput) -> None:
    if options.engine.parallel.data_parallel_size > 1:
        _throughput_of_replicas(options)
        return
    engine, info, path = _engine(options.engine)
    workloads = select(options.workload or (("gpu",) if engine.facts.on_gpu else ("cpu",)))
    ceilings, sampling = _ceilings(engine, info), _sampling(options)
    warm_up(engine, info.vocab_size, workloads, sampling, settle=lambda: capture_all(engine))
    limits = [limit_of(engine, workload, ceilings) for workload in workloads]
    results = _measured(engine, info, workloads, limits, options)
    if options.output is not None:
        _write(options.output, "throughput", info, path, ceilings, [result.as_dict() for result in results])


def _throughput_of_replicas(options: Throughput) -> None:
    """Without a roofline: each engine has its device by itself, and nothing else is to be measured there."""
    config = _config(options.engine)
    path = ensure_model(config.model).path
    with contextlib.closing(OfflineReplicas(config, path, _status)) as engines:
        info, count = engines.info, config.parallel.data_parallel_size
        print(facts.loaded(info))
        for notice in info.notices:
            print(f"notice: {notice}")
        workloads = select(options.workload or (("gpu",) if config.parallel.device != "cpu" else ("cpu",)))
        warm_up(engines, info.vocab_size, workloads, _sampling(options), settle=engines.settle, num_engines=count)
        results = _measured(engines, info, workloads, [None] * len(workloads), options)
    if options.output is not None:
        _write(options.output, "throughput", info, path, None, [result.as_dict() for result in results])


def _measured(
    engine: Measured,
    info: EngineInfo,
    workloads: Sequence[Workload],
    limits: Sequence[Least | None],
    options: Throughput,
) -> list[Result]:
    print(_HEADER)
    results = []
    for workload, limit in zip(workloads, limits, strict=True):
        result = measure(
            engine, info, workload, limit, num_runs=options.num_runs, sampling=_sampling(options), report=_status
        )
        print(_row(result), flush=True)
        results.append(result)
    return results


def _sampling(options: Throughput) -> Sampling:
    return Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        repetition_penalty=options.repetition_penalty,
        logprobs=options.logprobs,
    )


def _config(flags: EngineConfig) -> EngineConfig:
    cache = replace(flags.cache, enable_prefix_caching=False)
    return replace(flags, max_model_len=flags.max_model_len or _MAX_MODEL_LEN, cache=cache)


def _ceilings(engine: Engine, info: EngineInfo) -> Ceilings:
    """Measured and printed, beside what was loaded."""
    device = torch.device("cuda", 0) if engine.facts.on_gpu else torch.device("cpu")
    ceilings = measure_ceilings(device, getattr(torch, info.dtype)).times(engine.facts.num_devices)
    print(
        f"{facts.loaded(info)}; "
        f"ceilings measured: {ceilings.bytes_per_s / 1e9:,.0f} GB/s, {ceilings.flops_per_s / 1e12:,.2f} TFLOP/s"
    )
    return ceilings


def _write(
    output: Path,
    benchmark: str,
    info: EngineInfo,
    path: Path,
    ceilings: Ceilings | None,
    results: list[dict[str, object]],
) -> None:
    report = {
        "benchmark": benchmark,
        "command": ["ingle", "bench", *sys.argv[sys.argv.index("bench") + 1 :]] if "bench" in sys.argv else sys.argv,
        "date": time.strftime("%Y-%m-%d"),
        "ingle": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": info.device,
        "num_threads": torch.get_num_threads(),
        "ceilings": None if ceilings is None else asdict(ceilings),
        "model": path.name,
        "engine": _info_dict(info),
        "results": results,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")


_COLUMNS = ("workload", 12), ("requests", 8), ("out tok/s", 10), ("prefill tok/s", 13), ("TTFT ms", 9), ("TPOT ms", 8)
_TAIL = ("GB/s", 8), ("limit tok/s", 11), ("share", 6)
_HEADER = "  ".join(f"{name:>{width}}" for name, width in (*_COLUMNS, *_TAIL))


def _row(result: Result) -> str:
    values = (
        result.workload,
        str(result.num_requests),
        f"{result.output_tokens_per_s:,.1f}",
        f"{result.prefill_tokens_per_s:,.0f}",
        f"{result.mean_ttft_s * 1e3:,.1f}",
        f"{result.mean_tpot_s * 1e3:,.2f}",
        "-" if result.achieved_gb_per_s is None else f"{result.achieved_gb_per_s:,.1f}",
        "-" if result.limit_tokens_per_s is None else f"{result.limit_tokens_per_s:,.0f}",
        "-" if result.share_of_limit is None else f"{result.share_of_limit:.0%}",
    )
    return "  ".join(f"{value:>{width}}" for value, (_, width) in zip(values, (*_COLUMNS, *_TAIL), strict=True))


def _status(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def _engine(flags: EngineConfig) -> tuple[Engine, EngineInfo, Path]:
    config = _config(flags)
    path = ensure_model(config.model).path
    engine, info = build_engine(config, path, lambda stage: _status(stage))
    if not engine.facts.on_gpu:
        torch.set_num_threads(
            config.parallel.threads or threads.default_count()
        )  # the ceilings' products run on as many
    for notice in info.notices:
        print(f"notice: {notice}")
    return engine, info, path


def _info_dict(info: EngineInfo) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__struct_fields__}
