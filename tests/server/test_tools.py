"""Tools, calls and thoughts in chat completions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingle.text.chat_template import ChatTemplate
from ingle.text.formats.declared import reasoning_format, tool_format
from ingle.text.formats.of_model import Formats

from .fakes import ScriptedEngine, assert_error, events

pytestmark = pytest.mark.anyio

HI = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if reasoning_effort is defined %}"
    "EFFORT {{ reasoning_effort }}{% endif %}{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "W", "strict": True,
                 "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}  # fmt: skip
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
HERMES = Formats(tool_format("hermes"), reasoning_format("think"))


@pytest.fixture
def client(make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine) -> httpx.AsyncClient:
    engine.info.max_model_len = 4096
    return make_client(chat_template=ChatTemplate(TEMPLATE, {}), formats=HERMES)


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"messages": HI} | body)


async def chat(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await post(client, **body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def joined(chunks: list[Any]) -> list[dict[str, Any]]:
    """The choices of a whole answer that a stream adds up to."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            new = {"content": "", "thought": "", "calls": [], "finish_reason": None, "tokens": []}
            choice, delta = choices.setdefault(piece["index"], new), piece["delta"]
            choice["content"] += delta.get("content", "")
            choice["thought"] += delta.get("reasoning_content", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(choice["calls"]) and call["type"] == "function"
                    choice["calls"].append([call["function"]["name"], ""])
                choice["calls"][call["index"]][1] += call["function"]["arguments"]
            choice["finish_reason"] = piece["finish_reason"] or choice["finish_reason"]
            choice["tokens"] += (piece["logprobs"] or {"content": []})["content"]
    return [choice for _, choice in sorted(choices.items())]


def whole(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The same of an answer that is not streamed."""
    return [
        {
            "content": choice["message"]["content"] or "",
            "thought": choice["message"].get("reasoning_content", ""),
            "calls": [
                [c["function"]["name"], c["function"]["arguments"]] for c in choice["message"].get("tool_calls", [])
            ],
            "finish_reason": choice["finish_reason"],
            "tokens": (choice["logprobs"] or {"content": []})["content"],
        }
        for choice in answer["choices"]
    ]


async def test_a_call(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(f"<think>\nhm\n</think>\n\nLet me look.\n{CALL}\n{CALL}")
    answer = await chat(client, tools=[TOOL, NOW])
    choice = answer["choices"][0]
    first, second = choice["message"].pop("tool_calls")
    assert choice["message"] == {
        "role": "assistant", "content": "Let me look.", "refusal": None, "annotations": [],
        "reasoning_content": "hm", "reasoning": "hm",
    }  # fmt: skip
    assert first["type"] == "function" and first["id"].startswith("call_") and first["id"] != second["id"]
    assert first["function"] == {"name": "weather", "arguments": '{"city": "北京"}'}
    assert choice["finish_reason"] == "tool_calls"
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": len(">\nhm\n</think>")}
    assert (await chat(client, tools=[TOOL], include_reasoning=False))["choices"][0]["message"].keys() == {
        "role", "content", "refusal", "annotations", "tool_calls",
    }  # fmt: skip


async def test_content_is_null_beside_a_call_alone(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(CALL)
    assert (await chat(client, tools=[TOOL]))["choices"][0]["message"]["content"] is None


async def test_one_call_only(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(CALL * 3)
    choice = (await chat(client, tools=[TOOL], parallel_tool_calls=False))["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1 and choice["finish_reason"] == "tool_calls"
    assert engine.aborted == [engine.requests[-1].id], "what follows is not generated"


async def test_without_tools_nothing_is_a_call(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(CALL)
    for body in ({}, {"tools": []}, {"tools": [TOOL], "tool_choice": "none"}):
        choice = (await chat(client, **body))["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
        assert "TOOLS" not in prompt_of(engine)


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


async def test_tools_reach_the_template(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await chat(client, tools=[TOOL | {"cache_control": {"type": "ephemeral"}}, NOW], tool_choice="auto")
    line, _, rest = prompt_of(engine).partition("\n")
    assert rest == "<user>hi\n<assistant>"
    weather, now = json.loads(line.removeprefix("TOOLS "))
    assert weather["function"] == {name: value for name, value in TOOL["function"].items() if name != "strict"}
    assert now["function"] == {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}}


async def test_a_template_without_tools_gets_them_in_words(
    make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine
) -> None:
    engine.info.max_model_len = 4096
    engine.say(CALL)
    client = make_client(formats=HERMES)
    choice = (await chat(client, tools=[TOOL]))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert prompt_of(engine).startswith("<system># Tools\n") and '"name": "weather"' in prompt_of(engine)


async def test_a_round_of_an_agent(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(f"<think>hm</think>{CALL}")
    message = (await chat(client, tools=[TOOL]))["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "21°", "name": "weather"}
    await chat(client, tools=[TOOL], messages=[*HI, message, result])
    assert prompt_of(engine).endswith('<user>hi\n<assistant>(hm)[weather {"city": "北京"}]\n<tool>21°\n<assistant>')
    await chat(client, tools=[TOOL], messages=[*HI, message, result | {"content": None}])
    assert prompt_of(engine).endswith("]\n<tool>\n<assistant>")
    message |= {"content": [{"type": "text", "text": "ok", "cache_control": {"type": "ephemeral"}}], "reasoning": "so"}
    del message["reasoning_content"]
    await chat(client, tools=[TOOL], messages=[*HI, message, result])
    assert '<assistant>(so)ok[weather {"city": "北京"}]' in prompt_of(engine)


async def test_thoughts_that_the_prompt_begins(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say("hm</think>yes")
    for begun in ({"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "high"}):
        message = (await chat(client, **begun))["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "yes")
    assert "EFFORT high" in prompt_of(engine)
    message = (await chat(client, reasoning_effort="none"))["choices"][0]["message"]
    assert message["content"] == "hm</think>yes" and "reasoning_content" not in message
    assert "EFFORT" not in prompt_of(engine)


async def test_a_message_is_continued(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say(" world")
    begun = [*HI, {"role": "assistant", "content": "Hello"}]
    answer = await chat(client, messages=begun, continue_final_message=True, add_generation_prompt=False)
    assert prompt_of(engine) == "<user>hi\n<assistant>Hello"
    assert answer["choices"][0]["message"]["content"] == " world"
    for stream in (False, True):
        response = await post(client, messages=begun, continue_final_message=True, echo=True, stream=stream)
        found = joined(events(response)[:-1]) if stream else whole(response.json())
        assert found[0]["content"] == "Hello world"
    called = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "now", "arguments": "{}"}}]}
    response = await post(client, messages=[*HI, called], continue_final_message=True)
    assert_error(response, 400, "continue_final_message", param="messages")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_call_that_must_be(
    client: httpx.AsyncClient, engine: ScriptedEngine, choice: Any, stream: bool
) -> None:
    """By a grammar, of the tools that may be called; what the model writes by itself to call one does not matter."""
    engine.say('[{"name": "weather", "arguments": {"city": "北京"}}]')
    response = await post(client, tools=[TOOL, NOW], tool_choice=choice, stream=stream)
    (found,) = joined(events(response)[:-1]) if stream else whole(response.json())
    assert found["calls"] == [["weather", '{"city": "北京"}']] and found["content"] == ""
    assert found["finish_reason"] == ("tool_calls" if choice == "required" else "stop")  # as OpenAI's are
    (request,) = engine.requests
    assert request.grammar is not None
    assert ("weather" in request.grammar.text, "now" in request.grammar.text) == (True, choice == "required")


async def test_a_tool_that_cannot_be_kept_to(client: httpx.AsyncClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}
    assert_error(await post(client, tools=[tool], tool_choice="required"), 400, "nothing", param="tools")
    assert (await post(client, tools=[tool])).status_code == 200, "which only describes it"


async def test_usage_so_far(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say("abc")
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    *chunks, last, _ = events(await post(client, stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4 and last["usage"] == chunks[-1]["usage"]


PIECES = st.lists(
    st.sampled_from(
        ["<think>", "</think>", CALL, "<tool_call>", "</tool_call>", "<tool", " hi", "\n", "é😀", '{"name": "now"', "}"]
    ),
    max_size=8,
).map("".join)


@given(text=PIECES, tokens_per_step=st.integers(1, 5), body=st.fixed_dictionaries({
    "tools": st.sampled_from([[TOOL, NOW], []]), "parallel_tool_calls": st.booleans(), "n": st.integers(1, 2),
    "stop": st.sampled_from([[], ["hi"], ["</tool"]]), "max_tokens": st.sampled_from([-1, 7, 40]),
    "reasoning_effort": st.sampled_from(["high", "none"]), "logprobs": st.booleans()}))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
async def test_streaming_and_plain_are_the_same(
    client: httpx.AsyncClient, engine: ScriptedEngine, text: str, tokens_per_step: int, body: dict[str, Any]
) -> None:
    engine.say(text)
    engine.tokens_per_step = 1
    plain = await chat(client, **body)
    engine.tokens_per_step = tokens_per_step
    options = {"include_usage": True}
    *chunks, usage, _ = events(await post(client, stream=True, stream_options=options, **body))
    assert joined(chunks) == whole(plain)
    assert usage["usage"] == plain["usage"]


ENDED = "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now."


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
@pytest.mark.parametrize(("budget", "thought"), [(0, ""), (5, "12345"), (8, "12345678"), (10, "123456789"), (60, "")])
async def test_a_budget_of_thoughts(
    client: httpx.AsyncClient, engine: ScriptedEngine, budget: int, thought: str, tokens_per_step: int
) -> None:
    """Byte tokens: `</think>` is eight of them. The second request goes on behind the words that end the thoughts."""
    first = engine.tokenizer.encode("123456789</think>yes</s>", add_special_tokens=False)
    then = engine.tokenizer.encode("so no</s>", add_special_tokens=False)
    engine.reply = lambda request: then if request.id.endswith("-answer") else first
    engine.tokens_per_step = tokens_per_step
    body = {"reasoning_effort": "high", "thinking_token_budget": budget, "logprobs": True}
    answer = await chat(client, **body)
    (choice,) = whole(answer)
    if budget == 60:
        assert (choice["thought"], choice["content"], len(engine.requests)) == ("123456789", "yes", 1)
    else:
        shown = thought + ("<" if budget == 10 else "")
        assert (choice["thought"], choice["content"]) == ((shown + ENDED).strip(), "so no")
        assert len(choice["tokens"]) == answer["usage"]["completion_tokens"]
        assert prompt_of(engine).endswith(f"<think>\n{shown}{ENDED}\n</think>\n\n")
        assert engine.requests[-1].id not in engine.aborted and len(engine.aborted) == (
            budget > 0 and tokens_per_step < 50
        )
        ended = len(ENDED) + len("\n</think>\n\n")
        assert engine.requests[-1].sampling.max_tokens == 4096 - answer["usage"]["prompt_tokens"] - budget - ended
    *chunks, _ = events(await post(client, stream=True, **body))
    assert joined(chunks) == whole(answer)


async def test_a_budget_and_a_limit(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.say("123456789")
    body = {"reasoning_effort": "high", "thinking_token_budget": 5}
    for max_tokens in (3, 5, 12, 5 + len(ENDED) + len("\n</think>\n\n")):
        answer = await chat(client, max_tokens=max_tokens, **body)
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == max_tokens
    response = await chat(client, thinking_token_budget=5, reasoning_effort="none")
    assert response["choices"][0]["message"]["content"].startswith("123456789")


CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "<|channel|>final<|message|>hello"),
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"tools": [TOOL], "tool_choice": "required"}, '[{"name": "weather", "arguments": {"city": "Rome"}}]'),
    ],
    ids=["free", "an object", "a call"],
)
async def test_a_bound_answer_in_channels_stands_in_the_last(
    make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine, body: dict[str, Any], said: str
) -> None:
    """Its header is part of the prompt, for a grammar has no place for it."""
    engine.info.max_model_len = 4096
    formats = Formats(tool_format("openai"), reasoning_format("openai_gptoss"))
    client = make_client(chat_template=ChatTemplate(CHANNELS, {}), formats=formats)
    engine.say(said)
    message = (await chat(client, **body))["choices"][0]["message"]
    prompt = prompt_of(engine)
    assert prompt.endswith("<|start|>assistant<|channel|>final<|message|>" if body else "<|start|>assistant")
    if "tools" in body:
        assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Rome"}
    else:
        assert message["content"] == said.rpartition("<|message|>")[2]
