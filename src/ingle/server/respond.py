"""One request's way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.heap import give_back_memory
from ingle.request import EngineRequest
from ingle.server.body import read_body
from ingle.server.context import ServerContext
from ingle.server.streaming import EventStream, unless_disconnected

_SMALL_BYTES = 64 << 10
_GIVE_BACK_S = 0.5
_SMALL = ThreadPoolExecutor(4, "prepare")
_LARGE = ThreadPoolExecutor(1, "prepare large")
"""One at a time, so that small requests find a processor and never wait for a thread."""


def _give_back_soon(loop: asyncio.AbstractEventLoop) -> None:
    """What a large request took, once all that is left of it is gone."""

    def wait() -> None:
        loop.call_later(_GIVE_BACK_S, lambda: _LARGE.submit(give_back_memory))

    with contextlib.suppress(RuntimeError):  # the loop has ended, and so will the process
        loop.call_soon_threadsafe(wait)


class Answer(Protocol):
    """A request that has been checked and tokenized, ready to run."""

    @property
    def streamed(self) -> bool: ...
    @property
    def requests(self) -> Sequence[EngineRequest]:
        """What is asked of the engine."""
        ...

    def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; each item may hold several."""
        ...

    async def whole(self) -> msgspec.Struct: ...


async def respond(request: Request, prepare: Callable[[ServerContext, bytes], Answer]) -> Response:
    """Runs one request through: read, prepare, generate. Ends with the client's connection if that ends first.

    `prepare` parses, renders and tokenizes, in a thread: every stream of the server waits for what runs on the loop,
    and thousands of requests may come at once.
    """
    context: ServerContext = request.app.state.context
    with context.unread.account() as account:
        body = await read_body(request, account)
        context.check_engine()
        answer = await _prepared(context, body, prepare)
        del body  # what waits for its tokens is the answer alone
    context.queue.enter(answer.requests)

    def leave() -> None:
        for queued in answer.requests:
            context.queue.leave(queued.id)

    if answer.streamed:
        return EventStream(answer.events(), ended=leave)
    try:
        whole = await unless_disconnected(answer.whole(), request.receive)
    finally:
        leave()
    return Response(msgspec.json.encode(whole), media_type="application/json")


async def _prepared(context: ServerContext, body: bytes, prepare: Callable[[ServerContext, bytes], Answer]) -> Answer:
    loop = asyncio.get_running_loop()
    if len(body) <= _SMALL_BYTES:
        return await loop.run_in_executor(_SMALL, prepare, context, body)
    try:
        answer = await loop.run_in_executor(_LARGE, prepare, context, body)
    except BaseException:
        _give_back_soon(loop)
        raise
    weakref.finalize(answer, _give_back_soon, loop).atexit = False
    return answer
