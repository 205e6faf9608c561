"""Where the ranks of a team are, and their processes: on this machine, or on others that a cluster gives."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

QUIET = ("TORCH_CPP_LOG_LEVEL", "ERROR")
"""For a store of PyTorch's, which warns of every address that has no name."""
_EXIT_S = 1.0

Program = Literal["rank", "process"]
"""Of `ingle.engine`: a rank, or an engine with whatever ranks it has."""
_BOOT = (
    "import gc, signal, sys; gc.disable()\n"
    "for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM: signal.signal(number, signal.SIG_IGN)\n"
    "from ingle.engine.{} import main\n"
    "sys.exit(main())"
)
"""A command of its own, so that no script that has an `LLM` is run again. What ends a group of processes is rank 0's to
judge."""


def rank_command(*arguments: object, program: Program = "rank") -> list[str]:
    return [sys.executable, "-c", _BOOT.format(program), *map(str, arguments)]


@dataclass(frozen=True)
class Seat:
    """What a cluster has set aside for a rank."""

    node: str
    """What the cluster calls the node: unlike an address, no two have the same."""
    host: str
    """The address by which other nodes reach it."""
    device: str
    """As PyTorch calls it there: cuda:1, or cpu."""


@dataclass(frozen=True)
class Meeting:
    """Where ranks find each other."""

    file: int = -1
    """On one machine: the descriptor of a file without a name, which was empty."""
    hosts: tuple[str, ...] = ()
    """On several: the address of each rank's."""
    port: int = 0
    """At the first of them."""
    listener: int = -1
    """Rank 0's descriptor of what listens there."""


class RankProcess(Protocol):
    """As rank 0 has it."""

    @property
    def pid(self) -> int:
        """On its own host."""
        ...

    def kill(self) -> None: ...

    def wait(self, within_s: float) -> None:
        """Until it is gone, but no longer than that."""
        ...

    def has_ended(self) -> bool: ...

    def was_killed(self) -> bool:
        """Whether something else has ended it."""
        ...

    def how_it_ended(self) -> str:
        """In words. It has, or does so now."""
        ...

    def is_stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        ...


class Hosts(Protocol):
    """Seats of ranks that are not all on this machine, and how a rank is started where its seat is."""

    @property
    def seats(self) -> Sequence[Seat]:
        """Of each rank. The first is this process's own."""
        ...

    def start(self, ranks: Sequence[int], arguments: Sequence[str], secret: bytes) -> Sequence[RankProcess]:
        """Starts `ingle.engine.rank` where these ranks have their seats: with `arguments`, the process that ends it
        with itself (or 0) and its number, and the secret on its standard input."""
        ...

    def failure(self) -> str | None:
        """Why there is no cluster any more."""
        ...

    def close(self) -> None:
        """Ends what was started, and gives the seats back."""
        ...


class LocalProcess:
    """A `RankProcess` of this machine."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def wait(self, within_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def was_killed(self) -> bool:
        return (self._process.poll() or 0) < 0

    def how_it_ended(self) -> str:
        self.wait(_EXIT_S)
        return exit_text(self._process.poll())

    def is_stopped(self) -> bool:
        return is_stopped(self.pid)


def exit_text(code: int | None) -> str:
    """Of a process that has closed its socket."""
    if code is None:
        return "it closed its socket but still runs"
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process of this machine."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux, or it is gone
        return False
    return state in "Tt"
