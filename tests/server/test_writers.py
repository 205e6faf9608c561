"""Whatever an answer is and however it is cut: its stream adds up to what is not streamed, in each protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingle.events import Event, Usage, fold
from ingle.request import SamplingParams
from ingle.server.anthropic.messages import MessageWriter, _input
from ingle.server.anthropic.protocol import MessagesRequest
from ingle.server.responses.protocol import ResponsesRequest
from ingle.server.responses.tools import read_tools
from ingle.server.responses.writer import ResponseWriter
from ingle.text.tokenizer import Tokenizer

from .scripts import answers, portions

USED = Usage(10, 3, 5, 2)
fixed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def generation(tokenizer: Tokenizer) -> Any:
    params = SamplingParams(max_tokens=100)
    return SimpleNamespace(
        id="msg-0123",
        model=SimpleNamespace(name="m", tokenizer=tokenizer),
        prompts=[SimpleNamespace(token_ids=[1] * 10, params=params)],
        requests=[SimpleNamespace(sampling=params)],
    )


def told(writer: Any, events: list[Event], random: Random) -> Iterator[dict[str, Any]]:
    text = b"".join(writer.piece(portion) for portion in portions([*events, USED], random)).decode()
    for chunk in text.split("\n\n")[:-1]:
        yield json.loads(chunk.partition("data: ")[2])


@fixed
@given(answers, st.booleans(), st.randoms(use_true_random=False))
def test_messages(generation: Any, events: list[Event], shown: bool, random: Random) -> None:
    display = "summarized" if shown else "omitted"
    body = MessagesRequest.model_validate(
        {
            "model": "m",
            "max_tokens": 100,
            "messages": [{"role": "user", "content": "a"}],
            "thinking": {"type": "adaptive", "display": display},
        }
    )
    whole = json.loads(msgspec.json.encode(MessageWriter(body, generation).whole(fold([*events, USED]))))
    message: dict[str, Any] = {}
    arguments: dict[int, str] = {}
    for event in told(MessageWriter(body, generation), events, random):
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                delta = event["delta"]
                name = delta.pop("type").removesuffix("_delta")
                (value,) = delta.values()
                if name == "input_json":
                    arguments[event["index"]] = arguments.get(event["index"], "") + value
                else:
                    message["content"][event["index"]][name] += value
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    for index, text in arguments.items():
        message["content"][index]["input"] = _input(text)
    assert message == whole


@fixed
@given(answers, st.booleans(), st.booleans(), st.randoms(use_true_random=False))
def test_responses(generation: Any, events: list[Event], summarized: bool, custom: bool, random: Random) -> None:
    asked: dict[str, Any] = {"model": "m", "input": "a", "top_logprobs": 1}
    if summarized:
        asked["reasoning"] = {"summary": "auto"}
    if custom:
        asked["tools"] = [{"type": "custom", "name": f"tool{number}"} for number in range(3)]
    body = ResponsesRequest.model_validate(asked)

    def writer() -> ResponseWriter:
        return ResponseWriter(body, read_tools(body.tools or (), None), generation, None)

    whole = json.loads(msgspec.json.encode(writer().whole(fold([*events, USED]))))
    seen = list(told(writer(), events, random))
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    last = seen[-1]["response"]
    times = ("created_at", "completed_at")
    assert {**last, **dict.fromkeys(times)} == {**whole, **dict.fromkeys(times)}
    assert [event["item"] for event in seen if event["type"] == "response.output_item.done"] == whole["output"]
    grown = {item["id"]: ("", []) for item in whole["output"]}
    for event in seen:
        if "delta" in event:
            text, logprobs = grown[event["item_id"]]
            grown[event["item_id"]] = (text + event["delta"], logprobs + event.get("logprobs", []))
    for item in whole["output"]:
        part = (item.get("content") or item.get("summary") or [{}])[0]
        text = part.get("text", item.get("arguments", item.get("input")))
        assert grown[item["id"]] == (text, part.get("logprobs", []))
