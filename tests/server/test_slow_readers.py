"""Clients that do not read: cut off after a time, out of the engine, and what waits for them is bounded."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import uvicorn
from starlette.applications import Starlette

from ingle.channel import Abort, StepMessage
from ingle.errors import RequestError
from ingle.request import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs
from ingle.server import listening
from ingle.server.engine_client import EngineClient
from ingle.server.graceful import http_config
from ingle.server.http_limits import HttpLimits, OpenConnections
from ingle.server.models import ServedModel
from ingle.server.unread import Unread

from .fakes import ScriptedEngine, app_for, until
from .test_engine_client import Ended, ScriptedChannel

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def listening_server(app: Starlette, **limits: Any) -> AsyncIterator[int]:
    """On a socket as `ingle serve` binds it: what the kernel holds for a client is bounded."""
    with listening.bind("127.0.0.1", 0) as sock:
        counted = OpenConnections(100)
        config = http_config(app, HttpLimits(**limits), counted, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await until(lambda: server.started, within_s=5.0)
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def ask(port: int, stream: bool) -> socket.socket:
    """A client with a small window, which has asked for an endless answer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    body = (
        b'{"prompt":"a","max_tokens":250,"ignore_eos":true,"stream":%s,"logprobs":20,"n":8}'
        % str(stream).lower().encode()
    )
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    client.setblocking(False)
    return client


@pytest.mark.parametrize("trickles", [False, True])
async def test_a_stream_that_nobody_reads_is_cut_off(
    model: ServedModel, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, trickles: bool
) -> None:
    engine.step_s = 0.001
    async with listening_server(app_for(model), slow_reader_s=0.5) as port:
        client = ask(port, stream=True)
        await until(lambda: engine.running == 8, within_s=10.0)

        async def trickle() -> None:
            while trickles:
                await asyncio.sleep(0.05)
                with_some = client.recv(100)
                assert with_some

        reading = asyncio.ensure_future(trickle())
        await until(lambda: engine.running == 0, within_s=20.0)
        reading.cancel()
        client.close()
        assert len(engine.aborted) == 8 and model.queue.num_requests == 0
    assert "it has not read what waits for it in 0.5 s (--slow-reader-timeout)" in caplog.text


async def test_a_whole_answer_that_nobody_reads_is_cut_off_and_counted_until_then(
    model: ServedModel, engine: ScriptedEngine
) -> None:
    engine.tokens_per_step = 250
    app = app_for(model)
    async with listening_server(app, slow_reader_s=0.5) as port:
        client = ask(port, stream=False)
        await until(lambda: len(engine.requests) == 8 and engine.running == 0, within_s=20.0)
        await until(lambda: app.state.answers.num_bytes > 0, within_s=5.0)
        await until(lambda: app.state.answers.num_bytes == 0, within_s=10.0)
        client.close()


async def test_a_reader_that_keeps_up_is_left_alone(model: ServedModel, engine: ScriptedEngine) -> None:
    engine.step_s = 0.001
    async with listening_server(app_for(model), slow_reader_s=0.5) as port:
        client = ask(port, stream=True)
        data = b""
        loop = asyncio.get_running_loop()
        while b"data: [DONE]" not in data:
            piece = await loop.sock_recv(client, 65_536)
            assert piece
            data = data[-100:] + piece
        client.close()
    assert not engine.aborted


def output(token_id: int, num_scores: int = 0) -> EngineOutput:
    logprobs = [TokenLogprobs([1] * num_scores, [0.0] * num_scores, 1)] if num_scores else None
    return EngineOutput("a", [token_id], logprobs=logprobs)


def test_what_waits_is_bounded_by_what_it_takes() -> None:
    for num_scores, most in ((0, 40), (20, 10)):
        unread = Unread(10_000)
        count = 0
        while unread.put(output(1, num_scores)):
            count += 1
        assert 3 < count < most and unread.overrun
        assert unread.put(output(2))  # once is enough: nobody need be told again


async def test_one_large_output_is_no_slow_reader() -> None:
    unread = Unread(1000)
    assert unread.put(output(1, 1000))
    assert len(await unread.take()) == 1 and unread.num_bytes == 0


async def test_the_engine_drops_what_nobody_takes() -> None:
    channel = ScriptedChannel()
    client = EngineClient(cast(Any, Ended()), cast(Any, channel), cast(Any, None))
    client.max_unread_bytes = 10_000
    stream = client.generate(EngineRequest("a", [1], SamplingParams()))
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    channel.messages.put_nowait(StepMessage([output(1)]))
    assert (await first).token_ids == [1]
    for _ in range(100):
        channel.messages.put_nowait(StepMessage([output(1)]))
    await until(lambda: Abort("a") in channel.sent, within_s=5.0)
    with pytest.raises(RequestError, match="--max-unread-bytes") as error:
        await anext(stream)
    assert error.value.code == "slow_reader"
    await client.close()
