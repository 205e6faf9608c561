"""Several models in one pool: each request goes to the engine of the model that it names."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import httpx
import pytest

from ingle.server.access import Access
from ingle.server.app import create_app
from ingle.server.models import ModelPool, ServedModel
from ingle.server.queue import RequestQueue
from ingle.text.tokenizer import Tokenizer

from .fakes import MODEL, Info, ScriptedEngine, assert_error, client_of, until

pytestmark = pytest.mark.anyio

OTHER = "other/model"


@pytest.fixture
def other(tokenizer: Tokenizer) -> ScriptedEngine:
    engine = ScriptedEngine(tokenizer, Info(64, tokenizer.vocab_size), lambda request: ())
    engine.say("from the other one")
    return engine


@pytest.fixture
def client(model: ServedModel, other: ScriptedEngine) -> httpx.AsyncClient:
    second = replace(model, engine=other, names=(OTHER,), root="/models/other", queue=RequestQueue(max_requests=1))
    return client_of(create_app(ModelPool([model, second]), Access()))


async def complete(client: httpx.AsyncClient, **body: object) -> httpx.Response:
    return await client.post("/v1/completions", json={"prompt": "a"} | body)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_goes_to_the_model_that_it_names(
    client: httpx.AsyncClient, engine: ScriptedEngine, other: ScriptedEngine, stream: bool
) -> None:
    for name, answered in ((None, MODEL), (MODEL, MODEL), ("alias", MODEL), (OTHER, OTHER)):
        response = await complete(client, model=name, stream=stream)
        assert response.status_code == 200 and f'"model":"{answered}"' in response.text
    assert (len(engine.requests), len(other.requests)) == (3, 1)
    assert_error(await complete(client, model="none"), 404, f"{MODEL}, alias, {OTHER}", param="model")


async def test_limits_are_those_of_the_model(client: httpx.AsyncClient) -> None:
    assert (await complete(client, prompt="a" * 100)).status_code == 200
    assert_error(await complete(client, model=OTHER, prompt="a" * 100), 400, "length is 64 tokens", param="prompt")


async def test_all_models_are_listed(client: httpx.AsyncClient) -> None:
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["root"], card["max_model_len"]) for card in cards] == [
        (MODEL, "/models/tiny", 256),
        ("alias", "/models/tiny", 256),
        (OTHER, "/models/other", 64),
    ]
    assert (await client.get(f"/v1/models/{OTHER}")).json()["root"] == "/models/other"


async def test_one_engine_that_is_unwell_leaves_the_others_alone(
    client: httpx.AsyncClient, engine: ScriptedEngine, other: ScriptedEngine
) -> None:
    other.status.ok, other.status.detail = False, "the other engine died"
    assert_error(await complete(client, model=OTHER), 503, "the other engine died")
    assert (await complete(client)).status_code == 200
    health = await client.get("/health")
    assert (health.status_code, health.json()["detail"]) == (503, "the other engine died")
    engine.status.ok, engine.status.detail = False, "all died"
    assert_error(await complete(client, model="not even looked at"), 503, "all died")


async def test_each_model_has_its_queue(client: httpx.AsyncClient, other: ScriptedEngine) -> None:
    other.step_s = 60.0
    waiting = asyncio.ensure_future(complete(client, model=OTHER))
    await until(lambda: other.running > 0, within_s=5.0)
    assert_error(await complete(client, model=OTHER), 429, "The queue is full")
    assert (await complete(client)).status_code == 200
    waiting.cancel()
