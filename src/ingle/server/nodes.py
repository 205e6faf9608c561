"""Replicas on the nodes of a Ray cluster, each of them whole on one: the first on this node, others where there is
room."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ingle.channel import Share, start_frame
from ingle.config import EngineConfig
from ingle.errors import ConfigError, EngineError
from ingle.parallel.cluster import RayHosts, RemoteProcess
from ingle.parallel.reach import SECRET_BYTES, Caller, Gate
from ingle.server.engine_process import EngineProcess, StartedEngine
from ingle.server.places import alone

_REACH_S = 60.0
"""For an engine on another node to start Python and to connect."""
_EXIT_S = 2.0
_LOOK_S = 0.02
logger = logging.getLogger("ingle")


class Nodes:
    """Seats of `--data-parallel-size` engines. Closing gives them back."""

    def __init__(self, config: EngineConfig) -> None:
        """Waits for them. Raises `ConfigError` where the cluster has no room, and `EngineError` where it gives none."""
        parallel = config.parallel
        if parallel.tensor_parallel_size == "auto":
            raise ConfigError(
                "--tensor-parallel-size auto: replicas on several nodes have as many GPUs each",
                alternative="give a number",
            )
        on_cpus, size = parallel.device == "cpu", parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._hosts = RayHosts(
            1,
            parallel.data_parallel_size,
            "CPU" if on_cpus else "GPU",
            each=size * (parallel.threads or 1) if on_cpus else size,
            replicas=True,
            report=_tell,
        )
        own = alone(config)
        if on_cpus:
            own = replace(own, parallel=replace(own.parallel, distributed_executor_backend="mp"))
        else:
            own = replace(own, parallel=replace(own.parallel, distributed_executor_backend="mp", device="cuda"))
        seats = self._hosts.seats
        beside = Counter(seat.node for seat in seats)
        self.places = []
        for index, seat in enumerate(seats):
            share = Share() if on_cpus else Share(gpus=self._hosts.gpus(index))
            self.places.append((_threads(own, beside[seat.node] * size) if on_cpus else own, share))
        where = ", ".join(f"{index} on {seat.host}" for index, seat in enumerate(seats))
        logger.info("replicas: %s", where)

    def start(self, index: int) -> StartedEngine:
        """The replica of that number, on its node."""
        seats = self._hosts.seats
        return EngineProcess() if seats[index].node == seats[0].node else ElsewhereEngine(self._hosts, index)

    def close(self) -> None:
        self._hosts.close()


def _tell(stage: str) -> None:
    logger.info("replicas: %s", stage)


def _threads(config: EngineConfig, num_beside: int) -> EngineConfig:
    """Of processes that share a node, which is taken to be as large as this one."""
    if config.parallel.threads is not None or num_beside == 1:
        return config
    from ingle.kernels.cpu.threads import default_count

    return replace(config, parallel=replace(config.parallel, threads=max(default_count() // num_beside, 1)))


class ElsewhereEngine:
    """A `StartedEngine` of another node."""

    waits_elsewhere = True
    pid = 0

    def __init__(self, hosts: RayHosts, index: int) -> None:
        """Raises `EngineError` where it does not start."""
        self._hosts, self._index = hosts, index
        self._start: bytes | None = None
        self._process, self.socket = self._begin()

    def _begin(self) -> tuple[RemoteProcess, socket.socket]:
        secret, caller = secrets.token_bytes(SECRET_BYTES), Caller(self._index, "engine")
        with Gate(self._hosts.seats[0].host, secret) as gate:
            arguments = ("reach", gate.address, str(gate.port))
            (process,) = self._hosts.start([self._index], arguments, secret, "process")

            def alive() -> None:
                if process.has_ended():
                    raise EngineError(f"{self._where} did not start: {process.how_it_ended()}")

            return process, gate.admit({caller}, alive, _REACH_S)[caller]

    @property
    def _where(self) -> str:
        return f"the engine on node {self._hosts.seats[self._index].host}"

    def load(self, config: EngineConfig, path: Path, share: Share | None = None) -> None:
        from ingle.weights.digest import digest_of

        self._start = start_frame(config, path, Share() if share is None else share, digest_of(path))
        self._tell()

    def _tell(self) -> None:
        assert self._start is not None, "it was told what to load"
        with contextlib.suppress(OSError):  # it has died already: whoever waits for its answer learns why
            self.socket.sendall(self._start)

    def start_anew(self) -> None:
        self.stop()
        self._process, self.socket = self._begin()
        self._tell()

    @property
    def has_ended(self) -> bool:
        return self._process.has_ended()

    def exit_text(self) -> str:
        host = self._hosts.seats[self._index].host
        return f"{self._process.how_it_ended_so_far()} (node {host}, process {self._process.pid})"

    def end(self) -> None:
        with contextlib.suppress(OSError):  # closed already
            self.socket.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        self._hosts.kill(self._index)

    def stop(self) -> None:
        self.end()
        self.socket.close()
        _until(lambda: self.has_ended, _EXIT_S)
        if not self.has_ended:
            self.kill()
            _until(lambda: self.has_ended, _EXIT_S)


def _until(so: Callable[[], bool], within_s: float) -> None:
    until_s = time.monotonic() + within_s
    while not so() and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
