"""The other ranks, as rank 0 has them: their processes, what they are told, and whether they live.

A rank that dies, stops or fails ends all of them, with its reason. Those of this machine hold memory and sockets
without names, so that nothing of them stays behind, however this process ends; those of others connect (`reach.py`).
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import select
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from ingle.config import EngineConfig
from ingle.errors import EngineError
from ingle.parallel.beside import call_beside
from ingle.parallel.hosts import Hosts, LocalProcess, Meeting, RankProcess, rank_command
from ingle.parallel.layout import Layout
from ingle.parallel.messages import (
    Alive,
    Backend,
    Copied,
    FrameReader,
    FromRank,
    Imported,
    Join,
    Joined,
    Load,
    Loaded,
    RankFailed,
    ToRanks,
    from_rank_decoder,
    to_ranks_encoder,
)
from ingle.parallel.reach import OF_A_RANK, SECRET_BYTES, Caller, Gate, Sender, listening
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
_REACH_S = 60.0
"""For a rank on another host to start Python and to connect."""


@dataclass
class _Ranks:
    """What the thread that watches has, which must not keep the team itself alive."""

    devices: list[str]
    """Of all of them, once they are told."""
    rendezvous: int
    hosts: Hosts | None = None
    """Where they are, if not all of them on this machine."""
    processes: list[RankProcess] = field(default_factory=list)
    readers: list[FrameReader[FromRank]] = field(default_factory=list)
    told: list[queue.SimpleQueue[Imported | Joined | Loaded]] = field(default_factory=list)
    failure: str | None = None
    expected: bool = True
    lost: threading.Event = field(default_factory=threading.Event)
    closed: threading.Event = field(default_factory=threading.Event)
    aborted: threading.Event = field(default_factory=threading.Event)
    abort: Callable[[], None] = lambda: None
    """Ends what waits for them in this process."""
    let_go: Callable[[], None] = lambda: None
    """Gives up what would keep that from ending."""
    copied: Callable[[Copied], None] = lambda message: None
    """Told of pages that a rank has copied."""
    last_resort: Callable[[str], None] | None = None
    """For a process that does not find out by itself that a rank is lost: it has nothing to do, or is in a step that
    does not end, as kernels that wait for another GPU's wait for ever."""

    def name(self, index: int) -> str:
        where = [f"process {self.processes[index].pid}"]
        if self.devices[index + 1]:
            where.insert(0, self.devices[index + 1])
        if self.is_elsewhere(index + 1):
            assert self.hosts is not None
            where.insert(0, f"node {self.hosts.seats[index + 1].host}")
        return f"rank {index + 1} ({', '.join(where)})"

    def is_elsewhere(self, rank: int) -> bool:
        """Whether it is on another node than this process."""
        return self.hosts is not None and self.hosts.seats[rank].node != self.hosts.seats[0].node

    def lose(self, failure: str, *, expected: bool = True) -> None:
        """Ends all of them. The first reason is the one that counts."""
        if self.failure is None and not self.closed.is_set():
            self.failure, self.expected = failure, expected
            self.kill()
            self.lost.set()
            self.end_waiting()
            self.give_up()

    def give_up(self) -> None:
        """Where this process has not come to it by itself, in a step that does not end or with nothing to do."""
        until_s = time.monotonic() + _END_S
        while not self.closed.is_set() and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        if not self.closed.is_set() and self.last_resort is not None:
            self.last_resort(self.failure or "")

    def end_waiting(self) -> None:
        """`abort`, which may itself wait for what a device does not end."""
        call_beside([self.abort], _END_S)
        self.aborted.set()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        self.closed.set()
        self.let_go()
        if self.failure is None:
            self.end_waiting()
        else:  # the interpreter must not end while a thread is amid C++ that it would cut short
            self.aborted.wait(_END_S)
        for reader in self.readers:
            with contextlib.suppress(OSError):
                reader.socket.shutdown(socket.SHUT_RDWR)
        self.kill()
        for process in self.processes:
            process.wait(_END_S)
        if self.hosts is not None:
            self.hosts.close()
        os.close(self.rendezvous)
        # The thread that watches may outlast the interpreter: it must not be who frees what they computed by.
        self.abort = self.let_go = lambda: None
        self.last_resort = None


