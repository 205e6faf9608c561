"""The `anthropic` package."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.clients.conftest import MODEL, Scripted
from tests.e2e.clients.test_openai import DEGREES
from tests.e2e.conftest import Server, start_server

anthropic = pytest.importorskip("anthropic")

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}
GREEDY: Any = {"extra_body": {"temperature": 0}}
"""Which the client no longer has a name for."""
HELLO = [{"role": "user", "content": "Say hello."}]


def client_of(url: str) -> Any:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)


def test_messages_whole_and_streamed(tiny_talker: Server) -> None:
    client = client_of(tiny_talker.url)
    options = {"model": MODEL, "max_tokens": 20, "messages": HELLO, "system": "Be brief.", **GREEDY}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        told = list(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].text == final.content[0].text == "".join(told) != ""
    assert (whole.stop_reason, whole.usage.output_tokens) == (final.stop_reason, final.usage.output_tokens)
    assert whole.stop_reason in ("end_turn", "max_tokens")
    counted = client.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief.")
    assert counted.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_has_to_be_called(tiny_talker: Server, choice: Any) -> None:
    answer = client_of(tiny_talker.url).messages.create(
        model=MODEL, max_tokens=200, messages=HELLO, tools=[WEATHER], tool_choice=choice, **GREEDY
    )
    calls = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use" and calls
    assert all(call.name == "get_weather" and len(call.input["city"]) <= 20 for call in calls)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("script", "last"), [("weather", "It is 18 degrees in Paris."), ("both", "18 in Paris, 7 in 北京.")]
)
def test_tools_in_a_loop(scripted: Scripted, script: str, last: str, streamed: bool) -> None:
    client = client_of(scripted.url)
    messages: list[Any] = [{"role": "user", "content": f"[script:{script}] How warm is it?"}]
    for _ in range(3):
        options = {"model": MODEL, "max_tokens": 500, "messages": messages, "tools": [WEATHER]}
        if streamed:
            with client.messages.stream(**options) as stream:
                answer = stream.get_final_message()
        else:
            answer = client.messages.create(**options)
        calls = [block for block in answer.content if block.type == "tool_use"]
        if not calls:
            break
        assert answer.stop_reason == "tool_use"
        messages.append({"role": "assistant", "content": answer.content})
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": DEGREES[call.input["city"]]} for call in calls
        ]
        messages.append({"role": "user", "content": results})
    assert (answer.content[-1].text, answer.stop_reason) == (last, "end_turn")


def test_thinking(scripted: Scripted) -> None:
    client = client_of(scripted.url)
    options: Any = {
        "model": MODEL,
        "max_tokens": 2000,
        "messages": [{"role": "user", "content": "[script:thinks] 2+2?"}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        final = stream.get_final_message()
    for answer in (whole, final):
        thought, text = answer.content
        assert (thought.thinking.strip(), text.text) == ("Let me see.", "It is four.")
    # As agents send it back, with the next question.
    options["messages"] += [
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": "[script:plain] Hello?"},
    ]
    assert client.messages.create(**options).content[-1].text == "Hello! 你好 👋"


def test_errors(tiny_talker: Server) -> None:
    client = client_of(tiny_talker.url)
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nobody", max_tokens=5, messages=HELLO)
    assert missing.value.body["error"]["type"] == "not_found_error" and missing.value.request_id
    with pytest.raises(anthropic.BadRequestError) as bad:
        client.messages.create(model=MODEL, max_tokens=5, messages=HELLO, extra_body={"temperature": -1})
    assert bad.value.body["type"] == "error" and bad.value.body["error"]["type"] == "invalid_request_error"
    assert "temperature" in bad.value.body["error"]["message"]


def test_keys_and_retries() -> None:
    """Its key comes in a header of its own, and while the model loads it tries again."""
    server = start_server(MODEL, "--kv-cache-memory", "64MiB", "--api-key", "sec-ret")
    try:
        with pytest.raises(anthropic.AuthenticationError) as wrong:
            client_of(server.url).messages.create(model=MODEL, max_tokens=5, messages=HELLO)
        assert wrong.value.body["error"]["type"] == "authentication_error"
        for key in ({"api_key": "sec-ret"}, {"auth_token": "sec-ret"}):
            client = anthropic.Anthropic(base_url=server.url, **key)
            assert client.messages.create(model=MODEL, max_tokens=5, messages=HELLO).content
    finally:
        server.stop()
