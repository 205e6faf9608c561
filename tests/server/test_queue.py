"""How much may wait: 429 beyond it, and room again when requests get a token, end, or lose their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from ingle.server.models import ServedModel
from ingle.server.queue import RequestQueue

from .fakes import ScriptedEngine, app_for, assert_error, served, until

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"


@pytest.fixture
async def held(model: ServedModel, engine: ScriptedEngine) -> AsyncIterator[Callable[..., Any]]:
    """A real server with small bounds, whose engine gives no token until told to."""
    engine.step_s = 60.0
    queue = RequestQueue(max_requests=4, max_tokens=40)
    async with (
        served(app_for(model, queue=queue)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):

        def ask(**body: Any) -> asyncio.Task[httpx.Response]:
            return asyncio.ensure_future(client.post(PATH, json={"prompt": "aa", "max_tokens": 2} | body))

        yield ask


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("waiting", "more"),
    [
        ({"n": 4}, {}),
        ({"n": 2}, {"n": 3}),
        ({"prompt": ["a"] * 3}, {"prompt": ["a", "b"]}),
        ({"prompt": "a" * 30}, {"prompt": "a" * 10}),
        ({"prompt": "a" * 90}, {}),
        ({"prompt": ["a"] * 9}, {}),
    ],
)
async def test_what_does_not_fit_is_refused_until_there_is_room(
    held: Callable[..., Any], engine: ScriptedEngine, waiting: dict[str, Any], more: dict[str, Any], stream: bool
) -> None:
    first = held(**waiting, stream=stream)
    await until(lambda: engine.running > 0, within_s=5.0)
    running = engine.running
    refused = await held(**more, stream=stream)
    assert_error(refused, 429, "The queue is full", "--max-num-queued-reqs", "number")
    assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["retry-after"]) > 0
    assert engine.running == running
    first.cancel()
    await until(lambda: engine.running == 0, within_s=5.0)
    engine.step_s = 0.0
    assert (await held(**more, stream=stream)).status_code == 200


async def test_requests_that_have_a_token_wait_no_more(held: Callable[..., Any], engine: ScriptedEngine) -> None:
    engine.step_s = 0.05
    first = held(n=4, max_tokens=60, ignore_eos=True)
    await until(lambda: engine.num_steps >= 4, within_s=5.0)
    assert (await held(n=4)).status_code == 200
    assert not first.done()
    assert (await first).status_code == 200


@pytest.mark.parametrize("failing", ["fail_after", "die_after"])
async def test_failed_requests_leave(held: Callable[..., Any], engine: ScriptedEngine, failing: str) -> None:
    engine.step_s = 0.0
    setattr(engine, failing, 0)
    for _ in range(3):
        assert (await held(n=4)).status_code >= 500
    setattr(engine, failing, None)
    assert (await held(n=4)).status_code == 200
