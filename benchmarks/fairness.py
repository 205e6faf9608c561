"""How long short prompts wait, and streams stall, beside a long prompt, and what that costs the long one.

    python benchmarks/fairness.py MODEL [--long 8000] [--targets 100 0] [--output FILE] [-- flags of ingle serve]

In one process, without a server: short requests come at random moments, and are handed to the engine between steps, as
the engine's process does. An idle server's step is one of the most tokens that a step takes, with nothing before them.
All targets of `--target-itl-ms` take turns in one run. On a machine that does other things, `--cpu-time` with one
thread (`-- --threads 1`) counts the time that the process computes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ingle.cli.flags import parse
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.engine import Engine
from ingle.engine.pace import Pace
from ingle.hub.resolve import ensure_model
from ingle.request import EngineRequest, SamplingParams, TokenIds, token_ids


@dataclass
class Waits:
    """Of short requests, in seconds."""

    first: list[float] = field(default_factory=list)
    """From its arrival to a request's first token."""
    next: list[float] = field(default_factory=list)
    """From one token to the next."""

    def report(self) -> dict[str, float]:
        return {
            "requests": len(self.first),
            **{f"ttft_p{p}_ms": _percentile(self.first, p) * 1e3 for p in (50, 99)},
            **{f"itl_p{p}_ms": _percentile(self.next, p) * 1e3 for p in (50, 99)},
        }


class Load:
    """Requests of random tokens, and when their tokens came."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self._engine = engine
        self._random = random.Random(seed)
        self._came_at: dict[str, float] = {}
        self._last_at: dict[str, float] = {}
        self._num = 0
        self.short = Waits()

    def add(self, num_tokens: int, max_tokens: int, came_at: float | None = None) -> str:
        """Those that say when they came are measured."""
        name = f"{self._num}"
        self._num += 1
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        self._engine.add(EngineRequest(name, self._prompt(num_tokens), params))
        if came_at is not None:
            self._came_at[name] = came_at
        return name

    def step(self) -> set[str]:
        """Returns who ended."""
        ended, outputs = set(), self._engine.step()
        now = self._engine.clock()
        for output in outputs:
            if output.error is not None:
                raise SystemExit(output.error)
            if output.token_ids and output.id in self._came_at:
                if output.id in self._last_at:
                    self.short.next.append(now - self._last_at[output.id])
                else:
                    self.short.first.append(now - self._came_at[output.id])
                self._last_at[output.id] = now
            if output.finish_reason is not None:
                ended.add(output.id)
        return ended

    def drain(self) -> None:
        while self._engine.has_work:
            self.step()

    def arrivals(self, interval_s: float) -> Iterator[float]:
        at = self._engine.clock()
        while True:
            at += self._random.expovariate(1 / interval_s)
            yield at

    def _prompt(self, num_tokens: int) -> TokenIds:
        most = self._engine.facts.vocab_size
        return token_ids([self._random.randrange(most) for _ in range(num_tokens)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--long", type=int, default=8000, help="tokens of a long prompt")
    parser.add_argument("--short", type=int, default=50, help="tokens of a short prompt")
    parser.add_argument("--out", type=int, default=16, help="tokens out of each short request")
    parser.add_argument("--longs", type=int, default=1, help="long prompts at once")
    parser.add_argument("--interval", type=float, default=1.0, help="mean seconds between short requests")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--targets", type=float, nargs="+", default=[100.0, 0.0], help="values of --target-itl-ms")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--output", type=Path)
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:at])
    config = parse(EngineConfig, [options.model, *words[at + 1 :]], command="fairness")
    engine, info = build_engine(config, ensure_model(config.model).path)
    engine.clock = time.process_time if options.cpu_time else time.perf_counter
    for notice in info.notices:
        print("notice:", notice)
    report: dict[str, object] = {"device": info.device, "kernels": info.kernels, "command": " ".join(sys.argv)}
    report |= {"idle": idle(engine, options), "beside": beside_all(engine, options)}
    print(json.dumps(report, indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def idle(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Short requests one after the other, and a whole step."""
    load, steps = Load(engine, 1), []
    num_tokens = min(engine.scheduler.limits.max_num_batched_tokens, engine.scheduler.limits.max_model_len - 1)
    for _ in range(4):
        began_at = engine.clock()
        load.add(num_tokens, 1)
        load.drain()
        steps.append(engine.clock() - began_at)
    load.short = Waits()
    for _ in range(100):
        load.add(options.short, options.out, engine.clock())
        load.drain()
    return {"full_step_ms": min(steps) * 1e3, **load.short.report()}


def beside_all(engine: Engine, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(options.rounds):
        for target in options.targets:
            limits = dataclasses.replace(engine.scheduler.limits, target_itl_s=target / 1e3 or None)
            engine.scheduler.pace = Pace(limits)
            found.setdefault(f"long alone, target {target:g} ms", []).append(
                beside(engine, options, number, interval_s=1e9)
            )
            found.setdefault(f"long and short, target {target:g} ms", []).append(
                beside(engine, options, number, interval_s=options.interval)
            )
    return {name: {key: _percentile([run[key] for run in runs], 50) for key in runs[0]} for name, runs in found.items()}


def beside(engine: Engine, options: argparse.Namespace, seed: int, *, interval_s: float) -> dict[str, float]:
    """Long prompts all the time, so many at once, and short requests that come at random."""
    load = Load(engine, seed)
    longs = {load.add(options.long, 1) for _ in range(options.longs)}
    arrivals, num_longs, num_shorts = load.arrivals(interval_s), 0, 0
    pending = deque([next(arrivals)])
    began_at = engine.clock()
    read_before = engine.stats().num_prompt_tokens
    while engine.clock() - began_at < options.seconds:
        while pending[0] <= engine.clock():
            load.add(options.short, options.out, pending.popleft())
            pending.append(next(arrivals))
            num_shorts += 1
        ended = load.step() & longs
        num_longs += len(ended)
        longs = (longs - ended) | {load.add(options.long, 1) for _ in ended}
    seconds = engine.clock() - began_at
    num_read = engine.stats().num_prompt_tokens - read_before
    for name in longs:
        engine.abort(name)
    load.drain()
    return {
        "prompt_tokens_per_s": num_read / seconds,
        "long_tokens_per_s": (num_read - num_shorts * options.short) / seconds,
        **load.short.report(),
    }


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) * percent // 100, len(ordered) - 1)] if ordered else float("nan")


if __name__ == "__main__":
    main()
