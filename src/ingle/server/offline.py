"""Several engines for prompts that are all there: what `Engine` is in this process, in processes of their own."""

from __future__ import annotations

import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ingle.channel import (
    LENGTH,
    Abort,
    Beat,
    EngineInfo,
    EngineStats,
    Failed,
    FromEngine,
    Progress,
    Stage,
    StepMessage,
    frame,
    message_encoder,
)
from ingle.config import EngineConfig
from ingle.errors import EngineError, IngleError
from ingle.request import EngineOutput, EngineRequest, check_request
from ingle.server.engine_client import raise_failed
from ingle.server.engine_process import EngineProcess, StartedEngine
from ingle.server.fleet import Fleet
from ingle.server.replicas import SAME_S, combined_info, combined_stats, kept_tokens, named
from ingle.server.routing import Routed, Router

if TYPE_CHECKING:
    import socket

_LOOK_S = 0.05
_EXIT_S = 5.0
"""For a process to end that has closed its channel."""
_IDLE_S = 600.0
"""For engines to compile and capture what they will need."""


@dataclass
class _Told:
    """What the threads that listen have, which must not keep the engines alive."""

    inbox: queue.SimpleQueue[tuple[int, FromEngine | None]] = field(default_factory=queue.SimpleQueue)
    """By replica; None is the end."""
    stats: dict[int, EngineStats] = field(default_factory=dict)
    stages: dict[int, tuple[Stage, float]] = field(default_factory=dict)
    """What each loop did when it last said so, and when that was."""


