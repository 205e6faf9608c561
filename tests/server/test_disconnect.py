"""A client that goes away stops its request in the engine, on a real server with real sockets."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from .fakes import ScriptedEngine, served, until

pytestmark = pytest.mark.anyio

ENDPOINTS = {
    "/v1/completions": {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 100_000,
        "ignore_eos": True,
    },
}
AT_ONCE_S = 0.3
"""Well under the seconds that a request left alone would run."""


@pytest.fixture
async def port(app: Starlette, engine: ScriptedEngine) -> AsyncIterator[int]:
    engine.info.max_model_len = 1_000_000
    engine.step_s = 0.005
    async with served(app) as port:
        yield port


async def send(port: int, path: str, **extra: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request over a plain socket, whose answer is the caller's to read or not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(ENDPOINTS[path] | extra).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


async def leave(writer: asyncio.StreamWriter, engine: ScriptedEngine) -> None:
    """Closes the connection, and checks that the engine is rid of the request."""
    num_requests = len(engine.requests)
    writer.close()
    await until(lambda: engine.running == 0, within_s=AT_ONCE_S)
    assert len(engine.aborted) == num_requests


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_leaving_a_stream(port: int, engine: ScriptedEngine, path: str, n: int) -> None:
    reader, writer = await send(port, path, stream=True, n=n)
    await reader.readuntil(b"data: ")
    assert engine.running == n
    await leave(writer, engine)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_leaving_before_a_whole_answer(port: int, engine: ScriptedEngine, path: str, n: int) -> None:
    _, writer = await send(port, path, n=n)
    await until(lambda: engine.running == n, within_s=5.0)
    await leave(writer, engine)


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_before_the_first_token(port: int, engine: ScriptedEngine, stream: bool) -> None:
    engine.step_s = 60.0
    _, writer = await send(port, "/v1/completions", stream=stream)
    await until(lambda: engine.running == 1, within_s=5.0)
    await leave(writer, engine)


async def test_leaving_a_stream_that_is_not_read(port: int, engine: ScriptedEngine) -> None:
    """The server is blocked in sending, its buffers full, when the client goes."""
    engine.step_s, engine.tokens_per_step = 0.0, 5000
    engine.say("x" * 5000)
    engine.info.max_model_len = 2_000_000_000
    _, writer = await send(port, "/v1/completions", stream=True, max_tokens=1_000_000_000)
    await until(lambda: engine.running == 1, within_s=5.0)
    num_steps = -1
    while num_steps != engine.num_steps:
        num_steps = engine.num_steps
        await asyncio.sleep(0.1)
    await leave(writer, engine)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_leaving_while_the_request_is_prepared(
    port: int, engine: ScriptedEngine, path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.step_s, engine.tokens_per_step = 0.0, 5000
    engine.info.max_model_len = 2_000_000_000
    encode, encoded = engine.tokenizer.encode, []

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        time.sleep(0.3)
        encoded.append(text)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(engine.tokenizer, "encode", slow)
    _, writer = await send(port, path, stream=stream, max_tokens=1_000_000_000)
    await asyncio.sleep(0.1)
    writer.close()
    await until(lambda: bool(encoded), within_s=5.0)
    await asyncio.sleep(AT_ONCE_S)
    assert engine.running == 0


async def test_the_server_serves_on(port: int, engine: ScriptedEngine) -> None:
    _, writer = await send(port, "/v1/completions", stream=True)
    await until(lambda: engine.running == 1, within_s=5.0)
    await leave(writer, engine)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        response = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
        assert response.json()["choices"][0]["text"] == "Hello"


async def test_a_finished_request_is_not_aborted(port: int, engine: ScriptedEngine) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for stream in (False, True):
            body = {"prompt": "a", "max_tokens": 5, "stream": stream}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert engine.running == 0 and engine.aborted == []
