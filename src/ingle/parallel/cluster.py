"""Seats for ranks on the nodes of a Ray cluster.

What speaks with Ray is a process of its own (`engine/ray_agent.py`): Ray brings threads, handlers of signals and a log,
and ends a process that has lost its cluster. Through it go where the ranks are to be, that they are started, and that
one has ended: nothing of a step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, TypeVar

import msgspec

from ingle.errors import ConfigError, EngineError
from ingle.parallel.cluster_messages import (
    Began,
    Begin,
    Ended,
    FromCluster,
    Given,
    Kill,
    Refused,
    Seated,
    SeatsWanted,
    Told,
)
from ingle.parallel.hosts import Program, Seat, exit_text
from ingle.parallel.messages import FrameReader, said
from ingle.parallel.placement import Unit
from ingle.version import __version__

_Answer = TypeVar("_Answer", Seated, Began)
_FLAG = "--distributed-executor-backend ray"
_SEATS_S = 180.0
"""For Ray to answer at all. What it says it waits for has limits of its own."""
_BEGIN_S = 60.0
_END_S = 10.0
_FIRST_WORDS_S, _LAST_WORDS_S = 0.5, 4.0
"""For Ray to say why a rank has ended: before its node is asked, and where that answers."""
_ANSWER_S = 1.0
_LOOK_S = 0.2
_MAX_LINE_BYTES = 1 << 12
_BOOT = (
    "import signal, sys\n"
    "for number in signal.SIGINT, signal.SIGHUP, signal.SIGTERM: signal.signal(number, signal.SIG_IGN)\n"
    "from ingle.engine.ray_agent import main\n"
    "sys.exit(main())"
)


def check_ray() -> None:
    """Raises `ConfigError` where Ray is not installed, or cannot be asked for what it is asked for."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"{_FLAG} needs Ray, on every node", alternative="pip install 'ingle[ray]'")
    address = os.environ.get("RAY_ADDRESS", "")
    if "://" in address or address == "local":
        raise ConfigError(
            f"RAY_ADDRESS={address} names no cluster that this node is part of",
            alternative="`ray start --address=HEAD:6379` makes it one, and RAY_ADDRESS is HEAD:6379 or left out",
        )


