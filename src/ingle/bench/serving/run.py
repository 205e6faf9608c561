"""Runs `ingle bench serve`: meets the server, runs level after level, and keeps what was done whatever happens."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httptools
import msgspec

from ingle.bench.serving import results
from ingle.bench.serving.address import parse_address
from ingle.bench.serving.api import CHAT, CUT_SHORT, Dialect, Server, find_dialect, meet
from ingle.bench.serving.connection import Client, ServerGone
from ingle.bench.serving.cost import CostMeter
from ingle.bench.serving.data import DEFAULT_OUTPUT_LEN, Dataset, Recorded, Synthetic, dataset, warm_ups
from ingle.bench.serving.figures import figures_of
from ingle.bench.serving.level import LevelRun, Stopped, unless
from ingle.bench.serving.options import (
    Level,
    OutputOptions,
    ServeOptions,
    TargetOptions,
    check,
    endpoint_of,
    extra_of,
    goodput_of,
    levels_of,
)
from ingle.bench.serving.results import SCHEMA, LevelResult, Report
from ingle.bench.serving.show import Shown
from ingle.bench.serving.tokens import Counting, find_counter
from ingle.errors import ConfigError, EngineError
from ingle.version import __version__

_MAX_WARM_UPS = 32
_WHERE = ("base_url", "api_key", "insecure")
_LEAST_PROMPTS, _PROMPTS_OF_EACH = 16, 4


def serve(options: ServeOptions) -> None:
    """Raises `IngleError` when the run was cut short, `KeyboardInterrupt` when the user did that."""
    options, earlier = _resumed(options)
    check(options)
    stopped = _run_loop(_measure(options, earlier))
    if stopped is not None:
        raise stopped


def _run_loop(work: Coroutine[Any, Any, BaseException | None]) -> BaseException | None:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    handler = signal.getsignal(signal.SIGINT)
    try:
        return uvloop.run(work)
    finally:
        signal.signal(signal.SIGINT, handler)  # which uvloop leaves as its own


async def _measure(options: ServeOptions, earlier: Report | None) -> BaseException | None:
    """What ended it before its time."""
    stop = _stops_on_signals()
    target = options.target
    key = target.api_key or os.environ.get("OPENAI_API_KEY") or os.environ.get("INGLE_API_KEY")
    client = Client(
        parse_address(target.base_url), api_key=key, timeout_s=target.request_timeout, insecure=target.insecure
    )
    try:
        bench = await unless(stop, _prepare(client, options))
    except ServerGone as error:
        return EngineError(str(error))
    except Stopped:
        return KeyboardInterrupt()
    path = options.to.output or Path(f"bench-{_slug(bench.server.model)}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    report = _report(bench, earlier)
    results.write(path, report)  # complains before an hour has gone
    shown = Shown(report)
    try:
        await bench.run(report, path, stop, shown)
    except (Stopped, ServerGone) as error:
        report.status, report.stopped = "partial", str(error)
    else:
        report.status, report.stopped = "complete", None
    finally:
        client.close()
        results.write(path, report)
    shown.end(path)
    if report.stopped is None:
        return None
    if stop.is_set():
        return KeyboardInterrupt()
    return EngineError(f"cut short: {report.stopped}; `ingle bench serve --resume {path}` completes it")


def _stops_on_signals() -> asyncio.Event:
    """A second Ctrl-C ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def told() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, told)
    return stop


@dataclass
class _Bench:
    """A server that was met, and what it is asked."""

    options: ServeOptions
    client: Client
    server: Server
    dialect: Dialect
    counting: Counting | None
    dataset: Dataset
    warm_ups: Synthetic
    notices: list[str]

    async def run(self, report: Report, path: Path, stop: asyncio.Event, shown: Shown) -> None:
        """Level after level, each written when it ends, or when it is cut short. Raises `Stopped`, `ServerGone`."""
        done = {(level.concurrency, level.rate) for level in report.levels if level.complete}
        report.levels = [level for level in report.levels if level.complete]
        for level in levels_of(self.options.load):
            count = self.options.load.num_prompts or _num_prompts(level)
            if (level.concurrency, level.rate) in done:
                self.dataset.skip(count)
                continue
            with shown.level(level):
                sessions = await unless(stop, self.dataset.sessions(f"level {level.title}", count))
                await unless(stop, self._warm_up(level))
                running = self._level_run()
                shown.follow(running, count)
                meter, complete = CostMeter(), False
                try:
                    with meter:
                        seed = f"{self.options.data.seed}/{level.title}"
                        await unless(stop, running.run(level, sessions, seed))
                    complete = True
                finally:
                    if result := self._result(level, running, meter, count, complete=complete):
                        report.levels.append(result)
                        shown.row(result)
                    report.notices = self.told()
                    results.write(path, report)

    def told(self) -> list[str]:
        """Notices so far."""
        notices = list(self.notices)
        if isinstance(self.dataset, Recorded) and self.dataset.repeats:
            notices.append("there are fewer prompts than requests: some were asked again, and may have been cached")
        if isinstance(self.dataset, Synthetic) and self.dataset.num_inexact:
            notices.append(f"{self.dataset.num_inexact} prompts are not of the exact length")
        return notices

    def _level_run(self) -> LevelRun:
        counter = None if self.counting is None else self.counting.counter
        return LevelRun(self.client, self.dialect, counter=counter, think_time_s=self.options.data.think_time)

    async def _warm_up(self, level: Level) -> None:
        load = self.options.load
        count = min(level.concurrency or 1, _MAX_WARM_UPS) if load.num_warmups is None else load.num_warmups
        if count:
            sessions = await self.warm_ups.sessions(f"warm-up {level.title}", count)
            await self._level_run().run(Level(min(count, level.concurrency or count)), sessions, "")

    def _result(
        self, level: Level, running: LevelRun, meter: CostMeter, count: int, *, complete: bool
    ) -> LevelResult | None:
        whole = [one for one in running.exchanges if one.error != CUT_SHORT]
        if not whole:
            return None
        figures = figures_of(whole, goodput_of(self.options.load))
        begin = min(one.sent_s for one in whole)
        gap = None if figures.event_gap_s is None else figures.event_gap_s.p50
        return LevelResult(
            level.concurrency, level.rate, count, complete, time.time() - (time.perf_counter() - begin), figures,
            meter.cost(gap), [one.as_request(begin) for one in whole],
        )  # fmt: skip


