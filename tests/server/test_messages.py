"""`/v1/messages`, as Anthropic's own client and raw HTTP see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import anthropic
import httpx
import pytest

from ingle.server.models import ServedModel
from ingle.text.chat_template import ChatTemplate
from ingle.text.tokenizer import Tokenizer

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, Health, ScriptedEngine, app_for, served
from .scripts import ANSWERS, NUM_CACHED, TOOL_TEMPLATE, tell

pytestmark = pytest.mark.anyio
ASK: dict[str, Any] = {"model": MODEL, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}
WEATHER = {"name": "weather", "description": "Of a city", "input_schema": {"type": "object", "properties": {}}}
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
async def sdk(model: ServedModel) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with (
        served(app_for(model, api_keys=("secret",))) as port,
        anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key="secret", max_retries=0) as sdk,
    ):
        yield sdk


async def post(client: httpx.AsyncClient, path: str = "/v1/messages", **changes: Any) -> httpx.Response:
    body = {name: value for name, value in {**ASK, **changes}.items() if value is not ...}
    return await client.post(path, json=body)


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def refused(response: httpx.Response, status: int, kind: str, *parts: str) -> str:
    """Anthropic's shape of an error."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["error"].keys() == {"type", "message"} and body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    for part in parts:
        assert part in body["error"]["message"]
    message: str = body["error"]["message"]
    return message


async def test_a_plain_answer(sdk: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = lambda request: 4
    message = await sdk.messages.create(
        **ASK, system="Be brief.", extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    )
    (block,) = message.content
    assert block.type == "text" and block.text == GREETING
    assert (message.role, message.type, message.model) == ("assistant", "message", MODEL)
    assert message.id.startswith("msg_") and (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.top_p) == (0.5, 3, 0.9)
    usage = message.usage
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (4, 0)
    assert usage.input_tokens == len(request.prompt_token_ids) - 4
    assert usage.output_tokens == len(GREETING.encode()) + 1
    assert prompt_of(engine) == "<system>Be brief.\n<user>hi\n<assistant>"


@pytest.mark.parametrize("display", ["summarized", "omitted"])
async def test_streamed_is_plain(sdk: anthropic.AsyncAnthropic, monkeypatch: pytest.MonkeyPatch, display: str) -> None:
    ask = {**ASK, "stop_sequences": ["END"], "thinking": {"type": "adaptive", "display": display}}
    for seed, (name, script) in enumerate(ANSWERS.items()):
        tell(monkeypatch, script)
        plain = await sdk.messages.create(**ask)
        with_call = any(block.type == "tool_use" for block in plain.content)
        expected = "tool_use" if with_call else "end_turn"
        expected = "max_tokens" if name.startswith("cut") else expected
        assert plain.stop_reason == ("stop_sequence" if name == "at a stop string" else expected)
        tell(monkeypatch, script, Random(seed))
        async with sdk.messages.stream(**ask) as stream:
            streamed = await stream.get_final_message()
        assert streamed.model_dump(exclude={"id"}) == plain.model_dump(exclude={"id"}), name


async def test_kinds_of_content(sdk: anthropic.AsyncAnthropic, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, ANSWERS["all, in turns"])
    message = await sdk.messages.create(**ASK)
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "text", "thinking", "tool_use", "text", "tool_use"]
    first, _, _, call, text, last = message.content
    assert first.type == "thinking" and first.thinking == "first" and first.signature
    assert call.type == "tool_use" and (call.id, call.name, call.input) == ("call_0", "now", {})
    assert text.type == "text" and text.text == "\nB." and last.type == "tool_use" and last.input == {}
    assert message.usage.output_tokens_details and message.usage.output_tokens_details.thinking_tokens == 5
    tell(monkeypatch, ANSWERS["thought and text"])
    omitted = await sdk.messages.create(**ASK, thinking={"type": "adaptive", "display": "omitted"})
    assert [getattr(block, "thinking", "") for block in omitted.content] == ["", ""]
    tell(monkeypatch, ANSWERS["cut in a call"])
    (cut,) = (await sdk.messages.create(**ASK)).content
    assert cut.type == "tool_use" and cut.input == {}


