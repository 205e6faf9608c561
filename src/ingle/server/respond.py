"""One request's way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.events import Answer, Begin, Event, Text
from ingle.heap import give_back_memory
from ingle.limits import holding
from ingle.request import EngineRequest
from ingle.server.access import Client, client_of
from ingle.server.body import Kind, ModelRequest, UnknownFields, parse_body, read_body
from ingle.server.ending import AnswerAccount, AnswersMemory, Deadline, Ending
from ingle.server.engine_client import caller
from ingle.server.errors import ErrorBody, current_request_id
from ingle.server.generation import Generation
from ingle.server.models import ModelPool, ServedModel
from ingle.server.queue import BodyAccount, BodyMemory, RequestQueue
from ingle.server.request_log import RequestsLog, current_record
from ingle.server.streaming import KEEP_ALIVE, EventStream, WholeAnswer, encoded, unless_disconnected, until

BodyT = TypeVar("BodyT", bound=ModelRequest)
T = TypeVar("T")

_SMALL_BYTES = 64 << 10
_MANY_SCORED = 500
"""Tokens with log probabilities that take some milliseconds to write: more are written off the event loop."""
_MANY_CHOICES = 64
_GIVE_BACK_S = 0.5
_BYTES_PER_CHOICE = 16_384
"""Tasks, queues and decoders of one."""
_BYTES_PER_STOP_CHAR = 400
"""A state of the automaton that looks for stop strings."""
_BYTES_PER_TOKEN, _BYTES_PER_SCORE = 150, 400
"""Of an answer that is not streamed: of each token, and of each log probability."""
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
    flight = Flight(request)
    try:
        writer = await read_prepared(request, kind, prepare, flight)
        flight.enter(writer.generation.model.queue, writer.generation.requests, streamed=writer.streamed)
        flight.account.add(sum(_BYTES_PER_STOP_CHAR * sum(map(len, p.params.stop)) for p in writer.generation.prompts))
        note_asked(writer.generation.model, writer.generation.requests, streamed=writer.streamed)
        client = client_of(request.scope)
        client.spend(sum(len(prompt.token_ids) for prompt in writer.generation.prompts))
        if writer.streamed:
            return EventStream(_pieces(writer, client), ended=flight.close, failed=writer.failed, ending=flight.ending)
        whole = await unless_disconnected(flight.run(_whole(writer, client, flight.account)), request.receive)
    except BaseException:
        flight.close()
        raise
    flight.close()
    return WholeAnswer(whole, flight.memory)


class Flight:
    """What goes with one request from its arrival to the end of its answer: how it may be ended, what it takes, and its
    place in the queue."""

    def __init__(self, request: Request) -> None:
        self.memory: AnswersMemory = request.app.state.answers
        self.ending = Ending()
        self.account = self.memory.account(self.ending)
        self.num_body_bytes = 0
        self.timeout_s: float | None = None
        """As the body says."""
        self._deadline = Deadline(request, request.app.state.limits, self.ending)
        self._queue: RequestQueue | None = None
        self._requests: Sequence[EngineRequest] = ()

    def enter(self, queue: RequestQueue, requests: Sequence[EngineRequest], *, streamed: bool) -> None:
        """Into the queue. Raises `RequestError` where that is full, or memory."""
        self.account.add(self.num_body_bytes + sum(4 * len(r.prompt_token_ids) + _BYTES_PER_CHOICE for r in requests))
        queue.enter(requests)
        self._queue, self._requests = queue, requests
        self._deadline.ask(self.timeout_s, streamed=streamed, waits=self._waits)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises what it is ended by."""
        with self.ending:
            return await work

    def close(self) -> None:
        self._deadline.close()
        self.account.close()
        if self._queue is not None:
            for request in self._requests:
                self._queue.leave(request.id)

    def _waits(self) -> bool:
        return self._queue is not None and any(self._queue.waits(request.id) for request in self._requests)


async def read_prepared(
    request: Request, kind: Kind[BodyT], prepare: Callable[[ServedModel, BodyT], T], flight: Flight
) -> T:
    """What `prepare` makes, in a thread, of the model and the body of a request."""
    models = ModelPool.of(request)
    unread: BodyMemory = request.app.state.unread
    unknown = UnknownFields.of(request)

    def prepared(body: bytes) -> T:
        with holding(request.app.state.limits):
            parsed = parse_body(kind, body, unknown)
            flight.timeout_s = parsed.timeout
            model = models.get(parsed.model)
            model.check_engine()
            return prepare(model, parsed)

    caller.set(client_of(request.scope).name)
    with unread.account() as account, flight.ending:
        body = await _read(request, account)
        flight.num_body_bytes = len(body)
        _tell(request, body)
        models.check_engines()
        return await _in_thread(prepared, body)


