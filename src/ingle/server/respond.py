"""One request's way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.events import Answer, Begin, Event
from ingle.heap import give_back_memory
from ingle.server.access import client_of
from ingle.server.body import Kind, ModelRequest, UnknownFields, parse_body, read_body
from ingle.server.engine_client import caller
from ingle.server.errors import ErrorBody
from ingle.server.generation import Generation
from ingle.server.models import ModelPool, ServedModel
from ingle.server.queue import BodyMemory
from ingle.server.streaming import KEEP_ALIVE, EventStream, unless_disconnected, until

BodyT = TypeVar("BodyT", bound=ModelRequest)
T = TypeVar("T")

_SMALL_BYTES = 64 << 10
_MANY_SCORED = 500
"""Tokens with log probabilities that take some milliseconds to write: more are written off the event loop."""
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


class Writer(Protocol):
    """A request that has been checked and tokenized, ready to run, and how its protocol writes the answer."""

    @property
    def generation(self) -> Generation: ...
    @property
    def streamed(self) -> bool: ...
    @property
    def end(self) -> bytes:
        """What closes a stream."""
        ...

    def piece(self, events: Sequence[Event]) -> bytes:
        """Server-sent events of what came together; empty where the protocol has nothing to say of it."""
        ...

    def failed(self, status: int, body: ErrorBody) -> bytes:
        """The last of a stream that cannot go on."""
        ...

    def whole(self, answer: Answer) -> msgspec.Struct:
        """The answer that is not streamed: of the same events, all of them."""
        ...


async def respond(request: Request, kind: type[BodyT], prepare: Callable[[ServedModel, BodyT], Writer]) -> Response:
    """Runs one request through: read, prepare, generate. Ends with the client's connection if that ends first.

    `prepare` gets the model that the body, which is of the `kind`, asks for. It renders and tokenizes, in a thread as
    parsing does: every stream of the server waits for what runs on the loop, and thousands of requests may come at
    once.
    """
    writer = await read_prepared(request, kind, prepare)
    queue, requests = writer.generation.model.queue, writer.generation.requests
    queue.enter(requests)

    def leave() -> None:
        for queued in requests:
            queue.leave(queued.id)

    if writer.streamed:
        return EventStream(_pieces(writer), ended=leave, failed=writer.failed)
    try:
        whole = await unless_disconnected(_whole(writer), request.receive)
    finally:
        leave()
    return Response(whole, media_type="application/json")


async def read_prepared(request: Request, kind: Kind[BodyT], prepare: Callable[[ServedModel, BodyT], T]) -> T:
    """What `prepare` makes, in a thread, of the model and the body of a request."""
    models = ModelPool.of(request)
    unread: BodyMemory = request.app.state.unread
    unknown = UnknownFields.of(request)

    def prepared(body: bytes) -> T:
        parsed = parse_body(kind, body, unknown)
        model = models.get(parsed.model)
        model.check_engine()
        return prepare(model, parsed)

    caller.set(client_of(request.scope).name)
    with unread.account() as account:
        body = await read_body(request, account)
        models.check_engines()
        return await _in_thread(prepared, body)


async def respond_at_once(
    request: Request, kind: Kind[BodyT], answer: Callable[[ServedModel, BodyT], msgspec.Struct]
) -> Response:
    """A request that needs no engine: read, parsed and answered in a thread."""
    models = ModelPool.of(request)
    unread: BodyMemory = request.app.state.unread
    unknown = UnknownFields.of(request)

    def answered(body: bytes) -> bytes:
        parsed = parse_body(kind, body, unknown)
        return msgspec.json.encode(answer(models.get(parsed.model), parsed))

    with unread.account() as account:
        body = await read_body(request, account)
        threads = _SMALL if len(body) <= _SMALL_BYTES else _LARGE
        written = await asyncio.get_running_loop().run_in_executor(threads, answered, body)
    return Response(written, media_type="application/json")


async def _pieces(writer: Writer) -> AsyncGenerator[bytes, None]:
    steps = writer.generation.events()
    async with aclosing(steps), aclosing(until(steps, _begins)) as watched:
        async for events in watched:
            if events is None:
                yield KEEP_ALIVE
            elif piece := writer.piece(events):
                yield piece
    yield writer.end


def _begins(events: Sequence[Event] | None) -> bool:
    return events is not None and any(isinstance(event, Begin) for event in events)


async def _whole(writer: Writer) -> bytes:
    answer = Answer()
    async with aclosing(writer.generation.events()) as steps:
        async for events in steps:
            answer.add(events)

    def written() -> bytes:
        return msgspec.json.encode(writer.whole(answer))

    choices = answer.choices.values()
    num_scored = sum(len(choice.logprobs or ()) + len(choice.prompt_logprobs or ()) for choice in choices)
    if num_scored <= _MANY_SCORED:
        return written()
    return await asyncio.get_running_loop().run_in_executor(_SMALL, written)


async def _in_thread(prepared: Callable[[bytes], T], body: bytes) -> T:
    loop = asyncio.get_running_loop()
    if len(body) <= _SMALL_BYTES:
        return await loop.run_in_executor(_SMALL, prepared, body)
    try:
        writer = await loop.run_in_executor(_LARGE, prepared, body)
    except BaseException:
        _give_back_soon(loop)
        raise
    weakref.finalize(writer, _give_back_soon, loop).atexit = False
    return writer
