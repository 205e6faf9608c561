"""One request's way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import EngineRequest
from ingle.server.body import read_body
from ingle.server.context import ServerContext
from ingle.server.streaming import EventStream, unless_disconnected


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


async def respond(
    request: Request, prepare: Callable[[ServerContext, bytes], Answer], *, inline_bytes: int
) -> Response:
    """Runs one request through: read, prepare, generate. Ends with the client's connection if that ends first.

    `prepare` parses, renders and tokenizes: for bodies above `inline_bytes` in a thread, since every stream of the
    server waits for what runs on the loop.
    """
    context: ServerContext = request.app.state.context
    with context.unread.account() as account:
        body = await read_body(request, account)
        context.check_engine()
        inline = len(body) <= inline_bytes
        answer = prepare(context, body) if inline else await asyncio.to_thread(prepare, context, body)
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
