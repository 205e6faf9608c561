"""The engine's process as its parent has it. This module imports little: the child is started before all else."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from ingle.channel import Share
    from ingle.config import EngineConfig

_EXIT_S = 2.0
KILLED_S = 60.0
"""For one that was killed: the system may have much of its memory to give back, also a GPU's. One that hangs in a
driver never ends."""
_LAST_WORDS_S = 0.5
_MAX_LINE_BYTES = 1 << 16
logger = logging.getLogger("ingle.engine")
_THREAD_POOL = {"GOMP_SPINCOUNT": "2000"}
"""PyTorch's CPU threads spin for milliseconds before they sleep: on a core that another process wants, each parallel
operator then waits for a time slice. A short spin keeps the pace of an idle machine, and most of it on a busy one."""

_BOOT = (
    "import gc, signal, sys; gc.disable()\n"
    "for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM: signal.signal(number, signal.SIG_IGN)\n"
    "try: from ingle.engine.process import main\n"
    "except (ImportError, MemoryError) as error: sys.exit(f'the engine cannot start: {error!r}')\n"
    "sys.exit(main())"
)
"""Ctrl-C reaches the whole group of processes, and what stops a service all of it: the parent decides. What imports
create stays: a collector that looks through it again and again takes a seventh of their time."""


def _memory() -> IO[bytes] | None:
    """A file in memory, without a name and empty: a host cache lies in it, and outlasts the engine that fills it."""
    with contextlib.suppress(AttributeError, OSError):  # not on this system
        return os.fdopen(os.memfd_create("ingle host cache", os.MFD_CLOEXEC), "r+b", buffering=0)
    return None


class StartedEngine(Protocol):
    """An engine that somebody started, here or elsewhere, and our end of its channel."""

    socket: socket.socket
    waits_elsewhere: bool
    """Whether to start it anew waits for another machine, and so has no place on an event loop."""

    @property
    def pid(self) -> int:
        """0 where it does not run on this machine."""
        ...

    @property
    def has_ended(self) -> bool: ...

    def load(self, config: EngineConfig, path: Path, share: Share | None = None) -> None:
        """Tells it what to load, and with which `share` of its machine: once, before this process has an event loop."""
        ...

    def start_anew(self) -> None:
        """Another in place of this one, told to load the same, with another `socket`. Raises `OSError`."""
        ...

    def exit_text(self) -> str:
        """Why it ended, in a few words."""
        ...

    def end(self) -> None:
        """Tells it to end, and does not wait for that."""
        ...

    def kill(self) -> None: ...

    def stop(self) -> None:
        """Ends it, by force if it does not go by itself."""
        ...


class EngineProcess:
    """The child process and our end of its channel.

    It imports what it needs while the parent reads flags and imports its own, and waits to be told what to load.
    Leaving the context ends it. One that has ended can be followed by another, which loads the same.
    """

    waits_elsewhere = False

    def __init__(self) -> None:
        self.memory = _memory()
        """Which outlasts each of them."""
        self._start: bytes | None = None
        """What it was told to load."""
        self._printed: threading.Thread | None = None
        self._ending = False
        """It was told to."""
        self._begin()

    def _begin(self) -> None:
        """Best in the main thread: Linux ends a child that asks for it with the thread that started it."""
        self._ending = False
        self.socket, theirs = socket.socketpair()
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        handed = [] if self.memory is None else [self.memory.fileno()]
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(parent), *map(str, handed)],
                pass_fds=[theirs.fileno(), *handed],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**_THREAD_POOL, **os.environ},
            )

    def load(self, config: EngineConfig, path: Path, share: Share | None = None) -> None:
        """Tells it what to load, and with which `share` of the machine: at once, before this process has an event
        loop."""
        from ingle.channel import Share, start_frame

        self._start = start_frame(config, path, Share() if share is None else share)
        self._tell(self._start)

    def _tell(self, start: bytes) -> None:
        pipe = cast(IO[bytes], self._popen.stdout)
        printed = threading.Thread(target=self._log_what_it_prints, args=(pipe,), name="engine's prints", daemon=True)
        printed.start()
        self._printed = printed
        with contextlib.suppress(OSError):  # it has died already: whoever waits for its answer learns why
            self.socket.sendall(start)

    def start_anew(self) -> None:
        """Another process in place of this one, which has ended or ends now, told to load the same."""
        assert self._start is not None, "the first was told what to load"
        self.stop()
        self._begin()
        self._tell(self._start)

    @staticmethod
    def _log_what_it_prints(pipe: IO[bytes]) -> None:
        """Warnings of libraries, last words. Written to our log, which never makes it wait."""
        for line in iter(lambda: pipe.readline(_MAX_LINE_BYTES), b""):
            logger.warning("%s", line.decode(errors="replace").rstrip())

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    def exit_text(self) -> str:
        """Why the process ended, as far as its exit code tells."""
        code = self._popen.poll()
        if code is None:
            return "it closed its channel but still runs"
        if code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
        return f"exit code {code}"

    def end(self) -> None:
        """Tells the process to end."""
        if self._ending:
            return
        self._ending = True
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)  # before the signal, which counts only then
        if self._start is not None:
            self._popen.terminate()
        else:  # it reads its channel only once it has imported everything
            self._popen.kill()

    def stop(self) -> None:
        """Ends the process, by force if it does not go by itself."""
        self.end()
        self.socket.close()
        try:
            self._popen.wait(timeout=_EXIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(timeout=KILLED_S)
        if self._printed is not None:
            self._printed.join(timeout=_LAST_WORDS_S)

    def kill(self) -> None:
        self._popen.kill()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
