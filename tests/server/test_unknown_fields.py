"""Fields that nobody knows: ignored and named, or refused where the server is strict; at every depth."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ingle.server import middleware
from ingle.server.body import StrictModel, UnknownFields, parse_body
from ingle.server.openai.protocol import CompletionRequest

from .fakes import ScriptedEngine, assert_error, events

pytestmark = pytest.mark.anyio

HEADER = "x-ingle-ignored-fields"
CHAT = "/v1/chat/completions"


def message(**more: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": "a"}], **more}


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"foo": 1}, "foo", "foo"),
    ({"foo\nbar": None}, "foo\nbar", "foo%0Abar"),
    ({"stream": True, "stream_options": {"x": {"y": 1}}}, "stream_options.x", "stream_options.x"),
    ({"messages": [message(), message(mood=1)]}, "messages[1].mood", "messages[].mood"),
    (
        {"messages": [message(content=[{"type": "text", "text": "a", "tint": []}])]},
        "messages[0].content[0].tint",
        "messages[].content[].tint",
    ),
]


@pytest.mark.parametrize(("extra", "param", "shown"), CASES)
async def test_it_is_named_at_every_depth(
    client: httpx.AsyncClient,
    make_client: Callable[..., httpx.AsyncClient],
    extra: dict[str, Any],
    param: str,
    shown: str,
) -> None:
    body = {"messages": [message()]} | extra
    ignored = await client.post(CHAT, json=body)
    assert ignored.status_code == 200 and ignored.headers[HEADER] == shown
    error = assert_error(await make_client(strict_fields=True).post(CHAT, json=body), 400, param=param)
    assert error["code"] == "unknown_argument"
    assert error["message"] == "Unrecognized request argument: " + " ".join(param.split())


async def test_it_changes_nothing(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for stream in (False, True):
        plain = {"prompt": "a", "stream": stream, "max_tokens": 3, "temperature": 0}
        first = await client.post("/v1/completions", json=plain)
        second = await client.post("/v1/completions", json=plain | {"mood": "high"})
        assert HEADER not in first.headers and second.headers[HEADER] == "mood"
        assert engine.requests[-1].sampling == engine.requests[-2].sampling
        if stream:
            assert [e["choices"][0]["text"] for e in events(first)[:-1]] == [
                e["choices"][0]["text"] for e in events(second)[:-1]
            ]


async def test_the_log_names_each_once(client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    middleware._logged.clear()
    with caplog.at_level(logging.WARNING, "ingle.server"):
        for extra in ({"mood": 1}, {"mood": 2, "\x1b[31m": 1}, {"mood": 3}):
            await client.post("/v1/completions", json={"prompt": "a"} | extra)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "mood" in lines[0] and "--strict-fields" in lines[0]
    assert "mood" not in lines[1] and "\\x1b[31m" in lines[1]


async def test_a_client_that_makes_up_names_fills_nothing(client: httpx.AsyncClient) -> None:
    for start in range(0, 3000, 1000):
        many = {f"field{start + i}" + "x" * 500: i for i in range(1000)}
        response = await client.post("/v1/completions", json={"prompt": "a"} | many)
        assert response.status_code == 200
        assert response.headers[HEADER].count(",") == 16 and len(response.headers[HEADER]) < 2000
    assert len(middleware._logged) <= 2 * middleware._MAX_LOGGED


async def test_a_known_field_without_support_is_refused_all_the_same(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "mood": 1, "use_beam_search": True})
    error = assert_error(response, 400, "use_beam_search is not supported", param="use_beam_search")
    assert error["code"] == "unsupported_argument"


def test_deep_and_wide_bodies_are_looked_through() -> None:
    deep: Any = {"last": 1}
    for _ in range(400):
        deep = {"a": [deep]}
    unknown = UnknownFields()
    parse_body(CompletionRequest, json.dumps({"prompt": "a", "metadata": deep, "x": deep}).encode(), unknown)
    assert unknown.paths == ("x",)


def test_of_several_kinds_that_an_object_might_be_one_that_knows_a_field_is_enough() -> None:
    class First(StrictModel):
        a: int = 0

    class Second(StrictModel):
        a: int = 0
        b: int = 0

    class Either(StrictModel):
        items: list[First | Second] | list[Second | First]

    unknown = UnknownFields()
    parse_body(Either, b'{"items": [{"a": 1, "b": 2}, {"b": 1, "c": 2}]}', unknown)
    assert unknown.paths == ("items[].c",)
