"""The `openai` package: what its users do, against the default model and against a scripted one."""

from __future__ import annotations

import json
import re
import time
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.clients.conftest import MODEL, Scripted
from tests.e2e.conftest import Server, start_server

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
DEGREES = {"Paris": "18 degrees", "北京": "7 degrees"}
HELLO: Any = [{"role": "user", "content": "Say hello."}]


class Animal(BaseModel, extra="forbid"):
    """Other keys are forbidden: by JSON Schema they may else go on for ever, and with this model they do."""

    kind: Literal["cat", "dog", "鸟"]
    name: str = Field(max_length=12)
    legs: int = Field(ge=0, le=8)
    friends: list[Literal["cat", "dog"]] = Field(max_length=2)


@pytest.fixture
def client(tiny_talker: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_talker.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def actor(scripted: Scripted) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0)


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    # The client's own stream refuses an answer that was cut.
    options: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 300}
    whole = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    assert whole.usage is not None and whole.choices[0].logprobs is not None
    tokens = "".join(entry.token for entry in whole.choices[0].logprobs.content or [])
    assert tokens.removesuffix("<|im_end|>") == whole.choices[0].message.content
    with client.chat.completions.stream(**options, stream_options={"include_usage": True}) as stream:
        told = [event for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(event.delta for event in told) == final.choices[0].message.content
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage is not None and final.usage.completion_tokens == whole.usage.completion_tokens


def test_parsed_output(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "response_format": Animal, "temperature": 1, "seed": 5}
    whole = client.chat.completions.parse(**options)
    animal = whole.choices[0].message.parsed
    assert isinstance(animal, Animal) and whole.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == animal


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_that_has_to_be_called(client: openai.OpenAI, choice: Any) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.finish_reason == ("tool_calls" if choice == "required" else whole.finish_reason)
    assert whole.message.tool_calls is not None
    asked = [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls]
    assert asked and all(name == "get_weather" and len(given["city"]) <= 20 for name, given in asked)
    with client.chat.completions.stream(**options) as stream:
        stream.until_done()
        streamed = stream.get_final_completion().choices[0]
    assert [
        (call.function.name, json.loads(call.function.arguments)) for call in streamed.message.tool_calls or []
    ] == (asked)
    assert streamed.finish_reason == whole.finish_reason


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("script", "answer"), [("weather", "It is 18 degrees in Paris."), ("both", "18 in Paris, 7 in 北京.")]
)
def test_tools_in_a_loop(actor: openai.OpenAI, script: str, answer: str, streamed: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": f"[script:{script}] How warm is it?"}]
    for _ in range(3):
        options: Any = {"model": MODEL, "messages": messages, "tools": [WEATHER]}
        if streamed:
            with actor.chat.completions.stream(**options) as stream:
                stream.until_done()
                choice: Any = stream.get_final_completion().choices[0]
        else:
            choice = actor.chat.completions.create(**options).choices[0]
        if not choice.message.tool_calls:
            break
        assert choice.finish_reason == "tool_calls"
        messages.append(choice.message)
        for call in choice.message.tool_calls:
            city = json.loads(call.function.arguments)["city"]
            messages.append({"role": "tool", "tool_call_id": call.id, "content": DEGREES[city]})
    assert (choice.message.content, choice.finish_reason) == (answer, "stop")
    assert len(messages) == (3 if script == "weather" else 4)


def test_thoughts_are_apart(actor: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": [{"role": "user", "content": "[script:thinks] 2+2?"}]}
    message = actor.chat.completions.create(**options).choices[0].message
    assert (message.content, message.model_dump()["reasoning_content"].strip()) == ("It is four.", "Let me see.")
    deltas = [chunk.choices[0].delta.model_dump() for chunk in actor.chat.completions.create(**options, stream=True)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "It is four."
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas).strip() == "Let me see."


def test_responses(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "Say hello.", "temperature": 0, "max_output_tokens": 300}
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        told = [event for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert whole.output_text == final.output_text == "".join(event.delta for event in told) != ""
    assert whole.usage is not None and final.usage == whole.usage
    assert client.responses.retrieve(whole.id).output_text == whole.output_text
    follow = client.responses.create(model=MODEL, input="Again.", previous_response_id=whole.id, max_output_tokens=16)
    assert follow.previous_response_id == whole.id
    assert follow.usage is not None and follow.usage.input_tokens > whole.usage.total_tokens
    client.responses.delete(whole.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)


def test_responses_parsed(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(model=MODEL, input="An animal.", text_format=Animal, temperature=1)
    assert isinstance(parsed.output_parsed, Animal)


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_with_tools_in_a_loop(actor: openai.OpenAI, streamed: bool) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    items: list[Any] = [{"role": "user", "content": "[script:both] How warm is it?"}]
    for _ in range(3):
        options: Any = {"model": MODEL, "input": items, "tools": [tool], "store": False}
        if streamed:
            with actor.responses.stream(**options) as stream:
                stream.until_done()
                answer: Any = stream.get_final_response()
        else:
            answer = actor.responses.create(**options)
        calls = [item for item in answer.output if item.type == "function_call"]
        if not calls:
            break
        items += [item.model_dump(exclude_none=True) for item in answer.output]
        for call in calls:
            degrees = DEGREES[json.loads(call.arguments)["city"]]
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": degrees})
    assert answer.output_text == "18 in Paris, 7 in 北京."
    assert sum(item.get("type") == "function_call_output" for item in items) == 2


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64, unless it is told otherwise."""
    texts = ["The sea", "海", "The sea"]
    short = client.embeddings.create(model=MODEL, input=texts)
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    assert [entry.index for entry in short.data] == [0, 1, 2] and short.usage.prompt_tokens == plain.usage.total_tokens
    for one, other in zip(short.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert short.data[0].embedding == pytest.approx(short.data[2].embedding, abs=1e-3)
    assert sum(x * y for x, y in zip(short.data[0].embedding, short.data[1].embedding, strict=True)) < 0.9999
    cut = client.embeddings.create(model=MODEL, input="The sea", dimensions=64).data[0].embedding
    assert len(cut) == 64 and sum(value * value for value in cut) == pytest.approx(1, abs=1e-3)


def test_files_and_batches(client: openai.OpenAI) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 5}
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body} for number in range(3)
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    file = client.files.create(file=("in.jsonl", text), purpose="batch")
    assert (file.bytes, client.files.content(file.id).read()) == (len(text), text)
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"of": "tests"}
    )
    deadline = time.monotonic() + 60
    while batch.status not in ("completed", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed" and batch.request_counts is not None and batch.request_counts.completed == 3
    assert batch.output_file_id is not None
    answers = map(json.loads, client.files.content(batch.output_file_id).text.splitlines())
    assert {answer["custom_id"]: answer["response"]["status_code"] for answer in answers} == {
        "0": 200,
        "1": 200,
        "2": 200,
    }
    assert batch.id in [each.id for each in client.batches.list()]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as schema:
        bomb: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(model=MODEL, messages=HELLO, response_format=bomb)
    assert schema.value.param is not None and schema.value.param.startswith("response_format")


def test_a_client_that_comes_before_the_model_tries_again() -> None:
    """The server answers 503 with Retry-After while it loads."""
    server = start_server(MODEL, "--kv-cache-memory", "64MiB", wait=False)
    try:
        server.read()
        deadline = time.monotonic() + 60
        while (found := re.search(r"listening on (http://\S+?);", server.text())) is None:
            assert time.monotonic() < deadline and server.process.poll() is None, server.text()
            time.sleep(0.001)
        client = openai.OpenAI(base_url=f"{found[1]}/v1", api_key="none", max_retries=8)
        answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content
    finally:
        server.stop()
