"""The API process's view of the engine: send requests, receive tokens, know whether it is well."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from ingle.channel import (
    Abort,
    Beat,
    Begun,
    ChannelClosed,
    EngineInfo,
    EngineStats,
    Failed,
    NothingRefused,
    Progress,
    StepMessage,
)
from ingle.config.health import HealthConfig
from ingle.errors import AnswerLost, Collected, ConfigError, EngineError, IngleError, ModelError
from ingle.limits import LimitsConfig
from ingle.request import EngineOutput, EngineRequest
from ingle.server.async_channel import AsyncChannel
from ingle.server.engine_process import KILLED_S, StartedEngine
from ingle.server.loading import Loading
from ingle.server.pulse import TICK_S, Pulse
from ingle.server.restarts import Restarts
from ingle.server.unread import Unread

logger = logging.getLogger("ingle.server")

in_background: ContextVar[bool] = ContextVar("in_background", default=False)
"""Whether what is asked of the engine can wait for all that somebody waits for."""
caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the client who asks, as in `EngineRequest.client`."""
_BACKGROUND = 1 << 40
_MANY_OUTPUTS = 16
_EXIT_S = 5.0
"""For a process to end that has closed its channel."""
MOST_ENGINES = 2
"""That may die before a request is given up that none of them has begun with: to take it in may be what they die of."""
_IN_THE_LOG = "; the server's log has the reason"
_FAILED = f"the engine failed{_IN_THE_LOG}"
"""For clients."""
_AS_BEFORE = HealthConfig(watchdog=False)
_ALONE = "the engine"
Report = Callable[[str], None]


class NotBegun(EngineError):
    """The engine has gone before it began with the request, which another can have."""


@dataclass(frozen=True)
class HealthStatus:
    ok: bool
    detail: str
    status: str = "ok"
    retry_after_s: int | None = None


@dataclass
class _Pending:
    """A request whose answer is not whole."""

    request: EngineRequest
    outputs: Unread
    begun: bool = False
    """Something was computed of it, or is about to be: it may be what the engine dies of."""
    num_engines: int = 1
    """That it was handed to."""
    lost: bool = False
    """It is told that nothing more comes."""

    def fail(self, told: EngineError) -> None:
        self.lost = True
        self.outputs.put(type(told)(told.what, retry_after_s=told.retry_after_s))


