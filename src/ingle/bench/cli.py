"""`ingle bench`: how fast this machine runs a model, beside how fast it could; and how a server does under load.

Only the flags: what runs a benchmark, mostly with PyTorch, is imported once they are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingle.bench.serving.options import CompareOptions, ServeOptions
from ingle.bench.workloads import GROUPS, Workload, select
from ingle.cli.fields import Hidden
from ingle.cli.flags import parse
from ingle.cli.local import importing
from ingle.config import CacheConfig, EngineConfig, ParallelConfig
from ingle.errors import ConfigError
from ingle.habits.near import nearest

_HIDE: Hidden = {CacheConfig: {"enable_prefix_caching"}}
"""Repeated runs must compute what they claim to."""
_OF_ONE_ENGINE: Hidden = {**_HIDE, ParallelConfig: {"data_parallel_size"}}


def hidden_of(name: str) -> Hidden:
    """Fields that are no flags of a benchmark."""
    return _HIDE if name == "throughput" else _OF_ONE_ENGINE


@dataclass(frozen=True)
class Throughput:
    """Run named workloads offline, all requests of one at once, and print tokens/s beside the roofline."""

    engine: EngineConfig
    workload: tuple[str, ...] = ()
    """Names of workloads, or gpu or cpu for all of theirs. Default: the group of the device."""
    num_runs: int = 3
    """Runs of each; the median is reported."""
    temperature: float = 0.6
    """0 measures greedy decoding."""
    top_k: int = 0
    """Of every request, as are the next ones: what else a draw may cost."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    """Report log probabilities, with this many alternatives."""
    output: Path | None = None
    """Write the figures here as JSON."""


@dataclass(frozen=True)
class LatencyOptions:
    """Run one batch of equal requests after another, offline, and print how long each took."""

    engine: EngineConfig
    input_len: int = 128
    output_len: int = 128
    batch_size: int = 1
    num_iters: int = 10
    num_iters_warmup: int = 2
    temperature: float = 0.6
    """0 measures greedy decoding."""
    output: Path | None = None
    """Write the figures here as JSON."""


@dataclass(frozen=True)
class Profile:
    """Print where the time of a step goes: attention, matmuls, sampling, waiting for the host."""

    engine: EngineConfig
    num_seqs: tuple[int, ...] = (1, 16, 64)
    """Numbers of decoding sequences to look at."""
    context: int = 256
    """Tokens that each decoding sequence has."""
    num_prompts: int = 4
    prompt_tokens: int = 512
    output: Path | None = None
    """Write the figures here as JSON."""


@dataclass(frozen=True)
class StartupOptions:
    """Print the seconds from a process's start to its first token: the first ever on a machine, and the next."""

    engine: EngineConfig
    output: Path | None = None
    """Write the figures here as JSON."""


BENCHMARKS: dict[str, type[Any]] = {
    "throughput": Throughput,
    "latency": LatencyOptions,
    "profile": Profile,
    "startup": StartupOptions,
    "serve": ServeOptions,
    "compare": CompareOptions,
}
"""Each is run by the function of its name in the module that `_RUN_BY` names, else in `bench.run`."""
_RUN_BY = {"serve": "ingle.bench.serving.run", "compare": "ingle.bench.serving.compare"}


def main(argv: Sequence[str]) -> None:
    """`argv` without `ingle bench`."""
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in ("-h", "--help", "help"):
        print(_help())
    elif name in BENCHMARKS:
        options = parse(BENCHMARKS[name], rest, command=f"bench {name}", hide=hidden_of(name))
        if name == "throughput":
            select(options.workload)  # complains before anything is loaded
        with importing():
            run = importlib.import_module(_RUN_BY.get(name, "ingle.bench.run"))
        getattr(run, name)(options)
    else:
        near = nearest(name, {each: each for each in BENCHMARKS})
        answer = f"did you mean `ingle bench {near}`?" if near else f"there are {', '.join(BENCHMARKS)}"
        raise ConfigError(f"there is no benchmark {name!r}; {answer}")


def _help() -> str:
    commands = "\n".join(
        f"  {name:<12}{(kind.__doc__ or '').strip().partition(chr(10))[0]}" for name, kind in BENCHMARKS.items()
    )
    groups = "\n".join(_workloads(name, workloads) for name, workloads in GROUPS.items())
    return f"""\
usage: ingle bench BENCHMARK MODEL ...
       ingle bench serve --base-url http://127.0.0.1:8000
       ingle bench compare A.json B.json

How fast this machine runs a model, beside how fast it could; and how a server does under load.

benchmarks:
{commands}

workloads of throughput (--workload NAME …), all requests of one at once:
{groups}

`ingle bench BENCHMARK --help` shows its flags."""


def _workloads(group: str, workloads: Sequence[Workload]) -> str:
    lines = (f"  {workload.name:<14}{workload.described()}" for workload in workloads)
    return f"  {group:<14}all of these:\n" + "\n".join(f"  {line}" for line in lines)
