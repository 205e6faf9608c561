"""The process that speaks with Ray, and the actors that keep the ranks of other nodes. Nothing else imports Ray.

`ingle.parallel.cluster` starts it. It ends, with all that it has started, when its socket closes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import ingle
from ingle.engine.child import end_with
from ingle.errors import ConfigError, printable
from ingle.parallel.cluster import answers, gpus_of
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
    ToCluster,
    Told,
)
from ingle.parallel.hosts import Program, is_stopped, rank_command
from ingle.parallel.messages import FrameReader, said
from ingle.parallel.placement import Node, Placement, place
from ingle.version import __version__

_FLAG = "--distributed-executor-backend ray"
_FREE_S = 60.0
"""For what others use of the cluster to be given back."""
_ACTORS_S = 120.0
"""For Ray to start a Python in each seat."""
_ANSWER_S = 10.0
_START_S = 20.0
"""For a process in a seat that is there: also on a node that is lost, and not yet known to be."""
_LOOK_S = 0.25
_MAX_TEXT = 300
_STOPPED_S = 1.0


# ---- in the seats


class Described(NamedTuple):
    node: str
    gpus: list[str]
    version: str


class Keeper:
    """An actor: holds what Ray has set aside for a rank, and keeps the rank where it is not on rank 0's node."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: deque[str] = deque(maxlen=20)

    def describe(self) -> Described:
        context = ray.get_runtime_context()
        return Described(context.get_node_id(), context.get_accelerator_ids().get("GPU", []), __version__)

    def start(self, rank: int, arguments: Sequence[str], secret: bytes, gpus: Sequence[str], program: Program) -> int:
        """Linux ends the rank with the thread that starts it, of which an actor has two for all of its life."""
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        paths = [str(Path(ingle.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        self._process = subprocess.Popen(
            rank_command(*arguments, os.getpid(), rank, program=program),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._process.stdin as pipe:
            pipe.write(secret)
        threading.Thread(target=self._hand_on, args=(self._process.stdout,), daemon=True).start()
        return self._process.pid

    def _hand_on(self, pipe: IO[bytes]) -> None:
        """To this actor's log, which Ray keeps."""
        for line in iter(lambda: pipe.readline(1 << 12), b""):
            text = line.decode(errors="replace").rstrip()
            print(text, file=sys.stderr, flush=True)
            self._printed.append(text)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def watch(self) -> tuple[int | None, str]:
        """Waits until the rank has ended: its exit code and its last words. None where it is stopped."""
        assert self._process is not None
        stopped_s: float | None = None
        while (code := self._process.poll()) is None:
            now_s = time.monotonic()
            stopped_s = None if not is_stopped(self._process.pid) else stopped_s or now_s
            if stopped_s is not None and now_s - stopped_s > _STOPPED_S:
                return None, ""
            time.sleep(_LOOK_S)
        return code, next((text for text in reversed(self._printed) if text), "")


# ---- beside the engine


class _End(Exception):
    """Of the engine."""


class _Refusal(Exception):
    def __init__(self, what: str, alternative: str | None = None, *, of_flags: bool = False) -> None:
        self.message = Refused(printable(what), None if alternative is None else printable(alternative), of_flags)


def main() -> int:
    number, parent = map(int, sys.argv[1:3])
    end_with(parent)
    return _Agent(socket.socket(fileno=number)).run()


class _Agent:
    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        decoder: msgspec.msgpack.Decoder[ToCluster] = msgspec.msgpack.Decoder(ToCluster)
        self._reader = FrameReader(sock, decoder)
        self._group: PlacementGroup | None = None
        self._keepers: list[Any] = []
        self._given: list[Given] = []
        self._watched: dict[Any, int] = {}

    def run(self) -> int:
        try:
            asked = self._next(None)
            assert isinstance(asked, SeatsWanted), "the first message says what is wanted"
            placed = threading.Event()
            threading.Thread(target=self._give_up_with_engine, args=(placed,), daemon=True).start()
            try:
                seated = self._place(asked)
            except _Refusal as refusal:
                self._say(refusal.message)
                return 1
            placed.set()
            self._say(seated)
            while True:
                message = self._next(_LOOK_S)
                if isinstance(message, Begin):
                    self._begin(message)
                elif isinstance(message, Kill):
                    self._keepers[message.rank].kill.remote()
                self._look_after()
        except _End:
            return 0
        finally:
            with contextlib.suppress(Exception):
                if self._group is not None:
                    remove_placement_group(self._group)  # and with it the actors, and with them their ranks
                ray.shutdown()

    def _say(self, message: FromCluster) -> None:
        with contextlib.suppress(OSError):
            self._socket.sendall(said(message))

    def _next(self, within_s: float | None) -> ToCluster | None:
        """Raises `_End` when there is no engine any more."""
        if not select.select([self._socket], [], [], within_s)[0]:
            return None
        messages = self._reader.read()
        if messages is None:
            raise _End
        return next(iter(messages), None)

    def _give_up_with_engine(self, placed: threading.Event) -> None:
        """While Ray is waited for."""
        while not placed.wait(_LOOK_S):
            if select.select([self._socket], [], [], 0)[0]:
                os._exit(0)

    # ---- seats

    def _place(self, asked: SeatsWanted) -> Seated:
        self._say(Told("joining Ray's cluster"))
        nodes = _connect()
        here = ray.get_runtime_context().get_node_id()
        listed = [
            Node(id, node["NodeManagerAddress"], int(node["Resources"].get(asked.unit, 0)))
            for id, node in nodes.items()
        ]
        try:
            placement = place(
                listed, here, (asked.tensor, asked.pipeline), asked.unit, asked.each, replicas=asked.replicas
            )
        except ConfigError as error:
            raise _Refusal(error.what, error.alternative, of_flags=True) from None
        group = self._group = _reserved(placement, asked, here, self._say)
        self._say(Told("starting what keeps the ranks' seats in Ray's cluster"))
        amount = {"num_gpus": asked.each, "num_cpus": 0} if asked.unit == "GPU" else {"num_cpus": asked.each}
        keeper = ray.remote(Keeper)
        self._keepers = [
            keeper.options(
                **amount,
                max_restarts=0,
                max_concurrency=2,  # to be told to end what it watches
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            ).remote()
            for bundle in placement.bundles
        ]
        where = placement_group_table(group)["bundles_to_node_id"]
        for keeper, bundle in zip(self._keepers, placement.bundles, strict=True):
            described = _described(keeper, nodes[where[bundle]])
            node = nodes[described.node]
            if described.version != asked.version:
                raise _Refusal(
                    f"node {node['NodeManagerAddress']} has ingle {described.version}, and this one {asked.version}",
                    "install the same on every node",
                )
            self._given.append(
                Given(described.node, node["NodeManagerAddress"], node["NodeManagerPort"], described.gpus)
            )
        return Seated(self._given, placement.notice)

    # ---- ranks

    def _begin(self, begin: Begin) -> None:
        starting = []
        for rank in begin.ranks:
            given = self._given[rank]
            gpus = gpus_of(self._given, given.node) if begin.program == "rank" else given.gpus
            arguments = rank, begin.arguments, begin.secret, gpus, begin.program
            starting.append(self._keepers[rank].start.remote(*arguments))
        try:
            pids = ray.get(starting, timeout=_START_S)
        except Exception as error:
            self._say(Refused(f"Ray does not start it: {_brief(error)}"))
            return
        self._watched |= {self._keepers[rank].watch.remote(): rank for rank in begin.ranks}
        self._say(Began(pids))

    def _look_after(self) -> None:
        if not self._watched:
            return
        for reference in ray.wait(list(self._watched), timeout=0)[0]:
            rank = self._watched.pop(reference)
            try:
                code, words = ray.get(reference)
            except Exception as error:
                self._say(Ended(rank, lost=_brief(error)))
            else:
                self._say(Ended(rank, code, printable(words)[:_MAX_TEXT], stopped=code is None))


def _connect() -> Mapping[str, Mapping[str, Any]]:
    """The nodes of the cluster, by what Ray calls them."""
    address = os.environ.get("RAY_ADDRESS") or "auto"
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and not answers((host.strip("[]"), int(port)), _ANSWER_S):
            raise ConnectionError("nobody answers")  # whom Ray would ask again and again, for minutes
        ray.init(
            address=address,
            namespace="ingle",
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        at = "" if address == "auto" else f" at RAY_ADDRESS={address}"
        why = "" if "Could not find any running Ray instance" in str(error) else f" ({_brief(error)})"
        raise _Refusal(
            f"{_FLAG}: this node has joined no Ray cluster{at}{why}",
            "`ray start --head` on one node begins one, `ray start --address=THAT_NODE:6379` on each other joins it",
            of_flags=True,
        ) from None
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def _reserved(placement: Placement, asked: SeatsWanted, here: str, say: Any) -> PlacementGroup:
    say(Told("waiting for Ray to give the ranks' seats"))
    group = placement_group(
        [{asked.unit: float(units)} for units in placement.units],
        strategy="SPREAD" if placement.spread else "PACK",
        bundle_label_selector=[{"ray.io/node-id": here}] + [{} for _ in placement.units[1:]],
    )
    if not group.wait(_FREE_S):
        remove_placement_group(group)
        raise _Refusal(
            f"{_FLAG}: Ray did not give {asked.tensor * asked.pipeline * asked.each} {asked.unit}s within "
            f"{_FREE_S:.0f} s: something else in its cluster uses them",
            "`ray status` says how many are free",
        )
    return group


def _described(keeper: Any, node: Mapping[str, Any]) -> Described:
    try:
        return Described(*ray.get(keeper.describe.remote(), timeout=_ACTORS_S))
    except Exception as error:
        raise _Refusal(
            f"{_FLAG}: nothing of ingle starts on node {node['NodeManagerAddress']}: {_brief(error)}",
            "install the same ingle on every node, for the Python that runs `ray start`",
        ) from None


def _brief(error: Exception) -> str:
    """What Ray says at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = next((line for line in lines if "ModuleNotFoundError" in line), None)
    text = missing or (lines[0] if lines else "")
    return printable(f"{type(error).__name__}: {text}")[:_MAX_TEXT]
