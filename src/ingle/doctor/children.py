"""Programs that checks run: with a time limit, and ended with all that they started, whatever ends the wait."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, NamedTuple

MARK = "ingle-probe "
"""Begins the line in which a probe answers; libraries print what they like around it."""
_MAX_CHARS = 300


class ProbeError(Exception):
    """A program failed; the message is its last word, in a line."""


class TookTooLong(ProbeError):
    """It was ended when its time was up."""


class Said(NamedTuple):
    code: int
    """Its exit code; below 0 the signal that ended it."""
    stdout: str
    stderr: str


class Children:
    """Those that run now. After `end` none of them does, and none is started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, command: list[str], timeout_s: float, environment: dict[str, str] | None = None) -> Said:
        """Raises `ProbeError` when it cannot be started, or takes longer."""
        with self._lock:
            if self._ended:
                raise ProbeError("was not started")
            try:
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    errors="replace", start_new_session=True, env=environment,
                )  # fmt: skip
            except OSError as error:
                raise ProbeError(f"cannot be started: {error.strerror or error}") from error
            self._running.add(child)
        try:
            stdout, stderr = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TookTooLong(f"no answer within {timeout_s:g} s") from None
        finally:
            _kill(child)
            with self._lock:
                self._running.discard(child)
        return Said(child.returncode, stdout, stderr)

    def ask(self, name: str, timeout_s: float, *words: str) -> dict[str, Any]:
        """What a probe (`ingle.doctor.probe`) answers. Raises `ProbeError` when it crashes, fails or takes longer."""
        # Not of the folder where the user stands, which may hold a torch.py.
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        said = self.run([sys.executable, "-m", "ingle.doctor.probe", name, *words], timeout_s, environment)
        answers = [line.removeprefix(MARK) for line in said.stdout.splitlines() if line.startswith(MARK)]
        if said.code == 0 and answers:
            answer: dict[str, Any] = json.loads(answers[-1])
            return answer
        raise ProbeError(last_word(said))

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for child in self._running:
                _kill(child)


def last_word(said: Said) -> str:
    """Why a program failed, as far as it says so."""
    lines = [line.strip() for line in (said.stderr or said.stdout).splitlines() if line.strip()]
    if said.code < 0:
        with contextlib.suppress(ValueError):
            return f"it crashed ({signal.Signals(-said.code).name})"
        return f"it crashed (signal {-said.code})"
    return lines[-1][:_MAX_CHARS] if lines else f"exit code {said.code}"


def _kill(child: subprocess.Popen[str]) -> None:
    """It and its children, which may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.poll()
