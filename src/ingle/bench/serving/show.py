"""What the terminal shows: progress while a level runs, a row when it is done, latencies at the end."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ingle.bench.serving.level import LevelRun
from ingle.bench.serving.options import Level
from ingle.bench.serving.remarks import done, remarks, shown
from ingle.bench.serving.results import LevelResult, Report, Spread
from ingle.cli.table import print_table
from ingle.errors import printable

_EVERY_S = 0.5
"""Drawing takes the event loop a few milliseconds."""
_HEAD = (
    ("", 7), ("tok/s of one", 12), ("in all", 8), ("req/s", 7), ("TTFT ms", 8), ("TPOT ms", 8), ("ITL ms", 8),
    ("errors", 6), ("client", 6),
)  # fmt: skip
"""Within 80 columns."""
_LATENCIES = ("mean", "p50", "p90", "p99")


class Shown:
    """On stdout what stays, on stderr what moves."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True), auto_refresh=False, transient=True, disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._task = self._progress.add_task("", figures="")
        self._timer: asyncio.TimerHandle | None = None
        server, data = report.server, report.data
        software = " ".join(str(word) for word in (server["software"], server["version"]) if word)
        by, counted = f" ({software})" if software else "", data["tokens_counted_by"]
        print(printable(f"{report.model} at {server['base_url']}{by}, /v1/{server['endpoint']}"))
        print(printable(f"{data['described']}{f', counted by {counted}' if counted else ''}"))
        self._num_told = 0
        self._tell()
        print(flush=True)
        self._head_printed = False
        for level in report.levels:
            if level.complete:
                self.row(level)

    @contextmanager
    def level(self, level: Level) -> Iterator[None]:
        what = f"{level.concurrency} at once" if level.rate is None else f"{level.rate:g} requests/s"
        self._progress.update(self._task, description=what, figures="warming up", completed=0, total=1)
        self._progress.start()
        self._progress.refresh()
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._progress.stop()

    def follow(self, running: LevelRun, num_sessions: int) -> None:
        """Until the level ends."""
        if self._progress.disable:
            return
        began, loop = time.perf_counter(), asyncio.get_running_loop()

        def draw() -> None:
            exchanges = running.exchanges
            seconds = time.perf_counter() - began
            done = len(exchanges) - running.num_running
            begun = len({one.session for one in exchanges})
            failed = sum(one.error is not None for one in exchanges)
            firsts = [one.event_s[0] - one.sent_s for one in exchanges if one.event_s]
            ttft_ms = 1e3 * sum(firsts) / len(firsts) if firsts else 0.0
            events = sum(len(one.event_s) for one in exchanges)
            self._progress.update(
                self._task, completed=max(begun - running.num_running, 0), total=num_sessions,
                figures=f"{done} done, {running.num_running} running, {failed} failed · "
                f"{events / max(seconds, 1e-3):,.1f} events/s · TTFT {ttft_ms:,.0f} ms · {seconds:.0f} s",
            )  # fmt: skip
            self._progress.refresh()
            self._timer = loop.call_later(_EVERY_S, draw)

        draw()

    def row(self, level: LevelResult) -> None:
        if not self._head_printed:
            first = "at rate" if level.rate is not None else "at once"
            print(" ".join(f"{name or first:>{width}}" for name, width in _HEAD))
            self._head_printed = True
        figures = level.figures
        values = (
            level.title,
            _mean(figures.request_tokens_per_s, 1),
            f"{figures.output_tokens_per_s:,.1f}",
            f"{figures.requests_per_s:,.2f}",
            *(_mean(one, 1e3) for one in (figures.ttft_s, figures.tpot_s, figures.itl_s)),
            str(figures.num_errors),
            f"{level.client.cpu_share:.0%}{'!' * level.client.limited}",
        )
        cut = "" if level.complete else "  (cut short)"
        print(" ".join(f"{value:>{width}}" for value, (_, width) in zip(values, _HEAD, strict=True)) + cut, flush=True)

    def end(self, path: Path) -> None:
        """Latencies, what is to be said of the figures, and where they are."""
        report = self._report
        if report.levels:
            print("\nmilliseconds")
            for head, rows in _fitting(*latencies(report.levels)):
                print_table(head, rows, right=range(len(head)))
        self._tell()
        for line in remarks(report.levels):
            print(printable(line))
        self._draw(path)
        if report.stopped is not None:
            print(printable(f"cut short: {report.stopped}"))
            print(printable(f"{done(report)}; `ingle bench serve --resume {path}` completes it"), flush=True)

    def _draw(self, path: Path) -> None:
        from ingle.bench.serving.pictures import page, png

        files = [path]
        if self._report.levels:
            files.append(page.write(path.with_suffix(".html"), [(self._report.model, self._report)]))
            picture = png.write(path.with_suffix(".png"), [(self._report.model, self._report)])
            files += [] if picture is None else [picture]
            if picture is None:
                print(png.MISSING)
        print(printable(f"written: {', '.join(map(str, files))}"))

    def _tell(self) -> None:
        for notice in self._report.notices[self._num_told :]:
            print("notice:", printable(notice), file=sys.stderr)
        self._num_told = len(self._report.notices)


def _fitting(head: list[str], rows: list[list[str]]) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The table, or one for each kind of latency where the terminal is too narrow for all."""
    width = sum(max(map(len, column)) + 2 for column in zip(head, *rows, strict=True))
    if not sys.stdout.isatty() or width <= shutil.get_terminal_size().columns:
        yield head, rows
        return
    for start in range(1, len(head), len(_LATENCIES)):
        kept = (0, *range(start, start + len(_LATENCIES)))
        yield [head[column] for column in kept], [[row[column] for column in kept] for row in rows]


def latencies(levels: list[LevelResult]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of milliseconds."""
    names = [f"{kind} {name}" for kind in ("TTFT", "TPOT", "ITL") for name in _LATENCIES]
    head = ["at rate" if any(level.rate is not None for level in levels) else "at once", *names]
    rows = []
    for level in levels:
        figures, cells = level.figures, [level.title]
        for spread in (figures.ttft_s, figures.tpot_s, figures.itl_s):
            cells += [shown(None if spread is None else getattr(spread, name) * 1e3) for name in _LATENCIES]
        rows.append(cells)
    return head, rows


def _mean(spread: Spread | None, scale: float) -> str:
    return shown(None if spread is None else spread.mean * scale)
