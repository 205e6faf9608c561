"""While a model is loaded: what happens is shown, and the first Ctrl-C or SIGTERM ends it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TextIO

from ingle.errors import printable

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 1.0
"""After a signal, for what is half done to be taken back. A thread in the midst of a product may not hear of it."""
_SILENT_S = 3.0
"""Where there is no terminal, a load that takes less needs no words."""
_FRAME_S = 0.2
_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def loading() -> Iterator[Callable[[str], None]]:
    """Gives what is to be told of each phase. A signal raises `KeyboardInterrupt`, or `SystemExit` with 128 + its
    number; if the process is still there after a second, it is ended by force.
    """
    with _status() as status, _ended_by_signals(status):
        yield status.report


class Status:
    """The phase at hand: in a terminal a line that changes, elsewhere a line for each phase of a slow start."""

    def __init__(self) -> None:
        self._stream = sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.RLock()
        self._stage = ""
        self._told = ""
        self._started = self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell_again, name="status", daemon=True)
        self._thread.start()

    def report(self, stage: str) -> None:
        with self._lock:
            self._stage, self._since = printable(stage), time.monotonic()
            self._tell()

    def line(self, text: str, stream: TextIO | None = None) -> None:
        """Something to stay."""
        with self._lock:
            self._clear()
            print(text, file=stream or self._stream, flush=True)
            self._tell()

    def end(self) -> None:
        self._ended.set()
        with self._lock:
            self._clear()

    def _tell_again(self) -> None:
        while not self._ended.wait(_FRAME_S):
            with self._lock:
                self._tell()

    def _tell(self) -> None:
        if self._ended.is_set() or not self._stage:
            return
        now = time.monotonic()
        if self._is_terminal:
            width = shutil.get_terminal_size().columns
            seconds = f" … {now - self._since:.0f} s"
            self._stream.write(f"{_CLEAR}{self._stage[: width - len(seconds) - 1]}{seconds}")
            self._stream.flush()
        elif self._told != self._stage and now - self._started >= _SILENT_S:
            self._told = self._stage
            print(f"ingle: {self._stage}", file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._is_terminal:
            self._stream.write(_CLEAR)
            self._stream.flush()


class _LogLines(logging.Handler):
    """Writes what is logged meanwhile where the line that changes is not."""

    def __init__(self, status: Status) -> None:
        super().__init__(logging.WARNING)
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        self._status.line(f"ingle: {printable(record.getMessage())}")


@contextlib.contextmanager
def _status() -> Iterator[Status]:
    status = Status()
    logger, handler = logging.getLogger("ingle"), _LogLines(status)
    alone = not logging.getLogger().handlers
    if alone:  # else whoever set up logging has the word
        logger.addHandler(handler)
    try:
        yield status
    finally:
        status.end()
        if alone:
            logger.removeHandler(handler)


@contextlib.contextmanager
def _ended_by_signals(status: Status) -> Iterator[None]:
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if _is_importing(
            frame
        ):  # extension modules swallow an exception that hits their set-up, or turn it into others
            status.end()
            os._exit(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    watch = _Watch(status)
    previous = {number: signal.getsignal(number) for number in _SIGNALS}
    heard = [number for number in _SIGNALS if previous[number] != signal.SIG_IGN]  # as nohup ignores SIGHUP
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    except Exception:
        if came:
            raise SystemExit(128 + came[0]) from None
        raise
    finally:
        for number in heard:
            signal.signal(number, previous[number])
        watch.end()


class _Watch:
    """Ends the process a while after a signal came, whatever its threads do: Python's handlers run between two of its
    own instructions, which may be long to come, and this hears of a signal at once.
    """

    def __init__(self, status: Status) -> None:
        self._status = status
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def end(self) -> None:
        """No effect once a signal came."""
        signal.set_wakeup_fd(self._previous)
        os.close(self._write)

    def _wait(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in _SIGNALS:
                time.sleep(_GRACE_S)
                self._status.end()
                os._exit(128 + number[0])
        os.close(self._read)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
