"""Every dimension of a request has its limit: what is beyond is refused with the limit, the value and the flag."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from ingle.limits import LimitsConfig
from ingle.server.decode import depth_of
from ingle.server.models import ServedModel

from .fakes import ScriptedEngine, app_for, assert_error, client_of, served

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI = {"role": "user", "content": "Hi"}


def tool(name: str, description: str = "") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": description}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def schema(value: Any) -> dict[str, Any]:
    return {"structured_outputs": value}


BEYOND: dict[str, tuple[str, dict[str, Any], dict[str, Any], str | None, str]] = {
    "n": (COMPLETIONS, {"max_n": 2}, {"n": 3}, "n", "between 1 and 2 (--max-n), got 3"),
    "best_of": (COMPLETIONS, {"max_best_of": 2}, {"best_of": 3}, "best_of", "between 1 and 2 (--max-best-of), got 3"),
    "n of a chat": (CHAT, {"max_n": 2}, {"n": 3}, "n", "between 1 and 2 (--max-n), got 3"),
    "choices": (COMPLETIONS, {"max_choices": 3}, {"prompt": ["a", "b"], "n": 2}, "prompt", "4 choices, at most 3"),
    "prompts": (COMPLETIONS, {"max_prompts": 1}, {"prompt": ["a", "b"]}, "prompt", "2 prompts, at most 1 are"),
    "logprobs": (COMPLETIONS, {"max_logprobs": 2}, {"logprobs": 3}, "logprobs", "(--max-logprobs), got 3"),
    "top_logprobs": (
        CHAT, {"max_logprobs": 2}, {"logprobs": True, "top_logprobs": 3}, "top_logprobs", "(--max-logprobs), got 3",
    ),
    "top_logprobs of a response": (
        RESPONSES, {"max_logprobs": 2}, {"top_logprobs": 3}, "top_logprobs", "(--max-logprobs), got 3",
    ),
    "prompt_logprobs": (
        COMPLETIONS, {"max_prompt_logprobs": 2}, {"prompt_logprobs": 3}, "prompt_logprobs", "(--max-prompt-logprobs)",
    ),
    "10,000 stop strings": (
        COMPLETIONS, {}, {"stop": ["x"] * 10_000}, "stop", "10000 strings, at most 64 are taken (--max-stop-strings)",
    ),
    "long stop strings": (
        CHAT, {"max_stop_chars": 10}, {"stop": ["x" * 6] * 2}, "stop", "12 characters", ),
    "stop sequences": (
        MESSAGES, {}, {"stop_sequences": ["x"] * 10_000}, None, "at most 64 are taken (--max-stop-strings)",
    ),
    "bad words": (COMPLETIONS, {"max_bad_words": 1}, {"bad_words": ["a", "b"]}, "bad_words", "(--max-bad-words)"),
    "logit_bias": (COMPLETIONS, {"max_logit_bias": 1}, {"logit_bias": {"1": 1, "2": 1}}, "logit_bias", "2 entries"),
    "messages": (CHAT, {"max_messages": 2}, {"messages": [HI] * 3}, "messages", "3 messages, at most 2 are taken"),
    "messages of Anthropic's": (MESSAGES, {"max_messages": 2}, {"messages": [HI] * 3}, None, "(--max-messages)"),
    "items of a response": (RESPONSES, {"max_messages": 2}, {"input": [HI] * 3}, "input", "(--max-messages)"),
    "tools": (CHAT, {"max_tools": 1}, {"tools": [tool("a"), tool("b")]}, "tools", "2 tools, at most 1 are taken"),
    "size of tools": (
        CHAT, {"max_tools_bytes": 100}, {"tools": [tool("a", "x" * 100)]}, "tools", "at most 100 are taken (--max-tool",
    ),
    "size of tools of a response": (
        RESPONSES, {"max_tools_bytes": 100}, {"tools": [{"type": "function", "name": "x" * 100}]}, "tools",
        "(--max-tools-bytes)",
    ),
    "size of tools of Anthropic's": (
        MESSAGES, {"max_tools_bytes": 100}, {"tools": [{"name": "x" * 100, "input_schema": {}}]}, None,
        "(--max-tools-bytes)",
    ),
    "size of a schema": (
        CHAT, {"max_grammar_bytes": 50}, schema({"json": {"const": "x" * 60}}), "structured_outputs",
        "(--max-grammar-bytes)",
    ),
    "depth of a schema": (
        CHAT, {"max_schema_depth": 3}, schema({"json": {"enum": nested(5)}}), "structured_outputs",
        "at most 3 levels are taken (--max-schema-depth)",
    ),
    "choices of a grammar": (
        CHAT, {"max_grammar_choices": 1}, schema({"choice": ["a", "b"]}), "structured_outputs",
        "2 strings, at most 1 are taken (--max-grammar-choices)",
    ),
    "depth": (CHAT, {"max_json_depth": 8}, {"metadata": {"x": nested(8)}}, None, "at most 8 lists and objects"),
    "depth of 10,000": (CHAT, {}, {"metadata": {"x": nested(800)}}, None, "at most 128 lists and objects"),
    "size of a field": (
        CHAT, {"max_field_bytes": 1024}, {"metadata": {"x": "y" * 2000}}, "metadata", "(--max-field-bytes)",
    ),
    "tokens of a prompt": (
        COMPLETIONS, {"max_prompt_tokens": 5}, {"prompt": "aaaaaaaa"}, "prompt", "the prompt has 9 tokens, at most 5",
    ),
    "characters of a prompt": (
        COMPLETIONS, {"max_prompt_chars": 5}, {"prompt": "aaaaaaaa"}, "prompt", "8 characters, at most 5 are taken",
    ),
    "characters of a conversation": (
        CHAT, {"max_prompt_chars": 5}, {"messages": [HI] * 4}, "messages", "(--max-prompt-chars)",
    ),
    "tokens of all choices": (
        COMPLETIONS, {}, {"prompt": "a" * 30, "n": 2}, None, "62 tokens together, at most 40 are taken (--max-num-que",
    ),
}  # fmt: skip


def body_for(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    least: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "a"},
        CHAT: {"messages": [HI]},
        MESSAGES: {"model": "alias", "messages": [HI], "max_tokens": 5},
        RESPONSES: {"model": "alias", "input": "Hi"},
    }
    return least[path] | asked


@pytest.mark.parametrize("name", BEYOND)
async def test_what_is_beyond_a_limit_is_refused(
    model: ServedModel, engine: ScriptedEngine, tmp_path: Any, name: str
) -> None:
    from ingle.server.queue import RequestQueue

    path, flags, asked, param, message = BEYOND[name]
    app = app_for(model, limits=LimitsConfig(**flags), queue=RequestQueue(4096, 40))
    response = await client_of(app).post(path, json=body_for(path, asked))
    if path == MESSAGES:
        told = response.json()
        assert response.status_code == 400 and told["type"] == "error" and message in told["error"]["message"]
        assert told["error"]["type"] == "invalid_request_error"
    else:
        assert "--max-" in assert_error(response, 400, message, param=param)["message"]
    assert not engine.requests
    assert (await client_of(app_for(model)).post(path, json=body_for(path, {}))).status_code == 200


@pytest.mark.parametrize(
    ("path", "asked", "message"),
    [
        ("/v1/embeddings", {"input": ["a", "b", "c"]}, "3 texts, at most 2 are taken (--max-texts)"),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"]}, "3 texts, at most 2 are taken (--max-texts)"),
        ("/v1/score", {"text_1": "q", "text_2": ["a", "b", "c"]}, "3 texts, at most 2 are taken (--max-texts)"),
    ],
)
async def test_texts_are_counted(model: ServedModel, path: str, asked: dict[str, Any], message: str) -> None:
    response = await client_of(app_for(model, limits=LimitsConfig(max_texts=2))).post(path, json=asked)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


async def test_the_description_says_the_limits_of_this_server(model: ServedModel) -> None:
    app = app_for(model, limits=LimitsConfig(max_n=7, max_tools=3, max_stop_strings=5))
    told = (await client_of(app).get("/openapi.json")).json()
    chat = told["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert chat["n"]["anyOf"][0]["maximum"] == 7 and chat["tools"]["anyOf"][0]["maxItems"] == 3
    assert any(kind.get("maxItems") == 5 for kind in chat["stop"]["anyOf"])


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"1", 0), (b"[]", 1), (b"[[], [[]]]", 3), (b'{"a": {"b": [1]}}', 3), (b'"[[[["', 0), (rb'["\"[[[", []]', 2),
        (b'{"a[[": "\\\\", "b": [[1]]}', 3), (b"[" * 50_000 + b"]" * 50_000, 50_000),
    ],
)  # fmt: skip
def test_depth(text: bytes, depth: int) -> None:
    assert depth_of(text) == depth


def test_depth_across_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"a": [{"b": '\\"[{'}, [[["]]"]]]], "c": '"'}).encode()
    for size in range(1, 20):
        monkeypatch.setattr("ingle.server.decode._SLICE_BYTES", size)
        assert depth_of(text) == 5


@pytest.mark.parametrize(
    ("request_bytes", "status", "flag"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (1 << 20) + b"\r\n\r\n", 431, "--max-header-bytes"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 300 + b"\r\n", 431, "--max-header-count"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", 408, "--header-timeout"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{",
         408, "--body-timeout"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99999999"
         b"\r\n\r\n{", 413, "--max-body-bytes"),
    ],
)  # fmt: skip
async def test_connections_have_limits(model: ServedModel, request_bytes: bytes, status: int, flag: str) -> None:
    async with served(app_for(model), header_s=0.2, body_s=0.2) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 %d " % status) and flag.encode() in answer
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/health")).status_code == 200
