"""How long requests take: one batch after another, each measured from its start to its last token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from ingle.bench.throughput import capture_all, run_once
from ingle.bench.workloads import Workload
from ingle.channel import EngineInfo
from ingle.engine.engine import Engine
from ingle.engine.roofline import Ceilings, Stored, least
from ingle.request import Sampling


@dataclass(frozen=True)
class Spread:
    """Seconds, over the batches."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        return cls(float(np.mean(seconds)), *(float(q) for q in np.percentile(seconds, (50, 90, 99))))


@dataclass(frozen=True)
class Latency:
    """A batch of `batch_size` requests of equal lengths, `num_iters` times."""

    batch_size: int
    input_len: int
    output_len: int
    num_iters: int
    ttft_s: Spread
    """Time to first token; of a batch the mean over its requests, as are the next."""
    tpot_s: Spread
    """Time per output token after the first."""
    latency_s: Spread
    """From the batch's start to its last token."""
    achieved_gb_per_s: float
    """At the median: weights once a step and each sequence's keys and values once a step."""
    share_of_limit: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def measure_latency(
    engine: Engine,
    info: EngineInfo,
    workload: Workload,
    ceilings: Ceilings,
    *,
    num_iters: int,
    num_iters_warmup: int,
    sampling: Sampling,
    report: Callable[[str], None],
) -> Latency:
    """`workload` is the batch: requests of one length. Every iteration has fresh prompts and an idle engine."""
    capture_all(engine)
    runs = []
    for index in range(-num_iters_warmup, num_iters):
        run = run_once(engine, workload, info.vocab_size, sampling, seed=num_iters_warmup + index)
        if index >= 0:
            runs.append(run)
            report(f"{index + 1} of {num_iters}, {run.seconds:.3f} s")
    has = Stored.of(engine.facts.weights, engine.facts.kv)
    limit = least(workload.lengths, engine.facts.model, has, engine.scheduler.limits, ceilings)
    latency = Spread.of([run.seconds for run in runs])
    return Latency(
        batch_size=len(workload.lengths),
        input_len=workload.lengths[0][0],
        output_len=workload.lengths[0][1],
        num_iters=num_iters,
        ttft_s=Spread.of([run.mean_ttft_s for run in runs]),
        tpot_s=Spread.of([run.mean_tpot_s for run in runs]),
        latency_s=latency,
        achieved_gb_per_s=limit.num_bytes / latency.p50 / 1e9,
        share_of_limit=limit.seconds / latency.p50,
    )


def table(result: Latency) -> str:
    """The figures as lines for people, in milliseconds."""
    lines = [f"{'ms':<28}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}"]
    rows = (
        ("time to first token", result.ttft_s),
        ("time per output token", result.tpot_s),
        ("whole request", result.latency_s),
    )
    for name, spread in rows:
        values = (spread.mean, spread.p50, spread.p90, spread.p99)
        lines.append(f"{name:<28}" + "".join(f"{value * 1e3:>10,.2f}" for value in values))
    lines.append(f"{result.achieved_gb_per_s:,.1f} GB/s at the median, {result.share_of_limit:.0%} of the roofline")
    return "\n".join(lines)
