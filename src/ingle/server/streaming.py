"""Server-sent events, and answers that stop when the client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ingle.server.ending import AnswersMemory, Ending
from ingle.server.errors import ErrorBody, describe, error_event, logger

T = TypeVar("T")


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event whose data is JSON, and so holds no line break."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def named_event(name: str, data: msgspec.Struct) -> bytes:
    """One that also says its type in a line of its own, for clients that read that."""
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"


async def unless_disconnected(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """The result of `work`, which is cancelled as soon as the client is gone.

    The request's body must have been read. Raises `ClientDisconnect`, or what `work` raises.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        await _cancel(worker, watcher)


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all sources as they come. The first exception ends it; closing it closes every source."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for item in source:
                yield item
        return
    queue: asyncio.Queue[T | _End] = asyncio.Queue(maxsize=len(sources))
    pumps: list[asyncio.Future[None]] = []
    running = len(sources)
    pumps.append(asyncio.ensure_future(_start_pumps(sources, queue, pumps)))
    try:
        while running:
            entry = await queue.get()
            if not isinstance(entry, _End):
                yield entry
            elif entry.error is not None:
                raise entry.error
            else:
                running -= 1
    finally:
        await _cancel(pumps[0])  # that starts others
        for start in range(1, len(pumps), _AT_ONCE):
            await _cancel(*pumps[start : start + _AT_ONCE])


_AT_ONCE = 8
"""Sources that are begun, or closed, before other tasks have their turn: a request may have a thousand."""


KEEP_ALIVE_S = 15.0
"""A stream that is silent for so long before its first token gets a comment: proxies close what says nothing."""
KEEP_ALIVE = b": keep-alive\n\n"


async def until(items: AsyncIterator[T], begun: Callable[[T], bool]) -> AsyncGenerator[T | None, None]:
    """Items, and None whenever none came for `KEEP_ALIVE_S`, but only until one with which all has `begun`.

    Later ones are not watched, which would take a task for each token.
    """
    while True:
        following: asyncio.Future[T] = asyncio.ensure_future(anext(items))
        try:
            while not (await asyncio.wait({following}, timeout=KEEP_ALIVE_S))[0]:
                yield None
        finally:
            if not following.done():
                await _cancel(following)
        try:
            item = following.result()
        except StopAsyncIteration:
            return
        yield item
        if begun(item):
            break
    async for item in items:
        yield item


class EventStream(Response):
    """A response of server-sent events. When the client leaves, the generator of events is closed at once."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        ended: Callable[[], None],
        failed: Callable[[int, ErrorBody], bytes] = error_event,
        ending: Ending | None = None,
    ) -> None:
        """`ended` is called when the last event is out, or the client gone; `failed` says what made the events fail,
        among it what `ending` ends them by.
        """
        # Proxies that buffer (nginx does) would hold tokens back.
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._ended = ended
        self._failed = failed
        self._ending = Ending() if ending is None else ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._events):
                await unless_disconnected(self._send_events(send), receive)
        finally:
            self._ended()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            with self._ending:
                async for chunk in self._events:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            await self._events.aclose()  # now: a client that reads no more may never hear of it
            # The status line is out: the stream itself is the only place left to say what happened.
            failure = self._failed(*describe(error))
            await send({"type": "http.response.body", "body": failure, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def encoded(answer: msgspec.Struct) -> bytes:
    """As JSON. Each of its choices or vectors by itself: one call of the encoder holds the interpreter's lock, and all
    of them may take a second."""
    for name in ("choices", "data"):
        parts = getattr(answer, name, None)
        if isinstance(parts, list) and len(parts) > 1:
            raw = [msgspec.Raw(msgspec.json.encode(part)) for part in parts]
            answer = msgspec.structs.replace(answer, **{name: raw})
    return msgspec.json.encode(answer)


_PIECE_BYTES = 256 * 1024


class WholeAnswer(Response):
    """One that is not streamed. It goes out as its client reads it, and counts until then."""

    media_type = "application/json"

    def __init__(self, body: bytes, memory: AnswersMemory) -> None:
        super().__init__(body)
        self._memory = memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = memoryview(self.body)
        if len(body) <= _PIECE_BYTES:
            await super().__call__(scope, receive, send)
            return
        ending = Ending()
        account = self._memory.account(ending)
        try:
            with ending:
                account.add(len(body))
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                for start in range(0, len(body), _PIECE_BYTES):
                    piece = bytes(body[start : start + _PIECE_BYTES])
                    more = start + _PIECE_BYTES < len(body)
                    await send({"type": "http.response.body", "body": piece, "more_body": more})
        finally:
            account.close()


class _End:
    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def _start_pumps(
    sources: Sequence[AsyncGenerator[T, None]], queue: asyncio.Queue[T | _End], pumps: list[asyncio.Future[None]]
) -> None:
    for start in range(0, len(sources), _AT_ONCE):
        pumps += [asyncio.ensure_future(_pump(source, queue)) for source in sources[start : start + _AT_ONCE]]
        await asyncio.sleep(0)


async def _pump(source: AsyncGenerator[T, None], queue: asyncio.Queue[T | _End]) -> None:
    try:
        async with aclosing(source):
            async for item in source:
                await queue.put(item)
    except Exception as error:
        await queue.put(_End(error))
    else:
        await queue.put(_End(None))


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(outcome, Exception):
            logger.warning("a cancelled request did not end cleanly", exc_info=outcome)