async def test_events_of_a_stream(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, ANSWERS["text and calls"])
    response = await post(client, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, rest = response.text.split("\n\n")
    assert rest == ""
    names, data = [], []
    for chunk in chunks:
        name, line = chunk.split("\n")
        names.append(name.removeprefix("event: "))
        data.append(json.loads(line.removeprefix("data: ")))
    assert names == [each["type"] for each in data]
    folded = [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert folded == ["message_start", "ping", *block * 3, "message_delta", "message_stop"]
    start = data[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["stop_sequence"] is None
    assert start["usage"]["cache_read_input_tokens"] == NUM_CACHED and start["usage"]["output_tokens"] == 0
    starts = [each["content_block"] for each in data if each["type"] == "content_block_start"]
    assert starts[0] == {"type": "text", "text": "", "citations": None}
    assert starts[1].items() >= {"type": "tool_use", "id": "call_0", "name": "weather", "input": {}}.items()
    assert data[-2]["delta"]["stop_reason"] == "tool_use" and data[-2]["delta"]["stop_sequence"] is None
    assert data[-2]["usage"]["input_tokens"] == start["usage"]["input_tokens"]


@pytest.fixture
def tool_client(make_client: Callable[..., httpx.AsyncClient], tokenizer: Tokenizer) -> httpx.AsyncClient:
    return make_client(chat_template=ChatTemplate(TOOL_TEMPLATE, tokenizer.special_tokens))


async def test_a_loop_with_tools(tool_client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """The second turn's prompt holds the call and its results, right behind it."""
    response = await post(
        tool_client,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
            {"role": "system", "content": "be nice"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "x"},
                    {"type": "redacted_thinking", "data": "zzz"},
                    {"type": "text", "text": "b"},
                    {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "X"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "and?"},
                    {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                    {"type": "tool_result", "tool_use_id": "t2", "content": "broken", "is_error": True},
                    {"type": "tool_result", "tool_use_id": "t3", "content": [{"type": "image", "source": {}}]},
                ],
            },
        ],
    )
    assert response.status_code == 200, response.text
    assert prompt_of(engine) == (
        "<user>a\n<system-reminder>\nbe nice\n</system-reminder>"
        '<assistant>(hm)b[t1 weather {"city": "X"}]<tool>rain=weather<tool>Error: broken'
        "<tool>(an image, which this model cannot see)<user>and?<assistant>"
    )


async def test_what_the_template_gets(tool_client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    client = tool_client
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "X"}}
    response = await post(
        client,
        tools=[WEATHER, {"type": "web_search_20250305", "name": "web_search"}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high"},
        messages=[
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, use]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1"}]},
        ],
    )
    assert response.status_code == 200, response.text
    assert response.headers["x-ingle-ignored-fields"] == "tools[web_search_20250305]"
    prompt = prompt_of(engine)
    assert prompt.startswith('T[{"type": "function", "function": {"name": "weather", "description": "Of a city", ')
    assert "web_search" not in prompt
    assert "<assistant>(hm)[t1 weather " in prompt and "<tool>=weatherETrueRhigh<assistant>" in prompt
    await post(client, tools=[WEATHER], tool_choice={"type": "none"}, thinking={"type": "disabled"})
    assert prompt_of(engine) == "<user>hiEFalse<assistant>"


async def test_a_begun_answer_goes_on(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    ask = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    await post(client, messages=ask)
    assert prompt_of(engine) == "<user>hi\n<assistant>Well, "
    await post(client, messages=[ask[0], {"role": "assistant", "content": " "}])
    assert prompt_of(engine) == "<user>hi\n<assistant>"


BILLING = "x-anthropic-billing-header: cc_version=2.1.177.01c; cc_entrypoint=sdk-cli; cch={};"


@pytest.mark.parametrize(
    "system",
    [
        lambda cch: [{"type": "text", "text": BILLING.format(cch)}, {"type": "text", "text": "You help."}],
        lambda cch: f"{BILLING.format(cch)}\n\nYou help.",
        lambda cch: [{"type": "text", "text": f"\n{BILLING.format(cch)}\nYou help."}],
    ],
)
async def test_lines_that_change_each_time_are_left_out(
    client: httpx.AsyncClient, engine: ScriptedEngine, system: Callable[[str], Any]
) -> None:
    for cch in ("36ee5", "0aaa9"):
        assert (await post(client, system=system(cch))).status_code == 200
        assert prompt_of(engine) == "<system>You help.\n<user>hi\n<assistant>"
    text = [{"type": "text", "text": BILLING.format("1")}, {"type": "text", "text": "You help."}]
    for content in (f"{BILLING.format('1')}\nYou help.", text):  # a router's, that speaks OpenAI's API
        asked = [{"role": "system", "content": content}, {"role": "user", "content": "hi"}]
        assert (await client.post("/v1/chat/completions", json={"messages": asked})).status_code == 200
        assert prompt_of(engine) == "<system>You help.\n<user>hi\n<assistant>"
    kept = "You help. x-anthropic-billing-header: none"
    await post(client, system=kept)
    assert prompt_of(engine).startswith(f"<system>{kept}")


async def test_documents_and_search_results_are_text(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    document = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "D"}}
    parts = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "P"}]}}
    result = {"type": "search_result", "source": "u", "title": "R", "content": [{"type": "text", "text": "S"}]}
    foreign = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}
    response = await post(client, messages=[{"role": "user", "content": [document, parts, result, foreign]}])
    assert response.status_code == 200, response.text
    assert prompt_of(engine) == "<user>T\nD\nP\nR\nu\nS\n<assistant>"
    assert "messages[].content[server_tool_use]" in response.headers["x-ingle-ignored-fields"]


async def test_max_tokens(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, engine: ScriptedEngine) -> None:
    answer = (await post(client, max_tokens=3)).json()
    assert answer["stop_reason"] == "max_tokens" and answer["usage"]["output_tokens"] == 3
    answer = (await post(client, max_tokens=0)).json()
    assert answer["content"] == [] and answer["stop_reason"] == "max_tokens"
    engine.reply = lambda request: engine.tokenizer.encode("x", add_special_tokens=False)
    answer = (await post(client, max_tokens=10_000)).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"


