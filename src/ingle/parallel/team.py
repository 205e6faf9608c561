"""The other ranks, as rank 0 has them: their processes, what they are told, and whether they live.

A rank that dies, stops or fails ends all of them, with its reason. They hold memory and sockets without names, so that
nothing of them stays behind, however this process ends.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ingle.config import EngineConfig
from ingle.errors import EngineError
from ingle.parallel.layout import Layout
from ingle.parallel.messages import (
    Alive,
    Backend,
    Copied,
    FromRank,
    FromRankReader,
    Imported,
    Join,
    Joined,
    Load,
    Loaded,
    RankFailed,
    Road,
    ToRanks,
    to_ranks_encoder,
)
from ingle.parallel.ring import Writer, shared_memory

_Said = TypeVar("_Said", Imported, Joined, Loaded)

_LOOK_S = 0.25
_STOPPED_S = 3.0
"""For which a process may be stopped."""
_SILENT_S = 60.0
"""For which one may say nothing that is not: some libraries keep Python's lock for long while they load."""
_WORDS_S = 2.0
"""For a rank's last words, where a step has failed: they say why."""
_DYING_S = 0.3
"""For a killed process to be gone, once others have lost their connections to it."""
_END_S = 3.0

_BOOT = (
    "import gc, signal, sys; gc.disable()\n"
    "for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM: signal.signal(number, signal.SIG_IGN)\n"
    "from ingle.engine.rank import main\n"
    "sys.exit(main())"
)
"""A command of its own, so that no script that has an `LLM` is run again. What ends a group of processes is rank 0's to
judge."""


@dataclass
class _Ranks:
    """What the thread that watches has, which must not keep the team itself alive."""

    devices: list[str]
    """Of all of them, once they are told."""
    rendezvous: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    readers: list[FromRankReader] = field(default_factory=list)
    told: list[queue.SimpleQueue[Imported | Joined | Loaded]] = field(default_factory=list)
    failure: str | None = None
    expected: bool = True
    lost: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    abort: Callable[[], None] = lambda: None
    """Ends what waits for them in this process."""
    let_go: Callable[[], None] = lambda: None
    """Gives up what would keep that from ending."""
    copied: Callable[[Copied], None] = lambda message: None
    """Told of pages that a rank has copied."""
    last_resort: Callable[[str], None] | None = None
    """For a step that does not end although a rank is lost: kernels that wait for another GPU's wait for ever."""
    in_step: bool = False

    def name(self, index: int) -> str:
        process = self.processes[index]
        device = f"{self.devices[index + 1]}, " if self.devices[index + 1] else ""
        return f"rank {index + 1} ({device}process {process.pid})"

    def lose(self, failure: str, *, expected: bool = True) -> None:
        """Ends all of them. The first reason is the one that counts."""
        if self.failure is None and not self.closed.is_set():
            self.failure, self.expected = failure, expected
            self.kill()
            self.lost.set()
            self.end_waiting()
            self.give_up()

    def give_up(self) -> None:
        until_s = time.monotonic() + _END_S
        while self.in_step and not self.closed.is_set() and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        if self.in_step and not self.closed.is_set() and self.last_resort is not None:
            self.last_resort(self.failure or "")

    def end_waiting(self) -> None:
        """`abort`, which may itself wait for what a device does not end."""
        thread = threading.Thread(target=self.abort, name="aborting ranks", daemon=True)
        thread.start()
        thread.join(_END_S)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        self.closed.set()
        self.let_go()
        if self.failure is None:
            self.end_waiting()
        for reader in self.readers:
            with contextlib.suppress(OSError):
                reader.socket.shutdown(socket.SHUT_RDWR)
        self.kill()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        os.close(self.rendezvous)
        # The thread that watches may outlast the interpreter: it must not be who frees what they computed by.
        self.abort = self.let_go = lambda: None
        self.last_resort = None