class _Way(Protocol):
    """By which ranks are told."""

    def send(self, message: bytes, alive: Callable[[], None]) -> None: ...


class Team:
    """Ranks 1 and up. Leaving the context, or forgetting the team, ends them."""

    def __init__(self, num_ranks: int, hosts: Hosts | None = None) -> None:
        """Starts them, all but the first, which is this process: on this machine, or where `hosts` has seats for
        them."""
        self._num_ranks = num_ranks
        self._ranks = _Ranks([""] * num_ranks, os.memfd_create("ingle ranks' rendezvous", os.MFD_CLOEXEC), hosts)
        self._end = weakref.finalize(self, self._ranks.close)
        self._encoder, self._telling = to_ranks_encoder(), threading.Lock()
        self._broken: str | None = None
        self._ways: list[_Way] = []
        try:
            here = [rank for rank in range(1, num_ranks) if not self._ranks.is_elsewhere(rank)]
            began = dict(zip(here, self._begin(here), strict=True)) if here else {}
            others = [rank for rank in range(1, num_ranks) if rank not in began]
            if others and hosts is not None:
                began |= zip(others, self._call_in(others, hosts), strict=True)
            for rank in range(1, num_ranks):
                process, control = began[rank]
                self._ranks.processes.append(process)
                self._ranks.readers.append(FrameReader(control, from_rank_decoder()))
                self._ranks.told.append(queue.SimpleQueue())
        except BaseException:
            self.close()
            raise
        threading.Thread(target=_watch, args=(self._ranks,), name="watching ranks", daemon=True).start()

    def _begin(self, ranks: Sequence[int]) -> list[tuple[RankProcess, socket.socket]]:
        """Those of this machine."""
        ring = shared_memory(len(ranks))
        try:
            began = [self._begin_one(rank, ring, len(ranks), index) for index, rank in enumerate(ranks)]
            self._ways.append(Writer(ring, len(ranks)))
        finally:
            os.close(ring)
        return began

    def _begin_one(self, rank: int, ring: int, num_readers: int, index: int) -> tuple[RankProcess, socket.socket]:
        ours, theirs = socket.socketpair()
        # Linux ends a child with the thread that started it, where it asks for that: only the main one lasts.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        handed = theirs.fileno(), ring, self._ranks.rendezvous
        with theirs:
            process = subprocess.Popen(
                [*rank_command("handed", *handed, num_readers, index), str(parent), str(rank)],
                pass_fds=handed,
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for answers
            )
        return LocalProcess(process), ours

    def _call_in(self, ranks: Sequence[int], hosts: Hosts) -> list[tuple[RankProcess, socket.socket]]:
        """Those of other machines, which connect with this one. Raises `EngineError` where one does not."""
        secret = secrets.token_bytes(SECRET_BYTES)
        with Gate(hosts.seats[0].host, secret) as gate:
            processes = hosts.start(ranks, ("reach", gate.address, str(gate.port)), secret)

            def alive() -> None:
                if (failure := hosts.failure()) is not None:
                    raise EngineError(failure)
                for rank, process in zip(ranks, processes, strict=True):
                    if process.was_killed() or process.has_ended():
                        raise EngineError(
                            f"rank {rank} (node {hosts.seats[rank].host}, process {process.pid}) did not start: "
                            f"{process.how_it_ended()}"
                        )

            came = gate.admit({Caller(rank, role) for rank in ranks for role in OF_A_RANK}, alive, _REACH_S)
        self._ways.insert(0, Sender([came[Caller(rank, "steps")] for rank in ranks]))  # they are farther
        return [(process, came[Caller(rank, "words")]) for rank, process in zip(ranks, processes, strict=True)]

    def ready(self, within_s: float) -> None:
        """Waits until all can join."""
        self._replies(Imported, within_s)

    def join(self, layout: Layout, devices: Sequence[str], *, own_kernels: bool) -> tuple[Backend, Meeting]:
        """Tells each rank what it is, with one of `devices`, and by what they compute together: NCCL wants a GPU for
        each."""
        assert layout.num_ranks == len(devices) == self._num_ranks, "as many ranks as were started"
        hosts = self._ranks.hosts
        nodes = [""] * self._num_ranks if hosts is None else [seat.node for seat in hosts.seats]
        apart = len(set(zip(nodes, devices, strict=True))) == len(devices) and "cpu" not in devices
        self._ranks.devices[:] = devices
        backend: Backend = "nccl" if apart else "gloo"
        meeting = Meeting(self._ranks.rendezvous)
        if hosts is not None and len(set(nodes)) > 1:
            addresses = tuple(seat.host for seat in hosts.seats)
            listener = listening(addresses[0])
            meeting = Meeting(hosts=addresses, port=listener.getsockname()[1], listener=listener.detach())
        of_hosts = list(meeting.hosts), meeting.port
        self.tell(Join(layout.tensor, layout.pipeline, list(devices), backend, own_kernels, *of_hosts))
        return backend, meeting

    def joined(self, within_s: float) -> None:
        """Waits until all have joined."""
        self._replies(Joined, within_s)

    def load(self, config: EngineConfig, path: Path, digest: str = "") -> None:
        """`digest`: of the model, where there are other hosts, which have files of their own."""
        self.tell(Load(config, str(path), digest))

    @property
    def is_on_several_hosts(self) -> bool:
        return any(map(self._ranks.is_elsewhere, range(self._num_ranks)))

    def loaded(self) -> list[Loaded]:
        """Waits until all have loaded their share."""
        return self._replies(Loaded, None)

    def tell(self, message: ToRanks) -> None:
        """All of them. For any thread. Raises `EngineError` when one is gone."""
        with self._telling:
            self.check()
            encoded = self._encoder.encode(message)
            for way in self._ways:
                way.send(encoded, self.check)

    def on_end(self, abort: Callable[[], None]) -> None:
        """`abort` is called when a rank is lost, from a thread, or when all are to end: what waits for them has to."""
        self._ranks.abort = abort
        if self._ranks.failure is not None:
            abort()

    def on_copied(self, copied: Callable[[Copied], None]) -> None:
        """`copied` is called, from a thread, with what ranks say of `CopyPages`."""
        self._ranks.copied = copied

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        """`last_resort` is called, from a thread, with the reason where a rank is lost and this process goes on."""
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
        try:
            yield
        except BaseException as error:
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
        """Each on its own host."""
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
                try:
                    _hear(ranks, index, reader.read())
                except (ValueError, msgspec.MsgspecError) as error:
                    ranks.lose(f"{ranks.name(index)} says what is no message: {error}")
        for index, process in enumerate(ranks.processes):
            if not process.is_stopped():
                stopped_s.pop(index, None)
            elif now_s - stopped_s.setdefault(index, now_s) >= _STOPPED_S:
                ranks.lose(f"{ranks.name(index)} is stopped (SIGSTOP?), and the others wait for it: all end")
            if now_s - heard_s[index] > _SILENT_S:
                ranks.lose(f"{ranks.name(index)} has said nothing for {_SILENT_S:.0f} s: all end")


def _hear(ranks: _Ranks, index: int, messages: list[FromRank] | None) -> None:
    if messages is None:
        ranks.lose(f"{ranks.name(index)} has died: {ranks.processes[index].how_it_ended()}")
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
            if process.was_killed():
                return index
        time.sleep(0.01)
    return None
