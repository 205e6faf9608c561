"""Requests end at their deadline, whoever sets it, and the largest when memory gives out: with words in the protocol's
own shape, and out of the engine at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI

from ingle.errors import RequestError
from ingle.limits import LimitsConfig
from ingle.server.ending import AnswersMemory, Ending
from ingle.server.models import ServedModel

from .fakes import ScriptedEngine, app_for, client_of, events, until

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "a", "max_tokens": 200, "ignore_eos": True},
    CHAT: {"messages": HI, "max_tokens": 200, "ignore_eos": True},
    MESSAGES: {"model": "alias", "messages": HI, "max_tokens": 200},
    RESPONSES: {"model": "alias", "input": "Hi", "max_output_tokens": 200},
}


@pytest.fixture
def slow(engine: ScriptedEngine) -> ScriptedEngine:
    """A token now and then, without end."""
    engine.step_s = 0.02
    engine.reply = lambda request: [50]
    return engine


@pytest.mark.parametrize("path", BODIES)
async def test_a_plain_answer(client: httpx.AsyncClient, slow: ScriptedEngine, path: str) -> None:
    response = await client.post(path, json=BODIES[path] | {"timeout": 0.2})
    assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    told = response.json()
    assert "timeout of 0.2 s ran out before its answer was whole" in told["error"]["message"]
    if path == MESSAGES:
        assert told["type"] == "error" and told["error"]["type"] == "timeout_error"
    else:
        assert told["error"]["code"] == "request_timeout"
    assert slow.aborted == [slow.requests[0].id] and slow.running == 0


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream(client: httpx.AsyncClient, slow: ScriptedEngine, path: str, n: int) -> None:
    more = {"n": n} if path in (COMPLETIONS, CHAT) else {}
    response = await client.post(path, json=BODIES[path] | {"timeout": 0.3, "stream": True} | more)
    assert response.status_code == 200
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    told = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len(told) > 3
    last = told[-1]
    message = last["message"] if path == RESPONSES else last["error"]["message"]
    assert "timeout of 0.3 s ran out before its answer was whole" in message
    if path == MESSAGES:
        assert last["type"] == "error" and last["error"]["type"] == "timeout_error"
    elif path == RESPONSES:
        assert told[-2]["type"] == "response.failed" and last["code"] == "request_timeout"
    else:
        assert last["error"]["code"] == "request_timeout"
    assert slow.running == 0 and len(slow.aborted) == len(slow.requests)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_that_waits_says_so(
    client: httpx.AsyncClient, model: ServedModel, engine: ScriptedEngine, stream: bool
) -> None:
    engine.step_s = 60.0
    response = await client.post(COMPLETIONS, json={"prompt": "a", "timeout": 0.2, "stream": stream})
    assert "while it waited for its first token" in response.text
    assert response.status_code == (200 if stream else 504)
    assert engine.running == 0 and model.queue.num_requests == 0 and model.queue.num_tokens == 0


async def test_the_servers_own_timeout(make_client: Callable[..., httpx.AsyncClient], slow: ScriptedEngine) -> None:
    client = make_client(limits=LimitsConfig(request_timeout=0.3))
    for asked in ({}, {"timeout": 100}):
        response = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | asked)
        assert response.status_code == 504 and "0.3 s" in response.text and "--request-timeout" in response.text
    response = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"timeout": 0.1})
    assert "timeout of 0.1 s" in response.text and "--request-timeout" not in response.text


@pytest.mark.parametrize("header", ["x-stainless-read-timeout", "x-stainless-timeout"])
async def test_a_client_that_says_when_it_leaves(client: httpx.AsyncClient, slow: ScriptedEngine, header: str) -> None:
    response = await client.post(COMPLETIONS, json=BODIES[COMPLETIONS], headers={header: "0.2"})
    assert response.status_code == 504 and "timeout of 0.2 s" in response.text
    body = BODIES[COMPLETIONS] | {"max_tokens": 20, "stream": True}
    streamed = await client.post(COMPLETIONS, json=body, headers={header: "0.2"})
    assert events(streamed)[-1] == "[DONE]"  # it waits for so long between two pieces
    for nonsense in ("None", "nan", "-1", "1e400", "\xff"):
        body = {"prompt": "a", "max_tokens": 1}
        assert (await client.post(COMPLETIONS, json=body, headers={header: nonsense.encode("latin-1")})).is_success


@pytest.mark.parametrize("timeout", [0, -1, "1", True, 10**9])
async def test_what_is_no_time(client: httpx.AsyncClient, timeout: Any) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "a", "timeout": timeout})
    assert response.status_code == 400 and response.json()["error"]["param"] == "timeout"


async def test_openai_client_asks_once(client: httpx.AsyncClient, slow: ScriptedEngine) -> None:
    openai = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="x", http_client=client)
    with pytest.raises(APIStatusError, match="ran out") as error:
        await openai.completions.create(model="alias", prompt="a", max_tokens=200, extra_body={"timeout": 0.2})
    assert error.value.status_code == 504 and error.value.code == "request_timeout"
    assert len(slow.requests) == 1


async def test_texts_end_too(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.step_s = 60.0
    response = await client.post("/v1/embeddings", json={"input": ["a", "b"], "timeout": 0.2})
    assert response.status_code == 504 and engine.running == 0 and len(engine.aborted) == len(engine.requests)


async def test_an_answer_in_time_is_not_ended(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "a", "timeout": 30, "max_tokens": 2})
    assert response.status_code == 200 and not engine.aborted


# ---- memory


async def test_the_largest_is_ended_when_memory_gives_out(
    make_client: Callable[..., httpx.AsyncClient], slow: ScriptedEngine
) -> None:
    client = make_client(limits=LimitsConfig(max_answers_bytes=1 << 20))
    slow.step_s, slow.tokens_per_step = 0.005, 2
    small = asyncio.ensure_future(client.post(COMPLETIONS, json=BODIES[COMPLETIONS] | {"max_tokens": 150}))
    large = await client.post(CHAT, json=BODIES[CHAT] | {"n": 24, "logprobs": True, "top_logprobs": 20})
    assert large.status_code == 400 and large.json()["error"]["code"] == "answer_too_large"
    assert "--max-answers-bytes" in large.json()["error"]["message"]
    assert (await small).status_code == 200
    await until(lambda: slow.running == 0, within_s=5.0)
    assert client._transport.app.state.answers.num_bytes == 0  # type: ignore[attr-defined]


async def test_accounts_come_to_nothing() -> None:
    memory, ended = AnswersMemory(1000), []

    async def hold(num_bytes: int) -> None:
        ending = Ending()
        account = memory.account(ending)
        try:
            with ending:
                account.add(num_bytes)
                await asyncio.sleep(0.2)
                account.add(1)
        except RequestError as error:
            ended.append((num_bytes, error.status))
        finally:
            account.close()

    await asyncio.gather(*map(hold, [450, 100, 400, 200]))
    assert ended == [(450, 503)] and memory.num_bytes == 0
    await hold(1001)
    assert ended[1:] == [(1001, 400)] and memory.num_bytes == 0


async def test_a_task_that_is_cancelled_for_another_reason_stays_so() -> None:
    ending = Ending()

    async def work() -> None:
        with ending:
            await asyncio.sleep(60)

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    ending.end(RequestError("late"))
    with pytest.raises(RequestError, match="late"), ending:
        pass


@pytest.fixture
def client(model: ServedModel) -> httpx.AsyncClient:
    return client_of(app_for(model))