def note_asked(model: ServedModel, requests: Sequence[EngineRequest], *, streamed: bool = False) -> None:
    """What the record of the HTTP request at hand, if any, says of what it asks of the engine."""
    record = current_record.get()
    if record is not None and requests:
        record.model, record.streamed, record.num_choices = model.name, streamed, len(requests)
        record.answer_id = requests[0].id.rpartition("-")[0]
        sampling = requests[0].sampling
        if requests[0].pooling is None:
            record.max_tokens, record.temperature, record.top_p = (
                sampling.max_tokens, sampling.temperature, sampling.top_p,
            )  # fmt: skip


def _tell(request: Request, body: bytes) -> None:
    """Logs what is asked for, word for word, where the server's owner wants to see that."""
    log: RequestsLog | None = request.app.state.observers.requests
    if log is not None:
        log.tell(current_request_id.get(), request.url.path, body)


async def respond_at_once(
    request: Request, kind: Kind[BodyT], answer: Callable[[ServedModel, BodyT], msgspec.Struct]
) -> Response:
    """A request that needs no engine: read, parsed and answered in a thread."""
    models = ModelPool.of(request)
    unread: BodyMemory = request.app.state.unread
    unknown = UnknownFields.of(request)

    def answered(body: bytes) -> bytes:
        with holding(request.app.state.limits):
            parsed = parse_body(kind, body, unknown)
            return msgspec.json.encode(answer(models.get(parsed.model), parsed))

    with unread.account() as account:
        body = await _read(request, account)
        _tell(request, body)
        threads = _SMALL if len(body) <= _SMALL_BYTES else _LARGE
        written = await asyncio.get_running_loop().run_in_executor(threads, answered, body)
    return Response(written, media_type="application/json")


async def _read(request: Request, account: BodyAccount) -> bytes:
    try:
        return await read_body(request, account)
    except BaseException:
        if account.num_bytes > _SMALL_BYTES:
            _give_back_soon(asyncio.get_running_loop())
        raise


async def _pieces(writer: Writer, client: Client) -> AsyncGenerator[bytes, None]:
    steps = writer.generation.events()
    async with aclosing(steps), aclosing(until(steps, _begins)) as watched:
        async for events in watched:
            if events is None:
                yield KEEP_ALIVE
                continue
            client.spend(_num_tokens(events))
            if piece := writer.piece(events):
                yield piece
    yield writer.end


def _num_tokens(events: Sequence[Event]) -> int:
    return sum(len(event.token_ids) for event in events if isinstance(event, Text))


def _begins(events: Sequence[Event] | None) -> bool:
    return events is not None and any(isinstance(event, Begin) for event in events)


async def _whole(writer: Writer, client: Client, account: AnswerAccount) -> bytes:
    answer = Answer()
    async with aclosing(writer.generation.events()) as steps:
        async for events in steps:
            answer.add(events)
            client.spend(_num_tokens(events))
            account.add(_bytes_of(events))

    def written() -> bytes:
        return encoded(writer.whole(answer))

    choices = answer.choices.values()
    num_scored = sum(len(choice.logprobs or ()) + len(choice.prompt_logprobs or ()) for choice in choices)
    if num_scored <= _MANY_SCORED and len(choices) <= _MANY_CHOICES:
        return written()
    return await asyncio.get_running_loop().run_in_executor(_SMALL, written)


def _bytes_of(events: Iterable[Event]) -> int:
    """What these take, and what is written of them in the end, roughly."""
    num_tokens = num_scores = 0
    for event in events:
        if isinstance(event, Text):
            num_tokens += len(event.token_ids)
            num_scores += sum(len(entry.token_ids) for entry in event.logprobs or ())
        elif isinstance(event, Begin) and event.prompt_logprobs:
            num_scores += sum(len(entry.token_ids) for entry in event.prompt_logprobs if entry is not None)
    return _BYTES_PER_TOKEN * num_tokens + _BYTES_PER_SCORE * num_scores


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
