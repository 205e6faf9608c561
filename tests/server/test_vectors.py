"""`/v1/embeddings`, `/v1/rerank` and `/v1/score`, on tiny models that run."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from ingle.server.models import ServedModel
from tests.vectors import QUERY, save_embedding_model, save_reranker, tokenizer

from .direct import DirectEngine, direct_model
from .fakes import app_for, assert_error, client_of, served, until

pytestmark = pytest.mark.anyio
TEXTS = ["The quick brown fox", "jumps", "你好"]


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return direct_model(save_embedding_model(tmp_path_factory.mktemp("embedding")), max_model_len=64)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return direct_model(save_reranker(tmp_path_factory.mktemp("reranker")), max_model_len=512)


@pytest.fixture
def client(embedding_model: ServedModel) -> httpx.AsyncClient:
    return client_of(app_for(embedding_model))


@pytest.fixture
def ranking(reranker: ServedModel) -> httpx.AsyncClient:
    return client_of(app_for(reranker))


@pytest.fixture
async def sdk(embedding_model: ServedModel) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(app_for(embedding_model)) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as sdk,
    ):
        yield sdk


async def embed(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/embeddings", json={"model": "tiny", **body})


async def vectors(client: httpx.AsyncClient, **body: Any) -> np.ndarray:
    response = await embed(client, **body)
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]])


async def test_the_official_client(sdk: openai.AsyncOpenAI) -> None:
    """It asks for base64 by itself."""
    many = await sdk.embeddings.create(model="tiny", input=TEXTS)
    floats = await sdk.embeddings.create(model="tiny", input=TEXTS, encoding_format="float", user="me")
    assert [entry.index for entry in many.data] == [0, 1, 2] and many.object == "list" and many.model == "tiny"
    np.testing.assert_allclose([e.embedding for e in many.data], [e.embedding for e in floats.data], rtol=1e-6)
    count = sum(len(tokenizer(end=True).encode(text).ids) for text in TEXTS)
    assert (many.usage.prompt_tokens, many.usage.total_tokens) == (count, count)
    short = await sdk.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8)
    assert len(short.data[0].embedding) == 8 and abs(np.linalg.norm(short.data[0].embedding) - 1) < 1e-5
    ids = await sdk.embeddings.create(model="tiny", input=[tokenizer(end=True).encode(t).ids for t in TEXTS])
    np.testing.assert_allclose([e.embedding for e in ids.data], [e.embedding for e in many.data], rtol=1e-6)
    with pytest.raises(openai.BadRequestError, match="dimensions must be from 1 to 64, got 65"):
        await sdk.embeddings.create(model="tiny", input="x", dimensions=65)


async def test_texts_share_steps_and_order(client: httpx.AsyncClient) -> None:
    together = await vectors(client, input=TEXTS * 5)
    alone = np.concatenate([await vectors(client, input=text) for text in TEXTS])
    np.testing.assert_allclose(together, np.concatenate([alone] * 5), rtol=1e-4, atol=1e-5)


async def test_base64_is_little_endian_float32(client: httpx.AsyncClient) -> None:
    (entry,) = (await embed(client, input="x", encoding_format="base64")).json()["data"]
    floats = await vectors(client, input="x")
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4"), floats[0].astype("f4"))


async def test_the_fields_of_vllm(client: httpx.AsyncClient) -> None:
    plain = await vectors(client, input="x", normalize=False)
    assert np.linalg.norm(plain) > 1.5
    np.testing.assert_allclose(await vectors(client, input="x", use_activation=False), plain)
    asked = await vectors(client, input="x", prompt_name="query")
    np.testing.assert_allclose(asked, await vectors(client, input=QUERY + "x"))
    long = "ab " * 300
    response = await embed(client, input=["x", long])
    assert_error(response, 400, "up to 64 tokens, but input[1] has", param="input[1]")
    response = await embed(client, input=long, truncate_prompt_tokens=-1)
    assert response.json()["usage"]["prompt_tokens"] == 64
    last = tokenizer(end=True).encode(f"{long}x y").ids[-4:]
    left = await vectors(client, input=f"{long}x y", truncate_prompt_tokens=4, truncation_side="left")
    np.testing.assert_allclose(left, await vectors(client, input=last), rtol=1e-4, atol=1e-5)
    bare = await embed(client, input="x", add_special_tokens=False)
    assert bare.json()["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "parts", "param"),
    [
        ({}, ["input is required"], "input"),
        ({"input": []}, ["must be a string", "got an empty list"], "input"),
        ({"input": [[]]}, ["input is empty"], "input"),
        ({"input": ["x"] * 2049}, ["has 2049 texts, at most 2048"], "input"),
        ({"input": [99999]}, ["token id 99999 is not in the model's vocabulary"], "input"),
        ({"input": "x", "encoding_format": "int8"}, ["encoding_format"], "encoding_format"),
        ({"input": "x", "dimensions": 0}, ["dimensions"], "dimensions"),
        ({"input": "x", "prompt_name": "no"}, ["it has query, document"], "prompt_name"),
        ({"input": "x", "truncate_prompt_tokens": 65}, ["from 1 to 64, or -1"], "truncate_prompt_tokens"),
        ({"input": "x", "normalize": True, "use_activation": False}, ["differ"], "normalize"),
    ],
    ids=str,
)
async def test_refusals(client: httpx.AsyncClient, body: dict[str, Any], parts: list[str], param: str) -> None:
    assert_error(await embed(client, **body), 400, *parts, param=param)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/rerank", {"query": "x", "documents": ["y"]}),
    ],
)
async def test_an_embedding_model_does_nothing_else(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    error = assert_error(await client.post(path, json=body), 400, "model")
    assert error["code"] == "model_not_supported"


async def test_a_client_that_leaves(embedding_model: ServedModel) -> None:
    engine = embedding_model.engine
    assert isinstance(engine, DirectEngine)
    step, held = engine.engine.step, asyncio.Event()

    def slow_step() -> Any:
        held.set()
        return [] if not engine.aborted else step()

    engine.engine.step = slow_step  # type: ignore[method-assign]
    try:
        async with served(app_for(embedding_model)) as port:
            client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}")
            asking = asyncio.create_task(embed(client, input=TEXTS))
            await held.wait()
            asking.cancel()
            await client.aclose()
            await until(lambda: len(engine.aborted) == 3, within_s=5.0)
    finally:
        del engine.engine.step  # type: ignore[method-assign]
        engine.aborted.clear()
    assert not engine.engine.has_work


# ---- rerankers


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
async def test_rerank(ranking: httpx.AsyncClient, path: str) -> None:
    body = {"model": "tiny", "query": "fox", "documents": TEXTS}
    answer = (await ranking.post(path, json=body)).json()
    results = answer["results"]
    assert sorted(entry["index"] for entry in results) == [0, 1, 2]
    scores = [entry["relevance_score"] for entry in results]
    assert scores == sorted(scores, reverse=True) and all(0 < score < 1 for score in scores)
    assert all(entry["document"] == {"text": TEXTS[entry["index"]]} for entry in results)
    assert answer["usage"]["total_tokens"] > 100 and answer["model"] == "tiny"
    best = (await ranking.post(path, json={**body, "top_n": 1, "return_documents": False})).json()["results"]
    assert best == [{"index": results[0]["index"], "relevance_score": pytest.approx(scores[0])}]
    objects = {**body, "query": {"text": "fox"}, "documents": [{"text": text} for text in TEXTS]}
    assert [entry["index"] for entry in (await ranking.post(path, json=objects)).json()["results"]] == [
        entry["index"] for entry in results
    ]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_score(ranking: httpx.AsyncClient, path: str) -> None:
    answer = (await ranking.post(path, json={"text_1": "fox", "text_2": TEXTS})).json()
    ranked = (await ranking.post("/rerank", json={"query": "fox", "documents": TEXTS})).json()["results"]
    assert {e["index"]: e["score"] for e in answer["data"]} == pytest.approx(
        {e["index"]: e["relevance_score"] for e in ranked}
    )
    pairs = (await ranking.post(path, json={"queries": ["fox"] * 3, "documents": TEXTS})).json()
    assert [e["score"] for e in pairs["data"]] == pytest.approx([e["score"] for e in answer["data"]])


@pytest.mark.parametrize(
    ("path", "body", "parts", "param"),
    [
        ("/v1/rerank", {"documents": ["x"]}, ["query is required"], "query"),
        ("/v1/rerank", {"query": 1, "documents": ["x"]}, ["must be a text", "got 1"], "query"),
        ("/v1/rerank", {"query": "x", "documents": []}, ["got an empty list"], "documents"),
        ("/v1/rerank", {"query": "x", "documents": [{"title": "y"}]}, ["must be a list of texts"], "documents"),
        ("/v1/rerank", {"query": "x", "documents": ["y"] * 2049}, ["at most 2048"], "documents"),
        ("/v1/rerank", {"query": "x", "documents": ["ab " * 900]}, ["up to 512 tokens"], "documents[0]"),
        ("/v1/score", {"text_1": "x"}, ["text_2 or documents is required"], "text_2"),
        ("/v1/score", {"text_1": ["x", "y"], "text_2": ["z"]}, ["has 2 texts for 1"], "text_1"),
    ],
    ids=str,
)
async def test_rankings_that_are_refused(
    ranking: httpx.AsyncClient, path: str, body: dict[str, Any], parts: list[str], param: str
) -> None:
    assert_error(await ranking.post(path, json=body), 400, *parts, param=param)


async def test_documents_that_are_cut(ranking: httpx.AsyncClient) -> None:
    body = {"query": "x", "documents": ["ab " * 900]}
    whole = (await ranking.post("/rerank", json={**body, "truncate_prompt_tokens": -1})).json()
    assert whole["usage"]["total_tokens"] == 512
    short = (await ranking.post("/rerank", json={**body, "max_tokens_per_doc": 4})).json()
    assert short["usage"]["total_tokens"] < 512
