"""A request whose answer is made of vectors: its way through the server, whatever its endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ingle.errors import EngineError, RequestError
from ingle.request import EngineRequest
from ingle.server.access import client_of
from ingle.server.ending import AnswerAccount
from ingle.server.models import ServedModel
from ingle.server.respond import BodyT, Flight, note_asked, read_prepared
from ingle.server.statistics import Measured
from ingle.server.streaming import WholeAnswer, encoded, merge, unless_disconnected

_WRITTEN_TIMES = 16
"""So many bytes become of one while numbers are written as text."""


class VectorWriter(Protocol):
    """A request that has been checked and tokenized, and how its endpoint writes the answer."""

    @property
    def model(self) -> ServedModel: ...
    @property
    def requests(self) -> Sequence[EngineRequest]: ...

    def whole(self, vectors: Sequence[bytes]) -> msgspec.Struct:
        """The answer, of one vector for each of the requests."""
        ...


async def respond_vectors(
    request: Request, kind: type[BodyT], prepare: Callable[[ServedModel, BodyT], VectorWriter]
) -> Response:
    """Runs one request through: read, prepare, compute. Ends with the client's connection if that ends first."""
    flight = Flight(request)
    try:
        writer = await read_prepared(request, kind, prepare, flight)
        flight.enter(writer.model.queue, writer.requests, streamed=False)
        note_asked(writer.model, writer.requests)
        client_of(request.scope).spend(sum(len(each.prompt_token_ids) for each in writer.requests))
        whole = await unless_disconnected(flight.run(_whole(writer, flight.account)), request.receive)
    finally:
        flight.close()
    return WholeAnswer(whole, flight.memory)


async def _whole(writer: VectorWriter, account: AnswerAccount) -> bytes:
    vectors = [b""] * len(writer.requests)
    sources = [_vector(writer.model, index, request) for index, request in enumerate(writer.requests)]
    async with aclosing(merge(sources)) as found:
        async for index, vector in found:
            vectors[index] = vector
            account.add(_WRITTEN_TIMES * len(vector))
    # Thousands of numbers take milliseconds to write, and all streams would wait.
    return await asyncio.to_thread(lambda: encoded(writer.whole(vectors)))


async def _vector(model: ServedModel, index: int, request: EngineRequest) -> AsyncGenerator[tuple[int, bytes], None]:
    with Measured(model.statistics, request) as measured:
        async with aclosing(model.engine.generate(request)) as outputs:
            async for output in outputs:
                model.queue.begun(request.id)
                measured.took(output, output.finish_reason)
                if output.finish_reason == "error":
                    raise RequestError(f"{request.id} failed: {output.error}", code="generation_failed", status=500)
                if output.pooled is not None:
                    yield index, output.pooled
                    return
    raise EngineError("its output ended before the request was finished")
