"""The engine's process, which `ingle.server.engine_process` starts with the number of its end of the channel.

It lives as long as that channel: when the API process closes it or dies, the engine exits and its memory is free.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
import traceback
from types import FrameType

from ingle.channel import (
    Begun,
    Channel,
    ChannelClosed,
    Failed,
    NothingRefused,
    Progress,
    Refused,
    Share,
    Start,
    StepMessage,
)
from ingle.engine.beats import Beats
from ingle.engine.build import build_engine
from ingle.engine.child import end_with, signal_of_parents_death
from ingle.engine.counts import Waits
from ingle.engine.engine import Engine
from ingle.engine.memory import keep_to
from ingle.engine.own_files import own_files
from ingle.errors import (
    ConfigError,
    IngleError,
    ModelError,
    RequestError,
    errors_in,
    lack_of_memory,
    lack_of_package,
)
from ingle.heap import give_back_memory
from ingle.request import EngineOutput, EngineRequest

_REACH_S = 30.0
_KEEP_S = 1.5
"""At the end, for prefixes that are to be kept on a disk: what waits for this process waits for little more."""
_REPORT_S = 0.5
"""Between two of the engine's stats, while it steps."""
_LARGE_BYTES = 8 << 20
"""Of requests, after which the memory that they took is given back."""


def main() -> int:
    if sys.argv[1] == "reach":
        try:
            sock, parent = _reached(sys.argv[2], int(sys.argv[3]), int(sys.argv[5])), int(sys.argv[4])
        except IngleError as error:
            print(error, file=sys.stderr)
            return 1
    else:
        sock, parent = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    _end_with_parent(sock, parent)
    channel = Channel(sock)
    try:
        (start,) = channel.receive(wait=True)
        if not isinstance(start, Start):
            raise TypeError(f"the first message must be Start, got {type(start).__name__}")
        return _run(channel, start)
    except ChannelClosed:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already


def _reached(host: str, port: int, index: int) -> socket.socket:
    """The channel of a server on another host, to which this engine proves itself by what comes on standard input."""
    from ingle.parallel.reach import SECRET_BYTES, Caller, reach

    return reach((host, port), sys.stdin.buffer.read(SECRET_BYTES), Caller(index, "engine"), _REACH_S)


def _run(channel: Channel, start: Start) -> int:
    _keep_to(start.share)
    beats = Beats(channel)
    beats.start()
    try:
        engine, info = build_engine(
            start.config,
            own_files(start.path, start.config.model, start.digest),
            lambda stage: channel.send(Progress(stage)),
            checked=lambda: channel.send(NothingRefused()),
            beside_server=True,
            memory=int(sys.argv[3]) if len(sys.argv) == 4 else None,
        )
        engine.worker.device.if_stuck(lambda reason: _end_at_once(channel, reason))
        gc.freeze()  # what is there now stays: the collector need not walk it every few hundred steps
        gc.enable()
        signal_of_parents_death(signal.SIGKILL)  # from here on there is nothing to tidy up
        channel.send(info)
        try:
            serve(engine, channel, beats)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already
            engine.close(_KEEP_S)
    except ChannelClosed:
        raise
    except IngleError as error:
        channel.send(Failed(str(error), expected=True, errors=_refused(error)))
    except Exception as error:  # whatever it was, the API process must learn of it before this one ends
        lack = lack_of_memory(error) or lack_of_package(error)
        channel.send(Failed(traceback.format_exc() if lack is None else str(lack), expected=lack is not None))
    return 1


def _keep_to(share: Share) -> None:
    """Before PyTorch is imported, which looks once what there is. Ranks have the same from this process."""
    if share.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = share.gpus
    if share.cpus is not None:
        with contextlib.suppress(OSError):  # one of them is not to be had any more
            os.sched_setaffinity(0, share.cpus)
    if share.host_bytes is not None:
        keep_to(share.host_bytes)


def _end_at_once(channel: Channel, reason: str) -> None:
    """Of a process whose loop waits for what never comes."""
    with contextlib.suppress(ChannelClosed):
        channel.send(Failed(reason, expected=True))
    os._exit(1)


def _refused(error: IngleError) -> list[Refused]:
    return [
        Refused(each.what, each.alternative, isinstance(each, ConfigError))
        for each in errors_in(error)
        if isinstance(each, (ConfigError, ModelError))
    ]


def serve(engine: Engine, channel: Channel, beats: Beats) -> None:
    """Steps while there is work; without, captures graphs that will be needed, then sleeps on the channel.

    Ends with `ChannelClosed`.
    """
    num_bytes_before = 0
    device = engine.worker.device
    engine.begins, beats.progress = lambda ids: channel.send(Begun(ids)), device.progress
    reports, engine.waits = _Reports(engine, channel), Waits()
    while True:
        idle = not engine.has_work
        if idle:
            engine.scheduler.check()
            if channel.num_bytes_received - num_bytes_before > _LARGE_BYTES:
                give_back_memory()
                num_bytes_before = channel.num_bytes_received
            beats.doing("capturing")
        wait = idle and not device.capture_next()
        beats.doing("waiting" if wait else "stepping")
        rejected = []
        for message in channel.receive(wait=wait):
            if isinstance(message, EngineRequest):
                rejected += _add(engine, message)
            else:
                engine.abort(message.id)  # type: ignore[union-attr]
        beats.doing("stepping")
        worked = engine.has_work or not idle
        outputs = engine.step() if engine.has_work else []
        if worked:
            reports.tell(engine.has_work)
        channel.send(StepMessage(rejected + outputs))


class _Reports:
    """Tells the other side how the engine stands: after the first step, twice a second while others follow, and after
    the last. Whoever hears of a step's outputs has heard of that before."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine, self._channel = engine, channel
        self._next_s = 0.0
        self._goes_on = False
        self.tell(False)

    def tell(self, goes_on: bool) -> None:
        now_s = time.monotonic()
        if not goes_on or not self._goes_on or now_s >= self._next_s:
            self._channel.send(self._engine.stats())
            self._next_s = now_s + _REPORT_S
        self._goes_on = goes_on


def _add(engine: Engine, request: EngineRequest) -> list[EngineOutput]:
    try:
        engine.add(request)
    except RequestError as error:
        return [EngineOutput(request.id, [], "error", error=str(error), busy=error.status == 503)]
    return []


def _end_with_parent(sock: socket.socket, parent: int) -> None:
    """Ends this process when its parent says so or dies.

    A SIGTERM counts only once the channel is closed. Then it is the parent's, also when it comes from the kernel since
    the parent has died, and unwinds what this process does: a compiler that it waits for ends too, with its files.
    Before, it went to the whole group, or to all of a service, and the parent lets answers end.
    """

    def on_sigterm(signum: int, frame: FrameType | None) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another, from the kernel, would end the unwinding
            raise SystemExit(0)

    signal.signal(signal.SIGTERM, on_sigterm)
    end_with(parent, signal.SIGTERM)