class EngineClient:
    """Requests to a running engine, and to the next one if it dies. Use `connect`, then `generate`.

    `closed` is set when the engine has gone and none comes after it.
    """

    def __init__(
        self,
        process: StartedEngine,
        channel: AsyncChannel,
        info: EngineInfo,
        health: HealthConfig = _AS_BEFORE,
        stream_interval: int = 1,
        name: str = _ALONE,
    ) -> None:
        """`stream_interval`: tokens that come together, after the first. `name`: of the engine, in a sentence."""
        self.info = info
        self.name = name
        self._stream_interval = stream_interval
        self.stats = EngineStats()
        self.closed = asyncio.Event()
        self.failure: str | None = None
        self.num_restarts = 0
        """Engines that came after the first."""
        self.stopping = False
        """The server ends, and takes no new requests."""
        self.others_serve: Callable[[], bool] = lambda: False
        """Whether somebody else takes what this one has not begun with when it is lost."""
        self.lost: Callable[[], None] = lambda: None
        """Told when an engine has gone, with what it had cached."""
        self._given_up: str | None = None
        self._closing = False
        self._process = process
        self._channel: AsyncChannel | None = channel
        """None between two engines."""
        self.max_unread_bytes = LimitsConfig().max_unread_bytes
        """Of what waits for one stream's client."""
        self._health = health
        self._restarts = Restarts(health.max_engine_restarts, health.engine_restart_window)
        self._loading: Loading | None = None
        """Of the next engine."""
        self._pulse = Pulse(process.pid, health.watchdog_timeout)
        self._pending: dict[str, _Pending] = {}
        self._supervisor = asyncio.create_task(self._supervise(channel))

    @classmethod
    async def connect(
        cls,
        process: StartedEngine,
        report: Report = lambda stage: None,
        checked: Callable[[], None] = lambda: None,
        health: HealthConfig = _AS_BEFORE,
        stream_interval: int = 1,
        name: str = _ALONE,
    ) -> EngineClient:
        """Waits until the engine has loaded what it was told to; `checked` is called when nothing is left that it
        could refuse before. By default there is no watchdog.

        Raises `ModelError` and `ConfigError` for what it refuses, `EngineError` with its own words for all else.
        """
        pulse = Pulse(process.pid, health.watchdog_timeout)
        channel, info = await _loaded(process, pulse, health, report, checked)
        return cls(process, channel, info, health, stream_interval, name)

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    @property
    def engines(self) -> Sequence[EngineClient]:
        """Each by itself, of what has several."""
        return (self,)

    async def generate(self, request: EngineRequest, num_engines: int = 1) -> AsyncGenerator[EngineOutput, None]:
        """The request's outputs until it finishes. Closing or cancelling the iteration aborts it in the engine.

        What came of several steps while nobody looked comes as one: so a loop that is late has less to do, and catches
        up. Raises `RequestError` when too much waits to be taken, and `EngineError` when the engine is gone. One that
        dies before it begins with the request costs it some time: the next engine serves it, or where `others_serve`,
        they are to: `NotBegun` says so. `num_engines`: that it was handed to, with this one.
        """
        if (refusal := self.refusal()) is not None:
            raise EngineError(refusal.detail, retry_after_s=refusal.retry_after_s)
        request = msgspec.structs.replace(request, client=caller.get())
        if in_background.get():
            request = msgspec.structs.replace(request, priority=max(request.priority, 0) + _BACKGROUND)
        pending = self._pending[request.id] = _Pending(request, Unread(self.max_unread_bytes), num_engines=num_engines)
        self._send(request)
        finished, interval = False, 1
        try:
            while not finished:
                outputs = await pending.outputs.take()
                while _go_on(outputs, interval):
                    outputs += await pending.outputs.take()
                interval = self._stream_interval
                for output in _together(outputs):
                    if isinstance(output, EngineError):
                        raise output
                    finished = output.finish_reason is not None
                    yield output
                    if finished:  # whatever befell the engine afterwards
                        return
        finally:
            del self._pending[request.id]
            if not finished:
                self._send(Abort(request.id))

    def health(self) -> HealthStatus:
        """Well means: alive, taking requests, and getting on with those that are pending."""
        if (refusal := self.refusal()) is not None:
            return refusal
        if self._channel is None:
            return HealthStatus(False, f"{self.name} has ended", "unavailable")
        if self.stopping:
            return HealthStatus(False, "the server is being stopped", "stopping")
        if (unwell := self._pulse.unwell()) is not None:
            detail = f"{self.name} does not get on: {unwell.why}"
            return HealthStatus(False, detail, "unavailable", math.ceil(self._load_s))
        return HealthStatus(True, f"{self.stats.num_running} requests running, {self.stats.num_waiting} waiting")

    def refusal(self) -> HealthStatus | None:
        """Why no request can be taken, if that is so."""
        if (reason := self.failure or self._given_up) is not None:
            return HealthStatus(False, reason, "unavailable")
        if self._loading is not None:
            detail = f"{self.name} is started anew: {self._loading.stage} ({self._loading.seconds:.0f} s so far)"
            left_s = max(self._load_s - self._loading.seconds, 1.0)
            return HealthStatus(False, detail, "restarting", math.ceil(left_s))
        return None

    @property
    def _load_s(self) -> float:
        """That the last engine took."""
        return 1.0 + sum(self.info.timings_s.values())

    def _send(self, message: EngineRequest | Abort) -> None:
        """Nothing between two engines: the next is sent what is pending then."""
        if self._channel is not None and not self._closing:
            self._channel.send(message)

    # ---- one engine, and the next

    async def _supervise(self, channel: AsyncChannel) -> None:
        """Until there is no engine any more."""
        try:
            why = await self._until_lost(channel)
            while self._health.watchdog and not self.stopping:
                following = await self._next(why)
                if isinstance(following, str):
                    end = "it is given up" if self.others_serve() else "the server ends too"
                    why = f"{following}. {self._restarts.num + 1} engines in a row have ended, so {end}"
                    break
                why = await self._until_lost(following)
        except Exception as error:  # else all who wait would wait for ever
            logger.error("%s is no longer watched", self.name, exc_info=error)
            why = _FAILED
        self.failure, self._loading, self._channel = why, None, None
        self._hand_over()
        self._fail_all(EngineError(why))
        self.closed.set()

    async def _until_lost(self, channel: AsyncChannel) -> str:
        """Why the engine ended. What it had begun with ends too."""
        reader = asyncio.create_task(self._read(channel))
        try:
            stuck = await _attend(reader, self._pulse, self._process, self._health, self._look, self.name)
            why = reader.result() if stuck is None else f"{self.name} was stuck and was ended: {stuck}"
        finally:
            reader.cancel()
        self.stats, self._channel = EngineStats(), None
        channel.close()
        self.lost()
        return why

    def _look(self) -> bool:
        """Whether requests are pending. What an engine that is unwell has not begun with need not wait for its end."""
        if self._pulse.unwell() is not None:
            self._hand_over()
        return bool(self._pending)

    async def _read(self, channel: AsyncChannel) -> str:
        """Takes in what comes, until nothing does any more, and says why."""
        try:
            while True:
                message = await channel.receive()
                self._pulse.heard(message if isinstance(message, Beat) else None)
                if isinstance(message, Failed):
                    # A traceback, or words about files: for who runs the server, not for its clients.
                    logger.error("%s failed: %s", self.name, message.message)
                    self._channel = None
                    return _FAILED
                if isinstance(message, Begun):
                    for request_id in message.ids:
                        if (pending := self._pending.get(request_id)) is not None:
                            pending.begun = True
                elif isinstance(message, EngineStats):
                    self.stats = message
                elif isinstance(message, StepMessage):
                    for output in message.outputs:
                        if (pending := self._pending.get(output.id)) is not None:
                            pending.begun = True
                            if not pending.outputs.put(output):
                                self._send(Abort(output.id))
                    if len(message.outputs) >= _MANY_OUTPUTS:
                        await asyncio.sleep(0)  # for those who get them, before the next step's come
        except ChannelClosed:
            self._channel = None
            return f"{self.name} died: {await _exit_text(self._process)}"

    async def _next(self, why: str) -> AsyncChannel | str:
        """The channel of an engine that takes requests; where too many have died in a row, why the last did."""
        while (delay_s := self._restarts.next_delay_s()) is not None:
            self._loading = self._loading or Loading()
            self._fail_begun(why)
            after = f" after {delay_s:g} s" if delay_s else ""
            logger.error("%s; a new one is started%s (%d of %d in a row)", for_the_log(why), after, self._restarts.num,
                         self._restarts.most)  # fmt: skip
            await asyncio.sleep(delay_s)
            try:
                await self._end_process()
                if self._process.waits_elsewhere:
                    await asyncio.to_thread(self._process.start_anew)
                else:
                    self._process.start_anew()
                self._pulse = Pulse(self._process.pid, self._health.watchdog_timeout)
                loaded = await _loaded(self._process, self._pulse, self._health, self._report(self._loading))
            except (IngleError, OSError) as error:
                why = f"{self.name} could not be started anew: {_in_a_line(error)}"
                continue
            self._resume(*loaded)
            return loaded[0]
        return why

    def _report(self, loading: Loading) -> Report:
        if self.name == _ALONE:
            return loading.report
        return lambda stage: loading.report(f"{self.name}: {stage}")

    async def _end_process(self) -> None:
        """Raises `EngineError` for one that not even the system can end."""
        self._process.kill()
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + KILLED_S
        while not self._process.has_ended:
            if loop.time() > deadline_s:
                raise EngineError("the last one does not end, although it was killed")
            await asyncio.sleep(0.02)

    def _resume(self, channel: AsyncChannel, info: EngineInfo) -> None:
        """Hands what waits to the engine that has come."""
        assert self._loading is not None
        self._channel, self.info = channel, info
        self._restarts.ready()
        self.num_restarts += 1
        waiting = [pending for pending in self._pending.values() if not pending.lost]
        which = "the new engine" if self.name == _ALONE else f"the new engine of {self.name}"
        logger.info("%s is ready after %.1f s; %d requests waited", which, self._loading.seconds, len(waiting))
        self._loading = None
        for pending in waiting:
            pending.num_engines += 1
            self._send(pending.request)

    def _fail_begun(self, why: str) -> None:
        retry_after_s = math.ceil(self._load_s)
        told = AnswerLost(f"{why}. This answer is lost with it: send the request again, another engine is being "
                          "started", retry_after_s=retry_after_s)  # fmt: skip
        for pending in self._pending.values():
            if pending.begun or pending.num_engines >= MOST_ENGINES:
                pending.fail(told)
        self._hand_over()

    def _hand_over(self) -> None:
        """What waits to others, if there are any."""
        if not self.others_serve():
            return
        waiting = [each for each in self._pending.values() if not (each.begun or each.lost)]
        handed = [pending for pending in waiting if pending.num_engines < MOST_ENGINES]
        for pending in handed:
            pending.fail(NotBegun("another engine serves this request"))
        if handed:
            logger.info("%d requests that %s had not begun with go to others", len(handed), self.name)

    def _fail_all(self, told: EngineError) -> None:
        for pending in self._pending.values():
            pending.fail(told)

    def give_up(self, reason: str) -> None:
        """Ends all requests, and later ones at once, with an `EngineError` that says so; the engine drops them."""
        self._given_up = reason
        self._fail_all(EngineError(reason))

    def end(self) -> None:
        """Tells the engine to end, and does not wait for that, as `close` does."""
        self._closing = True
        self._supervisor.cancel()
        if self._channel is not None:
            self._process.end()

    async def close(self) -> None:
        """Ends the engine; requests still running are dropped."""
        self._closing = True
        self._supervisor.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._supervisor  # which may be starting the next
        if self._channel is not None:
            self._channel.close()
        self._process.stop()  # here: it takes two seconds at most, and all threads may be busy