def _num_prompts(level: Level) -> int:
    at_once = level.concurrency if level.rate is None else level.rate * 10
    return max(_LEAST_PROMPTS, round(_PROMPTS_OF_EACH * (at_once or 1)))


async def _prepare(client: Client, options: ServeOptions) -> _Bench:
    """Raises `IngleError`, `ServerGone`."""
    data = options.data
    server = await meet(client, options.target.model)
    counting = await find_counter(client, server.model, data.tokenizer)
    counter = None if counting is None else counting.counter
    source, notices = dataset(data, counter), []
    if isinstance(source, Synthetic):
        _fits(server, options)
        if counting is None:
            notices.append("nothing here counts tokens: made-up prompts are of about that length; see --tokenizer")
    fields = extra_of(data) | ({} if data.temperature is None else {"temperature": data.temperature})
    endpoint = endpoint_of(options.target)
    dialect = Dialect(server.model, endpoint or CHAT, fields, ignores_eos=data.ignore_eos)
    warm = warm_ups(data, counter)
    (first,) = await warm.sessions("first", 1)
    dialect, more = await find_dialect(client, dialect, endpoint, first)
    return _Bench(options, client, server, dialect, counting, source, warm, [*notices, *more])


def _fits(server: Server, options: ServeOptions) -> None:
    """Raises `ConfigError` for lengths that are more than the model's context."""
    data, most = options.data, server.max_model_len
    out = data.output_len or DEFAULT_OUTPUT_LEN
    least = data.prefix_len + data.turns * (data.input_len + out) if most is not None else 0
    if most is not None and least > most:
        raise ConfigError(
            f"--input-len {data.input_len} and --output-len {out}"
            f"{f', {data.turns} turns' if data.turns > 1 else ''}"
            f"{f' and --prefix-len {data.prefix_len}' if data.prefix_len else ''}"
            f" are more than the context of {server.model}, {most} tokens"
        )


def _resumed(options: ServeOptions) -> tuple[ServeOptions, Report | None]:
    """The flags of the run that is completed. Raises `ConfigError`."""
    if options.resume is None:
        return options, None
    report = results.read(options.resume)
    if report.status == "complete":
        raise ConfigError(f"--resume {options.resume}: that run is complete")
    given, plain = options.target, TargetOptions()
    address = {name: getattr(given, name) for name in _WHERE}
    if replace(options, resume=None, target=replace(given, **{k: getattr(plain, k) for k in _WHERE})) != ServeOptions():
        raise ConfigError(
            "--resume takes the flags of that run: beside it go --base-url, --api-key and --insecure alone"
        )
    try:
        before = msgspec.convert(report.settings, ServeOptions, dec_hook=lambda kind, value: kind(value))
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"--resume {options.resume}: its settings are damaged: {error}") from None
    other = {name: value for name, value in address.items() if value != getattr(plain, name)}
    target = replace(before.target, **other)
    return replace(before, target=target, to=OutputOptions(output=options.resume)), report


def _report(bench: _Bench, earlier: Report | None) -> Report:
    options, server = bench.options, bench.server
    settings = msgspec.to_builtins(asdict(replace(options, target=replace(options.target, api_key=None))), enc_hook=str)
    report = Report(
        schema=SCHEMA, status="running", stopped="it was ended without a word", levels=[],
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        command=_command(), settings=settings, notices=bench.told(), percents=list(results.PERCENTS),
        server={
            "base_url": str(bench.client.address), "model": server.model, "endpoint": bench.dialect.endpoint,
            "software": server.software, "version": server.version, "card": dict(server.card),
            "on_the_client's_machine": bench.client.address.is_local,
        },
        client=_machine(),
        data={
            "described": bench.dataset.described(),
            "tokens_counted_by": None if bench.counting is None else bench.counting.described,
            "usage": bench.dialect.include_usage, "ignore_eos": bench.dialect.ignores_eos,
        },
    )  # fmt: skip
    if earlier is None:
        return report
    for name in ("model", "endpoint", "version", "software"):
        if (was := earlier.server.get(name)) != (now := report.server[name]):
            report.notices.append(f"the server's {name} was {was} when this run began, and is {now} now")
    report.levels, report.started, report.command = earlier.levels, earlier.started, earlier.command
    return report


def _command() -> list[str]:
    """As it was typed, without the key."""
    words = ["ingle", *sys.argv[1:]]
    for index, word in enumerate(words):
        name, equals, _ = word.replace("_", "-").partition("=")
        if name == "--api-key":
            at = index if equals else index + 1
            words[at : at + 1] = ["--api-key=…" if equals else "…"]
    return words


def _machine() -> dict[str, Any]:
    return {
        "ingle": __version__,
        "python": platform.python_version(),
        "httptools": httptools.__version__,
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _slug(name: str) -> str:
    """Of a model's name; of its file's where it goes by a path."""
    last = name.rsplit("/", 1)[-1] if name.startswith("/") else name
    return re.sub(r"[^A-Za-z0-9.]+", "-", last).strip("-.")[:60] or "model"
