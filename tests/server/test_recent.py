"""`GET /ingle/requests`: the last requests with their times, and nothing of what they say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import httpx
import pytest

from ingle.config.access import ApiKey

from .fakes import MODEL, ScriptedEngine, assert_error, until

pytestmark = pytest.mark.anyio

ASK = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 5}


async def test_what_ran_and_what_runs(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    assert (await client.get("/ingle/requests")).json() == {"running": [], "ended": []}
    await client.get("/v1/models")
    await client.post("/v1/chat/completions", json=ASK)
    engine.step_s = 0.02
    running = asyncio.create_task(client.post("/v1/chat/completions", json={**ASK, "max_tokens": 20}))
    await until(lambda: engine.running > 0, 30)
    told = await client.get("/ingle/requests")
    assert "secret" not in told.text and told.headers["cache-control"] == "no-store"
    (now,), (before,) = told.json()["running"], told.json()["ended"]
    assert (now["status"], now["output_tokens"], now["model"]) == (None, None, MODEL) and now["duration_s"] > 0
    assert (before["status"], before["route"], before["output_tokens"]) == (200, "/v1/chat/completions", 5)
    assert before["prompt_tokens"] > 0 and 0 < before["ttft_s"] <= before["duration_s"]
    assert before["finish_reasons"] == ["length"] and abs(before["started"] - time.time()) < 60
    assert (await running).status_code == 200
    ended = (await client.get("/ingle/requests")).json()
    assert not ended["running"] and [each["output_tokens"] for each in ended["ended"]] == [20, 5], "the newest first"


async def test_only_the_last_are_kept(client: httpx.AsyncClient) -> None:
    for _ in range(105):
        await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 0, "echo": True})
    assert len((await client.get("/ingle/requests")).json()["ended"]) == 100


async def test_it_takes_what_metrics_take(make_client: Callable[..., httpx.AsyncClient]) -> None:
    client = make_client(api_keys=(ApiKey("a", "alice"), ApiKey("root", "root", is_admin=True)))
    assert (await client.get("/ingle/requests")).status_code == 401
    assert_error(await client.get("/ingle/requests", headers={"x-api-key": "a"}), 403, "administrator")
    await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"x-api-key": "a"})
    told = (await client.get("/ingle/requests", headers={"x-api-key": "root"})).json()
    assert [each["client"] for each in told["ended"]] == ["alice"]