async def _loaded(
    process: StartedEngine,
    pulse: Pulse,
    health: HealthConfig,
    report: Report,
    checked: Callable[[], None] = lambda: None,
) -> tuple[AsyncChannel, EngineInfo]:
    """As `EngineClient.connect`."""
    channel = await AsyncChannel.open(process.socket)
    task = asyncio.create_task(_until_ready(channel, process, pulse, report, checked))
    try:
        stuck = await _attend(task, pulse, process, health, lambda: False)
        if stuck is not None and (not task.done() or task.exception() is not None):
            raise EngineError(f"the engine was stuck while it was loading, and was ended: {stuck}")
        return channel, task.result()
    except BaseException:
        task.cancel()
        channel.close()
        raise


async def _until_ready(
    channel: AsyncChannel, process: StartedEngine, pulse: Pulse, report: Report, checked: Callable[[], None]
) -> EngineInfo:
    while True:
        try:
            message = await channel.receive()
        except ChannelClosed:
            text = await _exit_text(process)
            raise EngineError(f"the engine ended while it was loading: {text}") from None
        pulse.heard(message if isinstance(message, Beat) else None)
        if isinstance(message, EngineInfo):
            return message
        if isinstance(message, Failed):
            raise_failed(message)
        if isinstance(message, Progress):
            report(message.stage)
        elif isinstance(message, NothingRefused):
            checked()


