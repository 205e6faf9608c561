"""One request's way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.server.body import read_body
from ingle.server.context import ServerContext
from ingle.server.streaming import EventStream, unless_disconnected

_SMALL_BYTES = 64 << 10
_SMALL = ThreadPoolExecutor(4, "prepare")
_LARGE = ThreadPoolExecutor(1, "prepare large")
"""One at a time, so that small requests find a processor and never wait for a thread."""


class Answer(Protocol):
    """A request that has been checked and tokenized, ready to run."""

    @property
    def streamed(self) -> bool: ...

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
    body = await read_body(request)
    context.check_engine()
    threads = _SMALL if len(body) <= _SMALL_BYTES else _LARGE
    answer = await asyncio.get_running_loop().run_in_executor(threads, prepare, context, body)
    if answer.streamed:
        return EventStream(answer.events())
    whole = await unless_disconnected(answer.whole(), request.receive)
    return Response(msgspec.json.encode(whole), media_type="application/json")
