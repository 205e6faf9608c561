"""Whether an engine lives and gets on, from what is heard of it and what the system says of its process.

Two clocks run. One counts how long there was no sign of life: neither a message, of which a thread of the engine sends
two a second, nor time on a processor, which one has that compiles or computes without letting that thread run. The
other is the engine's own: for how long nothing has come of what its loop does.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ingle.channel import Beat

TICK_S = 0.5
_SILENT_S = 4.0
"""Without a sign of life, after which an engine is taken to be unwell: eight beats."""
_STOPPED_S = 1.5
"""The same where the system says that the process is stopped."""
_HOPELESS_S = 10.0
"""The same, after which it is ended."""


@dataclass(frozen=True)
class Unwell:
    why: str
    hopeless: bool
    """It will not get well by itself."""


class Pulse:
    """Of one engine's process. `tick` is called every `TICK_S`.

    Time in which this process itself did not run, since its machine slept or it was stopped, is not counted: whoever
    does not listen hears nothing.
    """

    def __init__(self, pid: int, timeout_s: float, proc: Path = Path("/proc")) -> None:
        """`timeout_s`: for something to come of what the loop does; 0 is for ever."""
        self._timeout_s = timeout_s
        self._stat = proc / str(pid) / "stat" if sys.platform == "linux" else None
        self._beat: Beat | None = None
        self._pending_s: float | None = None
        """For which requests have been waiting; None when none do."""
        self._ticked_s = time.monotonic()
        self._silent_s = 0.0
        """Without a message."""
        self._lifeless_s = 0.0
        """Without a sign of life."""
        self._stopped = False
        self._cpu = -1

    def heard(self, beat: Beat | None = None) -> None:
        """A message came, which may be a beat."""
        self._silent_s = self._lifeless_s = 0.0
        self._stopped = False
        if beat is not None:
            self._beat = beat

    def tick(self, pending: bool) -> None:
        now_s = time.monotonic()
        elapsed_s, self._ticked_s = min(now_s - self._ticked_s, 2 * TICK_S), now_s
        self._pending_s = (elapsed_s if self._pending_s is None else self._pending_s + elapsed_s) if pending else None
        self._silent_s += elapsed_s
        self._lifeless_s += elapsed_s
        if self._silent_s > elapsed_s:
            self._look()

    def _look(self) -> None:
        """What the system says of a process that says nothing."""
        if self._stat is None:
            return
        try:
            state, cpu = _life(self._stat.read_text())
        except (OSError, ValueError, IndexError):
            return
        if cpu != self._cpu:
            self._cpu, self._lifeless_s = cpu, 0.0
        self._stopped = state in "Tt"

    def unwell(self) -> Unwell | None:
        """None of one that is well, as far as is known."""
        if self._beat is None:  # it has not come to that yet, and whether it does is seen by its messages
            return None
        if self._stopped and self._lifeless_s >= _STOPPED_S:
            return Unwell("its process is stopped, as by SIGSTOP", self._lifeless_s >= _HOPELESS_S)
        if self._lifeless_s >= _SILENT_S:
            return Unwell(f"no sign of life for {self._lifeless_s:.0f} s", self._lifeless_s >= _HOPELESS_S)
        if not self._timeout_s:
            return None
        if self._silent_s >= self._timeout_s:
            return Unwell(f"it has said nothing for {self._silent_s:.0f} s", hopeless=True)
        return self._stuck(self._beat, self._beat.seconds + self._silent_s)

    def _stuck(self, beat: Beat, seconds: float) -> Unwell | None:
        if beat.stage in ("stepping", "capturing") and seconds >= self._timeout_s:
            return Unwell(f"no step ended, nor a part of one, for {seconds:.0f} s", hopeless=True)
        forgotten_s = min(seconds, self._pending_s or 0.0)
        if beat.stage == "waiting" and forgotten_s >= self._timeout_s:
            return Unwell(f"requests are pending, and it has done nothing for {forgotten_s:.0f} s", hopeless=True)
        return None


def _life(stat: str) -> tuple[str, int]:
    """State and processor time, in the system's ticks, of a line of /proc/PID/stat: see proc(5).

    The name of the program, in brackets, may hold anything.
    """
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[11]) + int(fields[12])