async def _attend(
    task: asyncio.Task[Any],
    pulse: Pulse,
    process: StartedEngine,
    health: HealthConfig,
    pending: Callable[[], bool],
    name: str = _ALONE,
) -> str | None:
    """Until the task ends, which an engine's end does too. Ends one that is stuck, and says how that was known.

    One that does not even end when it is killed, as in a driver that hangs, is not waited for for ever.
    """
    found: str | None = None
    loop = asyncio.get_running_loop()
    deadline_s = math.inf
    while not task.done() and loop.time() < deadline_s:
        await asyncio.wait({task}, timeout=TICK_S)
        pulse.tick(pending())
        unwell = pulse.unwell()
        if health.watchdog and found is None and unwell is not None and unwell.hopeless:
            found = unwell.why
            logger.error("%s is stuck: %s; it is ended", name, found)
            process.kill()
            deadline_s = loop.time() + KILLED_S
    return found


def for_the_log(why: str) -> str:
    """An engine's end, in the log, which has the reason above."""
    return why.replace(_IN_THE_LOG, "")


def _in_a_line(error: Exception) -> str:
    """For clients. A traceback is for who runs the server."""
    told = str(error)
    if "\n" not in told:
        return told
    logger.error("an engine failed while it was loading: %s", told)
    return _FAILED


def _go_on(outputs: Sequence[EngineOutput | EngineError], interval: int) -> bool:
    """Whether more is to come before so many tokens are there."""
    last = outputs[-1]
    if interval == 1 or isinstance(last, EngineError) or last.finish_reason is not None or not last.token_ids:
        return False
    return sum(len(each.token_ids) for each in outputs if isinstance(each, EngineOutput)) < interval


def _together(outputs: list[EngineOutput | EngineError]) -> Iterator[EngineOutput | EngineError]:
    """As one what can be one; an error, or the engine's end, comes by itself."""
    told = [each for each in outputs if isinstance(each, EngineOutput) and each.finish_reason != "error"]
    if len(told) > 1:
        yield joined(told)
    else:
        yield from told
    yield from (each for each in outputs if isinstance(each, EngineError) or each.finish_reason == "error")


def joined(outputs: Sequence[EngineOutput]) -> EngineOutput:
    """What several steps brought for one request, in their order. How it stands is what the last one says."""
    scored = [output.logprobs for output in outputs if output.logprobs is not None]
    of_prompt = (output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None)
    queued = (output.queued_s for output in outputs if output.queued_s is not None)
    return msgspec.structs.replace(
        outputs[-1],
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        num_cached_tokens=max(output.num_cached_tokens for output in outputs),
        logprobs=[entry for entries in scored for entry in entries] if scored else None,
        prompt_logprobs=next(of_prompt, None),
        queued_s=next(queued, None),
    )


def raise_failed(failed: Failed) -> NoReturn:
    """Raises what an engine refused, or ended of."""
    found = Collected()
    for each in failed.errors:
        kind = ConfigError if each.of_flags else ModelError
        found.add(kind(each.what, alternative=each.alternative))
    found.raise_any()
    raise EngineError(failed.message)


async def _exit_text(process: StartedEngine) -> str:
    """Why it ended, once that is known. Asks for no thread: all may be busy."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + _EXIT_S
    while not process.has_ended and loop.time() < deadline_s:  # noqa: ASYNC110 (it sets no event)
        await asyncio.sleep(0.02)
    return process.exit_text()