class OfflineReplicas:
    """One caller at a time adds requests and takes steps, as of an `Engine`; a step waits for outputs of any of them.

    An engine that dies ends all: whoever has all prompts can begin anew.
    """

    def __init__(self, config: EngineConfig, path: Path, report: Callable[[str], None] = lambda stage: None) -> None:
        """Loads all of them. Raises `ModelError` and `ConfigError`, and `EngineError` where one ends."""
        if config.target_itl_ms is None:  # nobody watches
            config = replace(config, target_itl_ms=0.0)
        first = EngineProcess()
        try:
            fleet = Fleet(first, config)
        except BaseException:
            first.stop()
            raise
        self._end = weakref.finalize(self, _end_all, fleet)
        self._engines, self._told, self._encoder = fleet.engines, _Told(), message_encoder()
        fleet.load(path)
        for index, engine in enumerate(self._engines):
            arguments = (index, engine.socket, self._told)
            threading.Thread(target=_listen, args=arguments, name=f"replica {index}", daemon=True).start()
        try:
            infos = self._loaded(report)
        except BaseException:
            self.close()
            raise
        self.info = combined_info(infos)
        self._router = Router([kept_tokens(config, info) for info in infos])
        self._seeds = random.Random(config.seed)
        self._routed: dict[str, Routed] = {}
        """Of unfinished requests."""

    def _loaded(self, report: Callable[[str], None]) -> list[EngineInfo]:
        infos: dict[int, EngineInfo] = {}
        while len(infos) < len(self._engines):
            index, message = self._told.inbox.get()
            if isinstance(message, EngineInfo):
                infos[index] = message
            elif isinstance(message, Progress) and index == min({*range(len(self._engines))} - infos.keys()):
                report(message.stage if index == 0 else f"replica {index}: {message.stage}")
            elif message is None or isinstance(message, Failed):
                if index and 0 not in infos and (said := self._first_word()) is not None:
                    index, message = 0, said
                try:
                    self._lost(index, message)
                except IngleError as error:
                    raise named(error, f"replica {index}") if index else error from None
        return [infos[index] for index in sorted(infos)]

    def _first_word(self) -> Failed | None:
        """What the first replica refuses, which may be the same."""
        until_s = time.monotonic() + SAME_S
        with suppress(queue.Empty):
            while (left_s := until_s - time.monotonic()) > 0:
                index, message = self._told.inbox.get(timeout=left_s)
                if index == 0 and isinstance(message, Failed):
                    return message
                if index == 0 and isinstance(message, EngineInfo):
                    return None
        return None

    def _lost(self, index: int, message: Failed | None) -> None:
        """Raises what a replica ended of."""
        if message is not None:
            raise_failed(message)
        engine: StartedEngine = self._engines[index]
        until_s = time.monotonic() + _EXIT_S
        while not engine.has_ended and time.monotonic() < until_s:
            time.sleep(_LOOK_S)
        raise EngineError(f"replica {index} died: {engine.exit_text()}")

    # ---- as an engine

    @property
    def scheduler(self) -> OfflineReplicas:
        """Whose `has_work` says whether any request is unfinished: of steps in flight nothing is known here."""
        return self

    @property
    def has_work(self) -> bool:
        return bool(self._routed)

    def add(self, request: EngineRequest) -> None:
        """Hands a request to the replica that has done with it soonest. Raises `RequestError`."""
        check_request(request, vocab_size=self.info.vocab_size, max_model_len=self.info.max_model_len)
        if request.sampling.seed is None:
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(63))
            request = msgspec.structs.replace(request, sampling=sampling)
        routed = self._router.route(request, range(len(self._engines)))
        self._routed[request.id] = routed
        self._send(routed.replica, request)

    def abort(self, request_id: str) -> None:
        """Takes a request out; unknown or finished ones are left alone."""
        routed = self._routed.pop(request_id, None)
        if routed is not None:
            self._router.end(routed)
            self._send(routed.replica, Abort(request_id))

    def step(self) -> list[EngineOutput]:
        """What came, once something did. Raises `EngineError` when an engine has gone."""
        arrived = [self._told.inbox.get()]
        with suppress(queue.Empty):
            while True:
                arrived.append(self._told.inbox.get_nowait())
        outputs = []
        for index, message in arrived:
            if isinstance(message, StepMessage):
                outputs += [output for output in message.outputs if self._took(output)]
            elif message is None or isinstance(message, Failed):
                self._told.inbox.put((index, message))  # for whoever asks next
                self._lost(index, message)
        return outputs

    def _took(self, output: EngineOutput) -> bool:
        routed = self._routed.get(output.id)
        if routed is None:
            return False
        self._router.took(routed, output)
        if output.finish_reason is not None:
            self._router.end(self._routed.pop(output.id))
        return True

    def _send(self, index: int, message: EngineRequest | Abort) -> None:
        with suppress(OSError):  # it has gone, and the next step says so
            self._engines[index].socket.sendall(frame(self._encoder, message))

    def stats(self) -> EngineStats:
        return combined_stats([self._told.stats.get(index, EngineStats()) for index in range(len(self._engines))])

    def settle(self) -> None:
        """Waits until none of them compiles or captures anything any more. Raises `EngineError`."""
        since_s = time.monotonic()
        waiting: set[int] = set()
        while len(waiting) < len(self._engines):
            if time.monotonic() - since_s > _IDLE_S:
                raise EngineError(f"engines are still busy after {_IDLE_S:.0f} s, although nobody asks for anything")
            time.sleep(_LOOK_S)
            told = self._told.stages.items()
            waiting = {index for index, (stage, at_s) in told if stage == "waiting" and at_s > since_s}

    def close(self) -> None:
        """Ends all of them."""
        self._end()


def _end_all(fleet: Fleet) -> None:
    fleet.engines[0].end()
    fleet.close()
    fleet.engines[0].stop()


def _listen(index: int, sock: socket.socket, told: _Told) -> None:
    """Until the engine has gone."""
    decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
    with suppress(OSError, ValueError), sock.makefile("rb", buffering=1 << 18) as file:
        while len(head := file.read(LENGTH.size)) == LENGTH.size:
            message = decoder.decode(file.read(*LENGTH.unpack(head)))
            if isinstance(message, EngineStats):
                told.stats[index] = message
            elif isinstance(message, Beat):
                told.stages[index] = (message.stage, time.monotonic())
            elif not isinstance(message, StepMessage) or message.outputs:
                told.inbox.put((index, message))
    told.inbox.put((index, None))
