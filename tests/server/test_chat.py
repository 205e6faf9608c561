from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from ingle.text.chat_template import ChatTemplate
from ingle.text.tokenizer import Tokenizer

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, ScriptedEngine, assert_error, events

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
PART = {"type": "text", "text": "a"}


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HI} | body)


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await post(client, **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_a_chat_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = lambda request: 4
    answer = await chat(client)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    num_prompt, num_answer = len("<user>hi\n<assistant>"), len(GREETING.encode()) + 1
    assert answer == {
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": GREETING, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_answer,
            "total_tokens": num_prompt + num_answer,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_messages_reach_the_template(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    history = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": parts, "name": "eve"},
        {"role": "assistant", "content": "ok", "tool_calls": None, "refusal": None, "audio": None, "annotations": []},
        {"role": "tool", "content": "42", "tool_call_id": "t1"},
    ]
    await chat(client, messages=history)
    assert prompt_of(engine) == "<system>be brief\n<user>a\nb\n<assistant>ok\n<tool>42\n<assistant>"


async def test_a_message_that_would_be_lost_is_named(make_client: Callable[..., httpx.AsyncClient]) -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    client = make_client(chat_template=ChatTemplate(source, {}))
    response = await post(client, messages=[*HI, {"role": "system", "content": "hi"}])
    assert assert_error(response, 400, "messages[1]", "'system'", param="messages[1]")["code"] == "message_not_rendered"
    assert (await post(client)).status_code == 200


async def test_template_options(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, add_generation_prompt=False, chat_template_kwargs={"shout": True}, add_special_tokens=True)
    assert prompt_of(engine) == "<s><user>hi\nSHOUT"
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "tokenize"):
        response = await post(client, chat_template_kwargs={name: 1})
        assert_error(response, 400, name, param="chat_template_kwargs")


async def test_a_deep_template_variable_is_answered(client: httpx.AsyncClient) -> None:
    for depth in (100, 900):
        body = b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"x":%s}}' % (
            b"[" * depth + b"]" * depth
        )
        headers = {"Content-Type": "application/json"}
        response = await client.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        (None, "messages", "messages must be a valid list, got null"),
        ([], "messages", "messages must have at least 1 item, got a list"),
        ("hi", "messages", 'messages must be a valid list, got "hi"'),
        (["hi"], "messages[0]", 'messages[0] must be an object, got "hi"'),
        ([{}], "messages[0].role", "messages[0].role is required"),
        ([{"role": "user"}], "messages[0].content", "messages[0].content is required"),
        ([{"role": "king", "content": ""}], "messages[0].role", 'got "king"'),
        ([*HI, {"role": "user", "content": 3}], "messages[1].content", "a string or a list of text parts, got 3"),
        ([{"role": "user", "content": None}], "messages[0].content", "messages[0].content is required"),
        ([{"role": "assistant"}], "messages[0].content", "messages[0].content is required"),
        (
            [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
            "messages[0].tool_calls",
            "only allowed in a message of the assistant",
        ),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]", 'must be an object, got "x"'),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0].content[0].text",
            "messages[0].content[0].text is required",
        ),
        (
            [*HI, {"role": "user", "content": [PART, {"type": "text", "text": 3}]}],
            "messages[1].content[1].text",
            "messages[1].content[1].text must be a valid string, got 3",
        ),
        (
            [{"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
            "messages[0].content[1].type",
            'messages[0].content[1].type is "image_url", but this model takes text only',
        ),
        (
            [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
            "messages[0].tool_calls[0].function",
            "messages[0].tool_calls[0].function is required",
        ),
    ],
)
async def test_wrong_messages(client: httpx.AsyncClient, messages: Any, param: str, message: str) -> None:
    assert_error(await post(client, messages=messages), 400, message, param=param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ],
)
async def test_refused_fields_are_named(client: httpx.AsyncClient, extra: dict[str, Any], param: str) -> None:
    assert_error(await post(client, **extra), 400, param, param=param)


async def test_neutral_values_of_unsupported_fields(client: httpx.AsyncClient) -> None:
    await chat(
        client,
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        functions=None,
        function_call="none",
        modalities=["text"],
        continue_final_message=False,
        reasoning_effort=None,
        logprobs=False,
        top_logprobs=0,
    )