@dataclass
class _Agent:
    """What the thread that listens has, which must not keep the cluster itself alive."""

    process: subprocess.Popen[bytes]
    socket: socket.socket
    heard: queue.SimpleQueue[Told | Seated | Began | Refused] = field(default_factory=queue.SimpleQueue)
    ended: dict[int, Ended] = field(default_factory=dict)
    printed: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    closed: threading.Event = field(default_factory=threading.Event)

    def listen(self) -> None:
        decoder: msgspec.msgpack.Decoder[FromCluster] = msgspec.msgpack.Decoder(FromCluster)
        reader = FrameReader(self.socket, decoder)
        while (messages := reader.read()) is not None:
            for message in messages:
                if isinstance(message, Ended):
                    self.ended[message.rank] = message
                else:
                    self.heard.put(message)
        self.process.wait()
        self.closed.set()

    def keep_what_it_prints(self, pipe: IO[bytes]) -> None:
        for line in iter(lambda: pipe.readline(_MAX_LINE_BYTES), b""):
            if text := line.decode(errors="replace").strip():
                self.printed.append(text)

    def let_go(self) -> None:
        """It ends what it has started, and then itself."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.let_go()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_END_S)
        self.process.kill()  # Ray then ends what belonged to it
        self.process.wait()
        self.socket.close()


class RemoteProcess:
    """A `RankProcess` of another node."""

    def __init__(self, agent: _Agent, rank: int, pid: int, node: tuple[str, int]) -> None:
        self._agent, self._rank, self._node, self.pid = agent, rank, node, pid

    def kill(self) -> None:
        self._agent.let_go()  # a rank's end is the end of all

    def wait(self, within_s: float) -> None:
        self._until(within_s, lambda: self.has_ended() or self._agent.closed.is_set())

    def has_ended(self) -> bool:
        ended = self._agent.ended.get(self._rank)
        return self._agent.closed.is_set() if ended is None else not ended.stopped

    def was_killed(self) -> bool:
        ended = self._agent.ended.get(self._rank)
        return ended is not None and ((ended.code or 0) < 0 or ended.lost is not None)

    def is_stopped(self) -> bool:
        ended = self._agent.ended.get(self._rank)
        return ended is not None and ended.stopped

    def how_it_ended(self) -> str:
        self.wait(_FIRST_WORDS_S)
        if not self.has_ended() and answers(self._node):
            self.wait(_LAST_WORDS_S)
        return self.how_it_ended_so_far()

    def how_it_ended_so_far(self) -> str:
        """As far as is known: does not wait for more than its node to answer, for a second."""
        ended = self._agent.ended.get(self._rank, Ended(self._rank))
        if ended.code is not None and ended.code >= 0:
            return exit_text(ended.code) + (f": {ended.words}" if ended.words else "")
        if not answers(self._node):  # which may be why it was killed
            return f"its node is lost: no Ray answers at {self._node[0]} port {self._node[1]} any more"
        if ended.code is not None:
            return exit_text(ended.code)
        if ended.lost is not None:
            return f"Ray has lost it: {ended.lost}"
        return "its connection is lost" + (", and so is Ray's cluster" if self._agent.closed.is_set() else "")

    @staticmethod
    def _until(within_s: float, so: Callable[[], bool]) -> None:
        until_s = time.monotonic() + within_s
        while not so() and time.monotonic() < until_s:
            time.sleep(_LOOK_S / 10)


def answers(node: tuple[str, int], within_s: float = _ANSWER_S) -> bool:
    """Whether anything listens there."""
    try:
        socket.create_connection(node, timeout=within_s).close()
    except OSError:
        return False
    return True


class RayHosts:
    """A `Hosts` of a Ray cluster."""

    def __init__(
        self,
        tensor: int,
        pipeline: int,
        unit: Unit,
        *,
        each: int = 1,
        replicas: bool = False,
        report: Callable[[str], None] = lambda stage: None,
    ) -> None:
        """Waits for the seats of so many ranks to a stage and so many stages, or of so many `replicas` in their place,
        with `each` units to each.

        Raises `ConfigError` where the cluster cannot have them, and `EngineError` where it does not give them.
        """
        check_ray()
        self._starting = threading.Lock()
        self._agent = agent = _started()
        self._end = weakref.finalize(self, agent.close)
        threading.Thread(target=agent.listen, name="listening to Ray", daemon=True).start()
        try:
            agent.socket.sendall(said(SeatsWanted(tensor, pipeline, unit, each, replicas, __version__)))
            seated = self._answer(Seated, _SEATS_S, report)
            self._given, self.notice = seated.seats, seated.notice
            here = self._given[0].node
            self.seats: Sequence[Seat] = [
                Seat(given.node, given.host, self._device(given.node, given.gpus, own=given.node == here))
                for given in self._given
            ]
        except BaseException:
            self.close()
            raise

    def _device(self, node: str, gpus: list[str], *, own: bool) -> str:
        if not gpus:
            return "cpu"
        if not own:  # whose ranks see those of the seats there
            return f"cuda:{gpus_of(self._given, node).index(gpus[0])}"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            return f"cuda:{gpus[0]}"
        listed = [each.strip() for each in visible.split(",")]
        if gpus[0] not in listed:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={visible} hides GPU {gpus[0]}, which Ray gives on this node",
                alternative="leave it out here, and give it to `ray start`",
            )
        return f"cuda:{listed.index(gpus[0])}"

    def gpus(self, index: int) -> str:
        """Those of a seat, as CUDA_VISIBLE_DEVICES names them."""
        return ",".join(self._given[index].gpus)

    def start(
        self, ranks: Sequence[int], arguments: Sequence[str], secret: bytes, program: Program = "rank"
    ) -> list[RemoteProcess]:
        with self._starting:
            for rank in ranks:
                self._agent.ended.pop(rank, None)
            self._agent.socket.sendall(said(Begin(list(ranks), list(arguments), secret, program)))
            pids = self._answer(Began, _BEGIN_S).pids
        nodes = [(self._given[rank].host, self._given[rank].port) for rank in ranks]
        return [RemoteProcess(self._agent, rank, pid, node) for rank, pid, node in zip(ranks, pids, nodes, strict=True)]

    def kill(self, index: int) -> None:
        """That one alone."""
        with contextlib.suppress(OSError):
            self._agent.socket.sendall(said(Kill(index)))

    def failure(self) -> str | None:
        if not self._agent.closed.is_set():
            return None
        said = f": {self._agent.printed[-1]}" if self._agent.printed else ""
        return f"the connection with Ray's cluster is lost{said}"

    def close(self) -> None:
        self._end()

    def _answer(
        self, kind: type[_Answer], within_s: float, report: Callable[[str], None] = lambda stage: None
    ) -> _Answer:
        until_s = time.monotonic() + within_s
        while True:
            try:
                message = self._agent.heard.get(timeout=_LOOK_S)
            except queue.Empty:
                if (failure := self.failure()) is not None:
                    raise EngineError(failure) from None
                if time.monotonic() > until_s:
                    raise EngineError(f"{_FLAG}: Ray's cluster did not answer within {within_s:.0f} s") from None
                continue
            if isinstance(message, Refused):
                if message.of_flags:
                    raise ConfigError(message.what, alternative=message.alternative)
                raise EngineError(message.what + (f"; {message.alternative}" if message.alternative else ""))
            if isinstance(message, Told):
                report(message.stage)
            elif isinstance(message, kind):
                return message


def gpus_of(seats: Sequence[Given], node: str) -> list[str]:
    """Those of a node's seats, in one order for all of its ranks."""
    return sorted((gpu for seat in seats if seat.node == node for gpu in seat.gpus), key=lambda gpu: (len(gpu), gpu))


def _started() -> _Agent:
    ours, theirs = socket.socketpair()
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(theirs.fileno()), str(parent)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )
    agent = _Agent(process, ours)
    assert process.stdout is not None
    threading.Thread(target=agent.keep_what_it_prints, args=(process.stdout,), name="Ray's prints", daemon=True).start()
    return agent
