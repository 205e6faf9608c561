"""A program in a pseudo-terminal: keys go in, and what a user would see is read off a screen in memory."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pyte

CTRL_C, CTRL_D, ENTER, LEFT, BACKSPACE = "\x03", "\x04", "\r", "\x1b[D", "\x7f"
_PATIENCE_S = 20.0


def pasted(text: str) -> str:
    """As terminals send a pasted block to programs that asked to be told."""
    return f"\x1b[200~{text}\x1b[201~"


class PseudoTerminal:
    """The terminal is the program's own, so that Ctrl-C is a signal where the program lets it be one."""

    def __init__(self, *command: str, home: Path, columns: int = 80, **environment: str) -> None:
        self.screen = pyte.Screen(columns, 40)
        self._stream = pyte.ByteStream(self.screen)
        self.seen = b""
        self._ours, theirs = pty.openpty()
        self._set_size(columns)
        variables: Mapping[str, str] = {
            **os.environ,
            "TERM": "xterm",
            "LANG": "C.UTF-8",
            "INGLE_HOME": str(home),
            **environment,
        }
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=variables,
            preexec_fn=_own_terminal,
        )
        os.close(theirs)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def shows(self, text: str) -> None:
        """Waits until the screen has this text, line breaks aside."""
        self.until(lambda: text in " ".join(self.lines()), text)

    def prompts(self) -> None:
        """Waits for an empty prompt below all else."""
        self.until(lambda: (self.lines() or [""])[-1] == ">>>" and self.screen.cursor.x == 4, "an empty prompt")

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not holds():
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), f"{what!r} did not come; the screen is {self.lines()}"

    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def resize(self, columns: int) -> None:
        self.screen.resize(40, columns)
        self._set_size(columns)
        self.process.send_signal(signal.SIGWINCH)

    def ends(self) -> int:
        """The exit code of a program that is about to end."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read(0.05)
        while self._read(0.05):
            pass
        return self.process.wait(1)

    def _read(self, timeout_s: float) -> bool:
        """False when nothing came in time, or nothing comes any more."""
        if not select.select([self._ours], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self._ours, 1 << 16)
        except OSError:  # the program has closed it
            return False
        self.seen += data
        self._stream.feed(data)
        return bool(data)

    def _set_size(self, columns: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def _own_terminal() -> None:
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