async def test_length_limits(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client)
    await chat(client, max_tokens=3)
    await chat(client, max_completion_tokens=4)
    await chat(client, max_tokens=-1)
    room = MAX_MODEL_LEN - len("<user>hi\n<assistant>")
    assert [request.sampling.max_tokens for request in engine.requests] == [room, 3, 4, room]
    response = await post(client, messages=[{"role": "user", "content": "x" * 300}])
    assert assert_error(response, 400, str(MAX_MODEL_LEN), param="messages")["code"] == "context_length_exceeded"


async def test_without_a_template_only_completions_work(make_client: Callable[..., httpx.AsyncClient]) -> None:
    client = make_client(chat_template=None)
    assert_error(await post(client), 400, "--chat-template", "/v1/completions", param="messages")
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 200


async def test_choices(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    answer = await chat(client, n=3, seed=2, max_tokens=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [request.sampling.seed for request in engine.requests] == [2, 3, 4]
    assert answer["usage"]["completion_tokens"] == 15
    assert answer["usage"]["prompt_tokens"] == len("<user>hi\n<assistant>")


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs(client: httpx.AsyncClient, stream: bool) -> None:
    response = await post(client, logprobs=True, top_logprobs=1, max_tokens=2, stream=stream)
    chunks = events(response)[:-1] if stream else [response.json()]
    entries = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == [
        {
            "token": "H",
            "logprob": -1.5,
            "bytes": [72],
            "top_logprobs": [{"token": "G", "logprob": -0.5, "bytes": [71]}],
        },
        {
            "token": "e",
            "logprob": -1.5,
            "bytes": [101],
            "top_logprobs": [{"token": "d", "logprob": -0.5, "bytes": [100]}],
        },
    ]


async def test_bytes_of_a_split_character(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say("é")
    [choice] = (await chat(client, logprobs=True))["choices"]
    spelled = [byte for entry in choice["logprobs"]["content"][:2] for byte in entry["bytes"]]
    assert bytes(spelled).decode() == "é"


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    answer = await chat(client, prompt_logprobs=0)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None


async def test_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.tokens_per_step = 3
    engine.num_cached_tokens = lambda request: 5
    *chunks, usage, done = events(await post(client, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == GREETING
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None and chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    assert usage["usage"]["completion_tokens"] == len(GREETING.encode()) + 1


async def test_stream_without_usage_has_no_usage_field(client: httpx.AsyncClient) -> None:
    *chunks, done = events(await post(client, stream=True, max_tokens=2))
    assert done == "[DONE]" and all("usage" not in chunk for chunk in chunks)


async def test_stream_of_several_choices_names_the_role_once_each(client: httpx.AsyncClient) -> None:
    *chunks, _ = events(await post(client, stream=True, n=3))
    for index in range(3):
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [("role" in choice["delta"]) for choice in choices] == [True] + [False] * (len(choices) - 1)
        assert "".join(choice["delta"].get("content", "") for choice in choices) == GREETING
        assert choices[-1]["finish_reason"] == "stop"


async def test_a_stop_string_in_a_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    *chunks, _ = events(await post(client, stream=True, stop=" wör"))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Hello,"
    assert chunks[-1]["choices"][0]["stop_reason"] == " wör"
    assert len(engine.aborted) == 1


async def test_a_failure_in_a_stream_is_an_event(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after = 2
    *_, last = events(await post(client, stream=True))
    assert last["error"]["code"] == "generation_failed"


async def test_errors_before_a_stream_are_plain_answers(client: httpx.AsyncClient) -> None:
    assert_error(await post(client, stream=True, temperature=-1), 400, param="temperature")


async def test_a_template_without_an_end_token_stops_before_the_next_turn(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_stops", ("\n\n### Instruction:",))
    engine.say("an answer\n\n### Instruction:\nand on")
    choice = (await chat(client))["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("an answer", "stop")
    choice = (await chat(client, stop="ans"))["choices"][0]
    assert choice["message"]["content"] == "an "
    choice = (await chat(client, ignore_eos=True, max_tokens=40))["choices"][0]
    assert choice["message"]["content"].startswith("an answer\n\n### Instruction:")