class Team:
    """Ranks 1 and up. Leaving the context, or forgetting the team, ends them."""

    def __init__(self, num_ranks: int) -> None:
        """Starts them, all but the first, which is this process."""
        self._num_ranks = num_ranks
        count = num_ranks - 1
        ring, rendezvous = shared_memory(count), os.memfd_create("ingle ranks' rendezvous", os.MFD_CLOEXEC)
        self._ranks = _Ranks([""] * num_ranks, rendezvous)
        self._end = weakref.finalize(self, self._ranks.close)
        try:
            for rank in range(1, num_ranks):
                self._begin(rank, ring)
            self._ring = Writer(ring, count)
        finally:
            os.close(ring)
        self._encoder, self._telling = to_ranks_encoder(), threading.Lock()
        self._broken: str | None = None
        threading.Thread(target=_watch, args=(self._ranks,), name="watching ranks", daemon=True).start()

    def _begin(self, rank: int, ring: int) -> None:
        ours, theirs = socket.socketpair()
        # Linux ends a child with the thread that started it, where it asks for that: only the main one lasts.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        numbers = theirs.fileno(), ring, self.rendezvous, rank, self._num_ranks, parent
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, *map(str, numbers)],
                pass_fds=[theirs.fileno(), ring, self.rendezvous],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for answers
            )
        self._ranks.processes.append(process)
        self._ranks.readers.append(FromRankReader(ours))
        self._ranks.told.append(queue.SimpleQueue())

    @property
    def rendezvous(self) -> int:
        """The descriptor through which ranks find each other."""
        return self._ranks.rendezvous

    def ready(self, within_s: float) -> None:
        """Waits until all can join."""
        self._replies(Imported, within_s)

    def join(self, layout: Layout, devices: Sequence[str], *, road: Road | None) -> Backend:
        """Tells each rank what it is, with one of `devices`, and by what they compute together: NCCL wants a GPU for
        each."""
        assert layout.num_ranks == len(devices) == self._num_ranks, "as many ranks as were started"
        apart = len(set(devices)) == len(devices) and "cpu" not in devices
        self._ranks.devices[:] = devices
        backend: Backend = "nccl" if apart else "gloo"
        self.tell(Join(layout.tensor, layout.pipeline, list(devices), backend, road))
        return backend

    def joined(self, within_s: float) -> None:
        """Waits until all have joined."""
        self._replies(Joined, within_s)

    def load(self, config: EngineConfig, path: Path) -> None:
        self.tell(Load(config, str(path)))

    def loaded(self) -> list[Loaded]:
        """Waits until all have loaded their share."""
        return self._replies(Loaded, None)

    def tell(self, message: ToRanks) -> None:
        """All of them. For any thread. Raises `EngineError` when one is gone."""
        with self._telling:
            self.check()
            self._ring.send(self._encoder.encode(message), self.check)

    def on_end(self, abort: Callable[[], None]) -> None:
        """`abort` is called when a rank is lost, from a thread, or when all are to end: what waits for them has to."""
        self._ranks.abort = abort
        if self._ranks.failure is not None:
            abort()

    def on_copied(self, copied: Callable[[Copied], None]) -> None:
        """`copied` is called, from a thread, with what ranks say of `CopyPages`."""
        self._ranks.copied = copied

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        """`last_resort` is called, from a thread, with the reason where a rank is lost and a step does not end."""
        self._ranks.last_resort = last_resort

    def before_end(self, let_go: Callable[[], None]) -> None:
        """`let_go` is called when all are to end: NCCL does not while CUDA graphs hold what it computes."""
        self._ranks.let_go = let_go

    def check(self) -> None:
        """Raises `EngineError` when a rank is gone, or out of step with the others."""
        failure = self._ranks.failure or self._broken
        if failure is not None:
            raise EngineError(failure)

    @property
    def failure(self) -> str | None:
        """Why another rank is gone."""
        return self._ranks.failure

    def wait_for_words(self) -> None:
        """For as long as a rank may take to say why this one has failed."""
        self._ranks.lost.wait(_WORDS_S)

    @property
    def lives(self) -> bool:
        return self._ranks.failure is None and self._broken is None

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Around what this rank does as the others do. Where it fails they no longer agree, and all end.

        Raises `EngineError` where another rank was the first to fail, which then is why.
        """
        self._ranks.in_step = True
        try:
            yield
            self._ranks.in_step = False
        except BaseException as error:
            self._ranks.in_step = False
            self._ranks.lost.wait(_WORDS_S if isinstance(error, Exception) else 0)
            if self._ranks.failure is not None and not isinstance(error, EngineError):
                raise EngineError(self._ranks.failure) from error
            self._broken = self._broken or f"rank 0 failed in a step that it computed with others: {error!r}"
            raise

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def num_ranks(self) -> int:
        return self._num_ranks

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._ranks.processes]

    def _replies(self, kind: type[_Said], within_s: float | None) -> list[_Said]:
        until_s = None if within_s is None else time.monotonic() + within_s
        replies = []
        for index, told in enumerate(self._ranks.told):
            while True:
                self.check()
                try:
                    reply = told.get(timeout=_LOOK_S)
                    break
                except queue.Empty:
                    if until_s is not None and time.monotonic() > until_s:
                        name = self._ranks.name(index)
                        raise EngineError(f"{name} did not join within {within_s:.0f} s") from None
            assert isinstance(reply, kind), f"rank {index + 1} says {reply}"
            replies.append(reply)
        return replies


def _watch(ranks: _Ranks) -> None:
    """Hears what the ranks say, until they are closed."""
    readers = list(ranks.readers)
    heard_s = [time.monotonic()] * len(readers)
    stopped_s: dict[int, float] = {}
    while not ranks.closed.is_set() and readers and ranks.failure is None:
        ready, _, _ = select.select([reader.socket for reader in readers], [], [], _LOOK_S)
        now_s = time.monotonic()
        for index, reader in enumerate(readers):
            if reader.socket in ready:
                heard_s[index] = now_s
                _hear(ranks, index, reader.read())
        for index, process in enumerate(ranks.processes):
            if not _is_stopped(process.pid):
                stopped_s.pop(index, None)
            elif now_s - stopped_s.setdefault(index, now_s) >= _STOPPED_S:
                ranks.lose(f"{ranks.name(index)} is stopped (SIGSTOP?), and the others wait for it: all end")
            if now_s - heard_s[index] > _SILENT_S:
                ranks.lose(f"{ranks.name(index)} has said nothing for {_SILENT_S:.0f} s: all end")


def _hear(ranks: _Ranks, index: int, messages: list[FromRank] | None) -> None:
    if messages is None:
        ranks.lose(f"{ranks.name(index)} has died: {_exit_text(ranks.processes[index])}")
        return
    for message in messages:
        if isinstance(message, RankFailed):
            killed = None if message.expected else _one_that_was_killed(ranks)
            if killed is not None:
                _hear(ranks, killed, None)
            else:
                ranks.lose(f"{ranks.name(index)}: {message.message}", expected=message.expected)
        elif isinstance(message, Copied):
            ranks.copied(message)
        elif not isinstance(message, Alive):
            ranks.told[index].put(message)


def _one_that_was_killed(ranks: _Ranks) -> int | None:
    """Of which a rank that complains has often but lost its connection."""
    until_s = time.monotonic() + _DYING_S
    while time.monotonic() < until_s:
        for index, process in enumerate(ranks.processes):
            if (process.poll() or 0) < 0:
                return index
        time.sleep(0.01)
    return None


def _exit_text(process: subprocess.Popen[bytes]) -> str:
    try:
        code = process.wait(1.0)
    except subprocess.TimeoutExpired:
        return "it closed its socket but still runs"
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def _is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no Linux, or it is gone
        return False
    return state in "Tt"
