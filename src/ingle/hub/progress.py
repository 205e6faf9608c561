"""How a pull shows that it moves: bars on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

from ingle import facts
from ingle.errors import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, TaskID


class Progress(Protocol):
    def note(self, text: str) -> None:
        """Say something once."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of `total` bytes."""

    def update(self, done: int) -> None:
        """So many bytes of the stage are done, counted from its beginning."""

    def part(self, name: str, total: int | None) -> Callable[[int], None]:
        """One of several files that come at the same time in the stage that is to begin. What is returned is told how
        many bytes of it are here."""
        ...


_EVERY_S = 5.0
_WORTH_QUARTERS = 1_000_000
"""Bytes: of a smaller stage it is told that it begins."""
_NARROW = 70
"""Columns, below which a terminal has no place for a bar."""


class PlainProgress:
    """A line when a stage begins, at each further quarter of it and every few seconds, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._title, self._total, self._quarter = "", 0, 0
        self._told_s = 0.0

    def note(self, text: str) -> None:
        print(printable(text), file=self._out, flush=True)

    def stage(self, title: str, total: int) -> None:
        self._title, self._total, self._quarter = title, total, 0
        self._told_s = time.monotonic()
        self.note(f"{title}: {facts.decimal_size(total)}" if total else title)

    def update(self, done: int) -> None:
        quarter = 4 * done // max(self._total, 1)
        now_s = time.monotonic()
        if quarter > self._quarter and self._total >= _WORTH_QUARTERS:
            self._quarter, self._told_s = quarter, now_s
            self.note(f"{self._title}: {25 * quarter} %")
        elif now_s - self._told_s >= _EVERY_S:
            self._told_s = now_s
            share = f"{100 * done // self._total} %, " if self._total else ""
            self.note(f"{self._title}: {share}{facts.decimal_size(done)}")

    def part(self, name: str, total: int | None) -> Callable[[int], None]:
        return lambda done: None


class QuietProgress:
    """For those who want to hear of nothing but errors."""

    def note(self, text: str) -> None: ...
    def stage(self, title: str, total: int) -> None: ...
    def update(self, done: int) -> None: ...
    def part(self, name: str, total: int | None) -> Callable[[int], None]:
        return lambda done: None


class BarProgress:
    """A bar for the stage and each file that is coming, with bytes, speed and time left."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False, highlight=False, emoji=False)

    def stage(self, title: str, total: int) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(self._cropped(title), total=total or None)

    def update(self, done: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done)

    def part(self, name: str, total: int | None) -> Callable[[int], None]:
        task = self._bars.add_task(self._cropped(f"  {name}"), total=total, visible=False)

        def show(done: int) -> None:
            self._bars.update(task, completed=done, visible=0 < done < (total or done + 1))

        return show

    def _cropped(self, text: str) -> str:
        width = self._bars.console.width
        most = max(width - (50 if width >= _NARROW else 24), 12)
        text = printable(text)
        return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def show_progress(out: TextIO | None = None) -> Iterator[Progress]:
    """Progress on `out`, by default stderr: bars when that is a terminal, plain lines otherwise."""
    out = out or sys.stderr
    if not out.isatty():
        yield PlainProgress(out)
        return

    from rich.console import Console  # costs 80 ms that only a pull should pay
    from rich.progress import Progress

    console = Console(file=out)
    with Progress(*_columns(console.width), console=console) as bars:
        yield BarProgress(bars)


def _columns(width: int) -> Iterator[ProgressColumn]:
    from rich import progress
    from rich.table import Column

    yield progress.TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True))
    if width >= _NARROW:
        yield progress.BarColumn()
        yield progress.DownloadColumn(table_column=Column(no_wrap=True))
    else:
        yield progress.TaskProgressColumn(table_column=Column(no_wrap=True))
    yield progress.TransferSpeedColumn(table_column=Column(no_wrap=True))
    yield progress.TimeRemainingColumn(compact=width < _NARROW, table_column=Column(no_wrap=True))
