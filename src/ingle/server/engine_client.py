"""The API process's view of the engine: send requests, receive tokens, know whether it is well."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from ingle.channel import Abort, ChannelClosed, EngineInfo, EngineStats, Failed, NothingRefused, Progress, StepMessage
from ingle.errors import Collected, ConfigError, EngineError, ModelError
from ingle.limits import LimitsConfig
from ingle.request import EngineOutput, EngineRequest
from ingle.server.async_channel import AsyncChannel
from ingle.server.engine_process import EngineProcess
from ingle.server.unread import Unread

logger = logging.getLogger("ingle.server")

in_background: ContextVar[bool] = ContextVar("in_background", default=False)
"""Whether what is asked of the engine can wait for all that somebody waits for."""
caller: ContextVar[str] = ContextVar("caller", default="")
"""The name of the client who asks, as in `EngineRequest.client`."""
_BACKGROUND = 1 << 40
STALL_S = 60.0
"""A busy engine that finishes no step for this long is reported as unhealthy."""
_EXIT_S = 5.0
"""For a process to end that has closed its channel."""


@dataclass(frozen=True)
class HealthStatus:
    ok: bool
    detail: str


class EngineClient:
    """Requests to a running engine. Use `connect`, then `generate`; `closed` is set when the engine has gone."""

    def __init__(
        self, process: EngineProcess, channel: AsyncChannel, info: EngineInfo, stream_interval: int = 1
    ) -> None:
        """`stream_interval`: tokens that come together, after the first."""
        self.info = info
        self._stream_interval = stream_interval
        self.stats = EngineStats()
        self.num_restarts = 0
        self.closed = asyncio.Event()
        self.failure: str | None = None
        self._given_up: str | None = None
        self._closing = False
        self._process = process
        self._channel = channel
        self.max_unread_bytes = LimitsConfig().max_unread_bytes
        """Of what waits for one stream's client."""
        self._queues: dict[str, Unread] = {}
        self._last_message = time.monotonic()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def connect(
        cls,
        process: EngineProcess,
        report: Callable[[str], None] = lambda stage: None,
        checked: Callable[[], None] = lambda: None,
        stream_interval: int = 1,
    ) -> EngineClient:
        """Waits until the engine has loaded what it was told to; `checked` is called when nothing is left that it
        could refuse before.

        Raises `ModelError` and `ConfigError` for what it refuses, `EngineError` with its own words for all else.
        """
        channel = await AsyncChannel.open(process.socket)
        while True:
            try:
                message = await channel.receive()
            except ChannelClosed:
                text = await _exit_text(process)
                raise EngineError(f"the engine ended while it was loading: {text}") from None
            if isinstance(message, EngineInfo):
                return cls(process, channel, message, stream_interval)
            if isinstance(message, Failed):
                _raise(message)
            if isinstance(message, Progress):
                report(message.stage)
            elif isinstance(message, NothingRefused):
                checked()

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """The request's outputs until it finishes. Closing or cancelling the iteration aborts it in the engine.

        What came of several steps while nobody looked comes as one: so a loop that is late has less to do, and catches
        up. Raises `EngineError` when the engine is gone, and `RequestError` when too much waits to be taken.
        """
        if (reason := self.failure or self._given_up) is not None:
            raise EngineError(reason)
        request = msgspec.structs.replace(request, client=caller.get())
        if in_background.get():
            request = msgspec.structs.replace(request, priority=max(request.priority, 0) + _BACKGROUND)
        queue = Unread(self.max_unread_bytes)
        if not self._queues:
            self._last_message = time.monotonic()  # idle until now: the stall clock starts here
        self._queues[request.id] = queue
        self._channel.send(request)
        finished, interval = False, 1
        try:
            while not finished:
                outputs = await queue.take()
                while _go_on(outputs, interval):
                    outputs += await queue.take()
                interval = self._stream_interval
                for output in _together(outputs):
                    if output is None:
                        raise EngineError(self.failure or self._given_up or "the engine is gone")
                    finished = output.finish_reason is not None
                    yield output
        finally:
            del self._queues[request.id]
            if not finished and self.failure is None and not self._closing:
                self._channel.send(Abort(request.id))

    def health(self) -> HealthStatus:
        """Well means: alive, and steps progress while requests are pending."""
        if (reason := self.failure or self._given_up) is not None:
            return HealthStatus(False, reason)
        silent_s = time.monotonic() - self._last_message
        if self._queues and silent_s > STALL_S:
            return HealthStatus(
                False, f"{len(self._queues)} requests are pending and no step ended for {silent_s:.0f} s"
            )
        return HealthStatus(True, f"{self.stats.num_running} requests running, {self.stats.num_waiting} waiting")

    async def _read(self) -> None:
        try:
            while self.failure is None:
                message = await self._channel.receive()
                self._last_message = time.monotonic()
                if isinstance(message, Failed):
                    # A traceback, or words about files: for who runs the server, not for its clients.
                    logger.error("the engine failed: %s", message.message)
                    self.failure = "the engine failed; the server's log has the reason"
                elif isinstance(message, EngineStats):
                    self.stats = message
                elif isinstance(message, StepMessage):
                    for output in message.outputs:
                        queue = self._queues.get(output.id)
                        if queue is not None and not queue.put(output):
                            self._channel.send(Abort(output.id))
        except ChannelClosed:
            self.failure = f"the engine died: {await _exit_text(self._process)}"
        for queue in self._queues.values():
            queue.put(None)
        self.closed.set()

    def give_up(self, reason: str) -> None:
        """Ends all requests, and later ones at once, with an `EngineError` that says so; the engine drops them."""
        self._given_up = reason
        for queue in self._queues.values():
            queue.put(None)

    async def close(self) -> None:
        """Ends the engine; requests still running are dropped."""
        self._closing = True
        self._reader.cancel()
        self._channel.close()
        self._process.stop()  # here: it takes two seconds at most, and all threads may be busy


def _go_on(outputs: Sequence[EngineOutput | None], interval: int) -> bool:
    """Whether more is to come before so many tokens are there."""
    last = outputs[-1]
    if interval == 1 or last is None or last.finish_reason is not None or not last.token_ids:
        return False
    return sum(len(output.token_ids) for output in outputs if output is not None) < interval


def _together(outputs: list[EngineOutput | None]) -> Iterator[EngineOutput | None]:
    """As one what can be one; an error, or the engine's end, comes by itself."""
    told = [output for output in outputs if output is not None and output.finish_reason != "error"]
    if len(told) > 1:
        yield joined(told)
    else:
        yield from told
    yield from (output for output in outputs if output is None or output.finish_reason == "error")


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


def _raise(failed: Failed) -> NoReturn:
    found = Collected()
    for each in failed.errors:
        kind = ConfigError if each.of_flags else ModelError
        found.add(kind(each.what, alternative=each.alternative))
    found.raise_any()
    raise EngineError(failed.message)


async def _exit_text(process: EngineProcess) -> str:
    """Why it ended, once that is known. Asks for no thread: all may be busy."""
    deadline_s = time.monotonic() + _EXIT_S
    while not process.has_ended and time.monotonic() < deadline_s:  # noqa: ASYNC110 (it sets no event)
        await asyncio.sleep(0.02)
    return process.exit_text()