async def test_count_tokens(sdk: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    ask: dict[str, Any] = {**ASK, "system": "Be brief."}
    del ask["max_tokens"]
    count = await sdk.messages.count_tokens(**ask)
    assert count.input_tokens == len("<system>Be brief.\n<user>hi\n<assistant>") and not engine.requests
    long = [{"role": "user", "content": "x" * 1000}]
    counted = await sdk.messages.count_tokens(model=MODEL, messages=long)  # type: ignore[arg-type]
    assert counted.input_tokens > MAX_MODEL_LEN


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"max_tokens": ...}, "max_tokens is required"),
        ({"model": ...}, "model is required"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content must be a string or a list, got 5"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            'messages[0].content[0].type is "image", but this model takes text only',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "documents are taken as text only",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text is required"),
        ({"system": 5}, "system must be a string"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema is required"),
        ({"tools": [WEATHER, WEATHER]}, 'tools has two of the name "weather"'),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "b"}, "tools": [WEATHER]}, 'names "b"'),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
        ({"output_config": {"format": {"type": "json_schema", "schema": 5}}}, "output_config.format.schema must be"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals(client: httpx.AsyncClient, changes: dict[str, Any], part: str, stream: bool) -> None:
    refused(await post(client, stream=stream, **changes), 400, "invalid_request_error", part)


async def test_errors_before_the_endpoint(make_client: Callable[..., httpx.AsyncClient]) -> None:
    client = make_client(api_keys=("secret",), allowed_hosts=("here",))
    refused(await post(client), 401, "authentication_error", "x-api-key")
    key = {"x-api-key": "secret"}
    refused(await client.post("/v1/messages", json=ASK, headers={**key, "host": "evil"}), 403, "permission_error")
    refused(await client.post("/v1/messages/other", headers=key), 404, "not_found_error")
    refused(await client.get("/v1/messages", headers=key), 405, "invalid_request_error")
    refused(await client.post("/v1/messages", content=b"{", headers=key), 415, "invalid_request_error")
    for headers in (key, {"authorization": "Bearer secret"}, {**key, "authorization": "Bearer other"}):
        answer = await client.post("/v1/messages?beta=true", json=ASK, headers={**headers, "anthropic-beta": "x,y"})
        assert answer.status_code == 200, answer.text
    wrong = await client.post("/v1/chat/completions", json={}, headers={"x-api-key": "other"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
    assert (await client.head("/")).status_code == 200
    assert (await client.get("/")).status_code == 401


async def test_other_errors(
    client: httpx.AsyncClient, engine: ScriptedEngine, make_client: Callable[..., httpx.AsyncClient]
) -> None:
    refused(await post(client, model="other"), 404, "not_found_error", "other")
    long = [{"role": "user", "content": "x" * 1000}]
    message = refused(await post(client, messages=long), 400, "invalid_request_error")
    assert message.startswith("prompt is too long: 1018 tokens > 256 maximum")
    assert (await client.post("/v1/messages", content=b"x" * 40_000_000, headers={"content-type": "application/json"})
            ).json()["error"]["type"] == "request_too_large"  # fmt: skip
    refused(await post(make_client(chat_template=None)), 400, "invalid_request_error", "chat template")
    engine.fail_after = 2
    refused(await post(client), 500, "api_error", "not finite")
    engine.status = Health(False, "it died")
    refused(await post(client), 529, "overloaded_error", "it died")


async def test_an_error_within_a_stream(sdk: anthropic.AsyncAnthropic, engine: ScriptedEngine) -> None:
    engine.fail_after = 3
    texts = []
    with pytest.raises(anthropic.APIStatusError, match="not finite") as caught:
        async with sdk.messages.stream(**ASK) as stream:
            async for text in stream.text_stream:
                texts.append(text)
    assert "".join(texts) == GREETING[:3]
    assert caught.value.body["error"]["type"] == "api_error"  # type: ignore[index]


async def test_models(sdk: anthropic.AsyncAnthropic, client: httpx.AsyncClient) -> None:
    page = await sdk.models.list()
    assert [model.id for model in page.data] == [MODEL, "alias"] and not page.has_more
    model = await sdk.models.retrieve("alias")
    assert (model.id, model.type, model.max_input_tokens) == ("alias", "model", MAX_MODEL_LEN)
    assert model.created_at.year == 2023
    with pytest.raises(anthropic.NotFoundError):
        await sdk.models.retrieve("other")
    assert "object" in (await client.get("/v1/models")).json()
    assert "object" not in (await client.get("/v1/models", headers=VERSION)).json()


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


async def test_an_answer_may_be_bound_to_a_schema(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    wanted = {"type": "json_schema", "schema": SCHEMA}
    for ask in ({"output_config": {"format": wanted}}, {"output_format": wanted}):
        assert (await post(client, **ask)).status_code == 200
        grammar = engine.requests[-1].grammar
        assert grammar is not None and "city" in grammar.text
    wrong = {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}
    refused(await post(client, output_config=wrong), 400, "invalid_request_error", "output_config.format")
