"""Offline throughput: all requests of a workload at once, token ids in, tokens per second out."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import msgspec

from ingle.bench.workloads import Workload
from ingle.channel import EngineInfo, EngineStats
from ingle.engine.engine import Engine
from ingle.engine.roofline import Ceilings, Least, Stored, least
from ingle.engine.shared import Stepped
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, Sampling, token_ids


@dataclass(frozen=True)
class Run:
    """One pass over a workload."""

    seconds: float
    """From the first request to the last token."""
    prefill_seconds: float
    """From the first request to the last request's first token."""
    mean_ttft_s: float
    """Time to first token, mean over requests."""
    mean_tpot_s: float
    """Time per output token after the first, mean over requests."""
    num_steps: int


@dataclass(frozen=True)
class Result:
    """A workload's figures, those of its median run."""

    workload: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    """All sequences together, prefill time included."""
    prefill_tokens_per_s: float
    """Prompt tokens over the time until the last request's first token."""
    mean_ttft_s: float
    mean_tpot_s: float
    num_steps: int
    achieved_gb_per_s: float | None
    """Weights once a step and each sequence's keys and values once a step, over the whole time. None, as the next two,
    of several engines."""
    limit_tokens_per_s: float | None
    """Output tokens/s at the roofline."""
    share_of_limit: float | None
    seconds: list[float]
    """Of every run, in order."""

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class Measured(Stepped, Protocol):
    """An engine, or several of them as one."""

    def stats(self) -> EngineStats: ...


def limit_of(engine: Engine, workload: Workload, ceilings: Ceilings) -> Least:
    has = Stored.of(engine.facts.weights, engine.facts.kv)
    return least(workload.lengths, engine.facts.model, has, engine.scheduler.limits, ceilings)


def measure(
    engine: Measured,
    info: EngineInfo,
    workload: Workload,
    limit: Least | None,
    *,
    num_runs: int,
    sampling: Sampling,
    report: Callable[[str], None] = lambda text: None,
) -> Result:
    """Runs a workload `num_runs` times, each with fresh prompts, on an idle, warmed-up engine."""
    runs = []
    for index in range(num_runs):
        runs.append(run_once(engine, workload, info.vocab_size, sampling, seed=index + 1))
        report(f"{workload.name}: run {index + 1} of {num_runs}, {runs[-1].seconds:.2f} s")
    median = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    return Result(
        workload=workload.name,
        num_requests=len(workload.lengths),
        num_prompt_tokens=workload.num_prompt_tokens,
        num_output_tokens=workload.num_output_tokens,
        output_tokens_per_s=workload.num_output_tokens / median.seconds,
        prefill_tokens_per_s=workload.num_prompt_tokens / median.prefill_seconds,
        mean_ttft_s=median.mean_ttft_s,
        mean_tpot_s=median.mean_tpot_s,
        num_steps=median.num_steps,
        achieved_gb_per_s=None if limit is None else limit.num_bytes / median.seconds / 1e9,
        limit_tokens_per_s=None if limit is None else workload.num_output_tokens / limit.seconds,
        share_of_limit=None if limit is None else limit.seconds / median.seconds,
        seconds=[run.seconds for run in runs],
    )


def run_once(engine: Measured, workload: Workload, vocab_size: int, sampling: Sampling, seed: int) -> Run:
    """One pass, requests of this sampling; nothing ends before its length.

    Raises `EngineError` when a request fails.
    """
    prompts = workload.prompts(vocab_size, seed)
    requests = [
        EngineRequest(
            str(index),
            token_ids(prompt),
            msgspec.structs.replace(sampling, max_tokens=num_out, ignore_eos=True, seed=index),
        )
        for index, (prompt, (_, num_out)) in enumerate(zip(prompts, workload.lengths, strict=True))
    ]
    first_token_s: dict[str, float] = {}
    last_token_s: dict[str, float] = {}
    first_step = engine.stats().num_steps
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        outputs = step(engine)
        now = time.perf_counter() - started
        for output in outputs:
            first_token_s.setdefault(output.id, now)
            last_token_s[output.id] = now
    tpots = [
        (last_token_s[request.id] - first_token_s[request.id]) / (num_out - 1)
        for request, (_, num_out) in zip(requests, workload.lengths, strict=True)
        if num_out > 1
    ]
    return Run(
        seconds=max(last_token_s.values()),
        prefill_seconds=max(first_token_s.values()),
        mean_ttft_s=statistics.fmean(first_token_s.values()),
        mean_tpot_s=statistics.fmean(tpots) if tpots else 0.0,
        num_steps=engine.stats().num_steps - first_step,
    )


def step(engine: Measured) -> list[EngineOutput]:
    """The engine's next step. Raises `EngineError` when a request fails in it: what is not computed is no speed."""
    outputs = engine.step()
    for output in outputs:
        if output.finish_reason == "error":
            raise EngineError(f"request {output.id} failed: {output.error}")
    return outputs


_WARM_UP_REQUESTS = 64


def capture_all(engine: Engine) -> None:
    """Leaves nothing to be captured later; nor, as in the server's process, to be walked by the garbage collector.

    That takes a tenth of a second with all of PyTorch in memory, every few hundred steps.
    """
    while engine.worker.device.capture_next():
        pass
    gc.freeze()


def warm_up(
    engine: Measured,
    vocab_size: int,
    workloads: Sequence[Workload],
    sampling: Sampling,
    *,
    settle: Callable[[], None],
    num_engines: int = 1,
) -> None:
    """Runs a shortened form of each workload, so that libraries are initialized, memory touched and graphs captured.

    Graphs are captured of what requests asked of sampling before, so one comes first, to each engine; `settle` leaves
    none to be captured later.
    """
    run_once(engine, Workload("first", ((4, 2),) * num_engines), vocab_size, sampling, seed=0)
    settle()
    for workload in workloads:
        first = workload.lengths[: _WARM_UP_REQUESTS * num_engines]
        lengths = tuple((num_in, min(num_out, 4)) for num_in, num_out in first)
        run_once(engine, Workload("warm-up", lengths), vocab_size, sampling, seed=0)
