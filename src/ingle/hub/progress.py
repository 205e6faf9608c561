"""How a pull shows that it moves: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


class Progress(Protocol):
    def note(self, text: str) -> None:
        """Say something once."""

    def stage(self, title: str, total: int) -> None:
        """Begin a stage of `total` bytes."""

    def update(self, done: int) -> None:
        """So many bytes of the stage are done, counted from its beginning."""


class PlainProgress:
    """A line when a stage begins and at each further quarter of it, for logs and pipes."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._title, self._total, self._quarter = "", 0, 0

    def note(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def stage(self, title: str, total: int) -> None:
        self._title, self._total, self._quarter = title, total, 0
        self.note(f"{title}: {total / 1e6:.1f} MB")

    def update(self, done: int) -> None:
        quarter = 4 * done // max(self._total, 1)
        if quarter > self._quarter:
            self._quarter = quarter
            self.note(f"{self._title}: {25 * quarter} %")


class BarProgress:
    """A bar for each stage, with bytes, speed and time left."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def stage(self, title: str, total: int) -> None:
        self._task = self._bars.add_task(title, total=total)

    def update(self, done: int) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done)


@contextmanager
def show_progress(out: TextIO | None = None) -> Iterator[Progress]:
    """Progress on `out`, by default stderr: bars when that is a terminal, plain lines otherwise."""
    out = out or sys.stderr
    if not out.isatty():
        yield PlainProgress(out)
        return

    from rich.console import Console  # costs 80 ms that only a pull should pay
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=out)) as bars:
        yield BarProgress(bars)
