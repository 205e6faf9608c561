"""What vLLM and llama.cpp add to the API: token ids, progress, usage so far, /tokenize, /detokenize, …/render."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from ingle.config.access import ApiKey
from ingle.request import EngineOutput, EngineRequest
from ingle.server import streaming
from ingle.text.tokenizer import Tokenizer

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, ScriptedEngine, assert_error, events

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 100},
    "/v1/chat/completions": {"messages": HI},
}
both = pytest.mark.parametrize("path", BODIES)


async def post(client: httpx.AsyncClient, path: str, **extra: Any) -> httpx.Response:
    response = await client.post(path, json=BODIES.get(path, {}) | extra)
    assert response.status_code == 200, response.text
    return response


@both
async def test_token_ids_are_the_same_streamed_and_plain(
    client: httpx.AsyncClient, engine: ScriptedEngine, path: str
) -> None:
    engine.tokens_per_step = 3
    whole = (await post(client, path, return_token_ids=True)).json()
    chunks = events(await post(client, path, return_token_ids=True, stream=True))[:-1]
    choice = whole["choices"][0]
    prompt = whole.get("prompt_token_ids") or choice.get("prompt_token_ids")
    assert prompt == list(engine.requests[0].prompt_token_ids)
    assert choice["token_ids"] == list(engine.reply(engine.requests[0]))
    streamed = [token for chunk in chunks for c in chunk["choices"] for token in c.get("token_ids", [])]
    assert streamed == choice["token_ids"]
    places = [*chunks, *(c for chunk in chunks for c in chunk["choices"])]
    assert [place["prompt_token_ids"] for place in places if "prompt_token_ids" in place] == [prompt]
    assert "token_ids" not in (await post(client, path)).text


@both
async def test_tokens_of_logprobs_as_ids(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    asked = {"logprobs": 1} if path == "/v1/completions" else {"logprobs": True, "top_logprobs": 1}
    answer = (await post(client, path, return_tokens_as_token_ids=True, **asked)).json()
    scored = answer["choices"][0]["logprobs"]
    names = scored.get("tokens") or [entry["token"] for entry in scored["content"]]
    assert names == [f"token_id:{token_id}" for token_id in engine.reply(engine.requests[0])]


@both
async def test_usage_so_far(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    engine.tokens_per_step = 4
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    chunks = events(await post(client, path, stream=True, stream_options=options))[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[0] <= 4 and counts[-1] == len(GREETING.encode()) + 1
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {chunks[-1]["usage"]["prompt_tokens"]}
    assert chunks[-2]["usage"] == chunks[-1]["usage"]
    plain = events(await post(client, path, stream=True, stream_options={"include_usage": True}))[:-1]
    assert [chunk["usage"] for chunk in plain[:-1]] == [None] * (len(plain) - 1)


@both
async def test_progress_of_the_prompt(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    plain = engine.generate

    async def generate(request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if request.return_progress:
            for read in (1, 2):
                yield EngineOutput(request.id, [], num_cached_tokens=1, num_prompt_read=read)
        async for output in plain(request):
            yield output

    engine.generate = generate  # type: ignore[method-assign]
    chunks = events(await post(client, path, stream=True, return_progress=True))[:-1]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [(each["processed"], each["cache"]) for each in told] == [(1, 1), (2, 1)]
    assert {each["total"] for each in told} == {len(engine.requests[0].prompt_token_ids)}
    assert all(not chunk["choices"] for chunk in chunks[:2])
    for extra in ({"stream": True}, {"return_progress": True}):
        assert "prompt_progress" not in (await post(client, path, **extra)).text


@both
async def test_a_client_may_name_its_request(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    answers = [(await post(client, path, request_id="mine")).json()["id"] for _ in range(2)]
    assert answers == [("cmpl" if path == "/v1/completions" else "chatcmpl") + "-mine"] * 2
    assert len({request.id for request in engine.requests}) == 2


@both
async def test_fields_of_the_engine(client: httpx.AsyncClient, engine: ScriptedEngine, path: str) -> None:
    extra = {"priority": -5, "cache_salt": "s", "allowed_token_ids": [5, 6], "bad_words": ["no"], "repeat_penalty": 1.5}
    await post(client, path, **extra)
    request = engine.requests[-1]
    no, spaced = (tuple(engine.tokenizer.encode(text, add_special_tokens=False)) for text in ("no", " no"))
    assert (request.priority, request.cache_salt) == (-5, "s")
    assert request.sampling.allowed_token_ids == (5, 6) and request.sampling.bad_token_ids == (no, spaced)
    assert request.sampling.repetition_penalty == 1.5
    both_given = await post(client, path, repeat_penalty=1.5, repetition_penalty=1.25)
    assert engine.requests[-1].sampling.repetition_penalty == 1.25
    assert "x-ingle-ignored-fields" not in both_given.headers


async def test_a_prompt_is_cut_to_its_end(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    ids = list(range(2, 2 + MAX_MODEL_LEN - 10))
    for wanted, most in ((3, 3), (10_000, len(ids)), (-1, MAX_MODEL_LEN - 50)):
        await post(client, "/v1/completions", prompt=ids, truncate_prompt_tokens=wanted, max_tokens=50)
        assert list(engine.requests[-1].prompt_token_ids) == ids[-most:]
    body = {"prompt": "a", "echo": True, "truncate_prompt_tokens": 1}
    assert_error(await client.post("/v1/completions", json=body), 400, "echo returns", param="echo")
    body = {"prompt": "a", "truncate_prompt_tokens": 0}
    assert_error(await client.post("/v1/completions", json=body), 400, "empty", param="prompt")


@both
async def test_comments_keep_a_silent_stream_alive_until_its_first_token(
    client: httpx.AsyncClient, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
    expected = (await post(client, path, stream=True)).text.partition("choices")[2]
    plain = engine.generate

    async def generate(request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        await asyncio.sleep(0.08)
        async for output in plain(request):
            yield output

    engine.generate = generate  # type: ignore[method-assign]
    text = (await post(client, path, stream=True)).text
    comments, _, rest = text.partition("data: ")
    assert 2 <= comments.count(": keep-alive\n\n") <= 8 and not comments.replace(": keep-alive\n\n", "")
    assert ": keep-alive" not in rest and len(rest.partition("choices")[2]) == len(expected)


# ---- /tokenize, /detokenize, /render


async def test_tokenize_a_text(client: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
    answer = (await post(client, "/tokenize", prompt="é", return_token_strs=True)).json()
    assert answer == {
        "count": 3, "max_model_len": MAX_MODEL_LEN, "tokens": tokenizer.encode("é"), "token_strs": ["<s>", "Ã", "©"],
    }  # fmt: skip
    bare = (await post(client, "/tokenize", prompt="é", add_special_tokens=False, model="alias")).json()
    assert bare["count"] == 2 and bare["token_strs"] is None
    assert (await post(client, "/tokenize", prompt="", add_special_tokens=False)).json()["tokens"] == []
    back = (await post(client, "/detokenize", tokens=answer["tokens"])).json()
    assert back == {"prompt": "<s>é"}


async def test_tokenize_a_conversation_as_it_is_sent(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    chat = {"messages": HI, "chat_template_kwargs": {"shout": True}, "temperature": 0, "stream": True}
    await client.post("/v1/chat/completions", json=chat)
    tokens = (await post(client, "/tokenize", **chat)).json()["tokens"]
    assert tokens == list(engine.requests[-1].prompt_token_ids)
    shorter = (await post(client, "/tokenize", **chat, add_generation_prompt=False)).json()["tokens"]
    assert tokens[: len(shorter)] == shorter and len(shorter) < len(tokens)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a" * 10**6}, 400, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, 400, "tokens"),
        ("/detokenize", {"tokens": None}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/v1/chat/completions/render", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/v1/completions/render", {"prompt": "x" * 300}, 400, "prompt"),
    ],
)
async def test_what_cannot_be_told_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    assert_error(await client.post(path, json=body), status, param=param)


async def test_a_rendered_request_is_what_the_engine_is_asked(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    for path, body in BODIES.items():
        for extra in ({}, {"temperature": 0.5, "seed": 3, "stop": ["x"], "truncate_prompt_tokens": 2, "foo": 1}):
            rendered = await client.post(f"{path}/render", json=body | extra)
            assert ("x-ingle-ignored-fields" in rendered.headers) == bool(extra)
            await client.post(path, json=body | extra)
            told, request = rendered.json(), engine.requests[-1]
            (prompt,) = told["prompts"]
            assert prompt["prompt_token_ids"] == list(request.prompt_token_ids)
            assert prompt["count"] == len(request.prompt_token_ids)
            assert prompt["prompt"] == engine.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
            assert told["model"] == MODEL and set(extra.get("stop", [])) <= {*told["stop"]}
            asked = msgspec.json.decode(msgspec.json.encode(request.sampling))
            assert {name: told["sampling"][name] for name in asked} == asked
    assert len(engine.requests) == 4


async def test_several_prompts_are_rendered_in_order(client: httpx.AsyncClient) -> None:
    answer = (await client.post("/v1/completions/render", json={"prompt": [[66, 67], [68]], "n": 2})).json()
    assert [prompt["prompt_token_ids"] for prompt in answer["prompts"]] == [[66, 67], [68]]
    assert answer["sampling"]["n"] == 2


async def test_pings(client: httpx.AsyncClient, make_client: Callable[..., httpx.AsyncClient]) -> None:
    assert (await client.head("/")).status_code == 200
    guarded = make_client(api_keys=("key",))
    assert (await guarded.get("/ping")).json() == (await client.get("/health")).json()
    assert (await guarded.post("/tokenize", json={"prompt": "a"})).status_code == 401


@both
async def test_the_engine_is_told_whose_a_request_is(
    make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine, path: str
) -> None:
    guarded = make_client(api_keys=(ApiKey("k1", "ann"), ApiKey("k2", "bob")))
    for key in ("k1", "k2", "k1"):
        guarded.headers["Authorization"] = f"Bearer {key}"
        assert (await post(guarded, path)).status_code == 200
    assert engine.callers == ["ann", "bob", "ann"]
