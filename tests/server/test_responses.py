"""`/v1/responses`, as OpenAI's own client and raw HTTP see it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

import httpx
import openai
import pytest

from ingle.server.models import ServedModel
from ingle.server.responses.items import opaque, revealed
from ingle.server.responses.store import ResponseStore
from ingle.text.chat_template import ChatTemplate
from ingle.text.tokenizer import Tokenizer

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, ScriptedEngine, app_for, assert_error, client_of, served
from .scripts import ANSWERS, TOOL_TEMPLATE, answer, call, tell

pytestmark = pytest.mark.anyio
WEATHER = {"type": "function", "name": "weather", "description": "Of a city", "parameters": {"type": "object"}}
NOW = {"type": "custom", "name": "now", "description": "Any text"}


@pytest.fixture
async def sdk(model: ServedModel, tokenizer: Tokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    app = app_for(model, api_keys=("secret",), chat_template=ChatTemplate(TOOL_TEMPLATE, tokenizer.special_tokens))
    async with (
        served(app) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as sdk,
    ):
        yield sdk


@pytest.fixture(autouse=True)
def room(engine: ScriptedEngine) -> None:
    """For prompts with tools."""
    engine.info.max_model_len = 4096


@pytest.fixture
def tool_client(make_client: Callable[..., httpx.AsyncClient], tokenizer: Tokenizer) -> httpx.AsyncClient:
    return make_client(chat_template=ChatTemplate(TOOL_TEMPLATE, tokenizer.special_tokens))


async def post(client: httpx.AsyncClient, path: str = "/v1/responses", **body: Any) -> httpx.Response:
    return await client.post(path, json={"model": MODEL, "input": "hi", **body})


def prompt_of(engine: ScriptedEngine) -> str:
    return engine.tokenizer.decode(engine.requests[-1].prompt_token_ids, skip_special_tokens=False)


def stream_events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream"), response.text
    *chunks, rest = response.text.split("\n\n")
    assert rest == ""
    told = []
    for chunk in chunks:
        name, line = chunk.split("\n")
        told.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    assert [each["sequence_number"] for each in told] == list(range(len(told)))
    return told


async def test_a_plain_answer(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = lambda request: 4
    response = await sdk.responses.create(
        model=MODEL, input="hi", instructions="Be brief.", temperature=0.5, max_output_tokens=60, metadata={"a": "b"}
    )
    assert response.output_text == GREETING and response.status == "completed" and response.error is None
    assert response.id.startswith("resp_") and response.object == "response" and response.model == MODEL
    (message,) = response.output
    assert message.type == "message" and message.status == "completed" and message.id.startswith("msg_")
    assert (response.temperature, response.max_output_tokens, response.metadata) == (0.5, 60, {"a": "b"})
    assert (response.tool_choice, response.tools, response.truncation) == ("auto", [], "disabled")
    (request,) = engine.requests
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0.5, 60)
    usage = response.usage
    assert usage is not None and usage.input_tokens == len(request.prompt_token_ids)
    assert usage.input_tokens_details.cached_tokens == 4 and usage.output_tokens == len(GREETING.encode()) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert prompt_of(engine) == "<system>Be brief.<user>hi<assistant>"


TOOLS: list[Any] = [WEATHER, {"type": "namespace", "name": "n", "description": "", "tools": [WEATHER]}]


@pytest.mark.parametrize("ask", [{}, {"reasoning": {"summary": "auto"}}, {"tools": [WEATHER, NOW]}])
async def test_streamed_is_plain(sdk: openai.AsyncOpenAI, monkeypatch: pytest.MonkeyPatch, ask: dict[str, Any]) -> None:
    ask = {"model": MODEL, "input": "hi", "include": ["reasoning.encrypted_content"], **ask}

    def comparable(response: Any) -> Any:
        text = response.model_dump_json(exclude={"created_at", "completed_at"})
        return text.replace(response.id.removeprefix("resp_"), "ID")

    for seed, (name, script) in enumerate(ANSWERS.items()):
        tell(monkeypatch, script)
        plain = await sdk.responses.create(**ask)
        assert plain.status == ("incomplete" if name.startswith("cut") else "completed")
        assert (plain.incomplete_details is not None) == name.startswith("cut")
        tell(monkeypatch, script, Random(seed))
        told = [event async for event in await sdk.responses.create(**ask, stream=True)]
        assert [event.sequence_number for event in told] == list(range(len(told)))
        last = told[-1]
        assert last.type in ("response.completed", "response.incomplete")
        assert comparable(last.response) == comparable(plain), name
        done = [event.item for event in told if event.type == "response.output_item.done"]
        assert [item.model_dump() for item in done] == [item.model_dump() for item in last.response.output]
        if last.type == "response.completed":
            async with sdk.responses.stream(**ask) as stream:
                assert (await stream.get_final_response()).output_text == plain.output_text


async def test_deltas_add_up(tool_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, ANSWERS["all, in turns"])
    told = stream_events(await post(tool_client, stream=True, tools=[WEATHER, NOW], top_logprobs=0))
    grown: dict[str, str] = {}
    for event in told:
        if "delta" in event:
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    output = told[-1]["response"]["output"]
    kinds = [item["type"] for item in output]
    assert kinds == ["reasoning", "message", "reasoning", "custom_tool_call", "message", "custom_tool_call"]
    for item in output:
        shown = item.get("input", item.get("content") and item["content"][0]["text"])
        assert grown[item["id"]] == shown
    names = [event["type"].removeprefix("response.") for event in told]
    assert names[:2] == ["created", "in_progress"] and names[-1] == "completed"
    first = [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]][2:13]
    assert first == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
    ]


async def test_thoughts(tool_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(monkeypatch, ANSWERS["thought and text"])
    plain = (await post(tool_client, include=["reasoning.encrypted_content"])).json()
    thought, message = plain["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Let me see.\n"}] and thought["summary"] == []
    assert revealed(thought["encrypted_content"]) == "Let me see.\n" and revealed("AAAA") == revealed("?") == ""
    assert (
        message["content"][0]["text"] == "\n\n42" and plain["usage"]["output_tokens_details"]["reasoning_tokens"] == 6
    )
    told = stream_events(await post(tool_client, stream=True, reasoning={"summary": "auto", "effort": "low"}))
    names = [event["type"] for event in told]
    assert "response.reasoning_summary_text.delta" in names and "response.reasoning_text.delta" not in names
    thought = told[-1]["response"]["output"][0]
    assert (
        thought["summary"] == [{"type": "summary_text", "text": "Let me see.\n"}] and "encrypted_content" not in thought
    )


async def test_logprobs(sdk: openai.AsyncOpenAI) -> None:
    ask: dict[str, Any] = {
        "model": MODEL,
        "input": "hi",
        "top_logprobs": 2,
        "include": ["message.output_text.logprobs"],
    }
    plain = await sdk.responses.create(**ask)
    message: Any = plain.output[0]
    entries = message.content[0].logprobs
    assert len(entries) == len(GREETING.encode()) + 1 and len(entries[0].top_logprobs) == 2
    told = [event async for event in await sdk.responses.create(**ask, stream=True)]
    streamed = [entry for event in told if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [entry.logprob for entry in streamed] == [entry.logprob for entry in entries]


async def test_a_loop_with_tools(tool_client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """What Codex sends in its second turn."""
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "You code."}]},
        {"role": "developer", "content": "Carefully."},
        {"role": "user", "content": [{"type": "input_text", "text": "env"}]},
        {"role": "user", "content": "q"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": opaque("hm")},
        {"type": "function_call", "call_id": "c1", "name": "weather", "namespace": "n", "arguments": '{"a":1}'},
        {"type": "custom_tool_call", "call_id": "c2", "name": "now", "input": "x"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_image", "image_url": "u"}]},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"role": "developer", "content": "Hurry."},
    ]
    response = await post(tool_client, input=items, tool_choice="none", reasoning={"effort": "none"})
    assert response.status_code == 200, response.text
    assert prompt_of(engine) == (
        "<system>You code.\nCarefully.<user>env\nq<assistant>(hm)"
        '[c1 n__weather {"a": 1}][c2 now {"input": "x"}]'
        "<tool>rain=n__weather<tool>(an image, which this model cannot see)=now"
        "<user><system-reminder>\nHurry.\n</system-reminder>EFalse<assistant>"
    )
    ignored = response.headers["x-ingle-ignored-fields"]
    assert "input[web_search_call]" in ignored and "input[].output[input_image]" in ignored


async def test_tools_of_several_types(make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine) -> None:
    template = ChatTemplate("{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}", {})
    client = make_client(chat_template=template)
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: /x/"}
    tools = [
        WEATHER,
        {**NOW, "format": grammar},
        {"type": "namespace", "name": "n", "description": "d", "tools": [{"type": "function", "name": "weather"}]},
        {"type": "web_search", "external_web_access": True},
        {"type": "mcp", "server_label": "s"},
        {"type": "function", "function": {"name": "as_in_chat", "parameters": {"type": "object"}}},
    ]
    response = await post(client, tools=tools)
    assert response.status_code == 200, response.text
    assert response.json()["tools"] == tools
    assert response.headers["x-ingle-ignored-fields"] == "tools[web_search], tools[mcp]"
    told = json.loads(prompt_of(engine).removesuffix("hi"))
    functions = {each["function"]["name"]: each["function"] for each in told}
    assert list(functions) == ["weather", "now", "n__weather", "as_in_chat"]
    assert functions["now"]["parameters"]["required"] == ["input"] and "start: /x/" in functions["now"]["description"]
    await post(client, tools=tools, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [WEATHER]})
    assert [each["function"]["name"] for each in json.loads(prompt_of(engine).removesuffix("hi"))] == [
        "weather",
        "n__weather",
    ]
    strict = make_client(chat_template=template, strict_fields=True)
    assert_error(await post(strict, tools=tools), 400, "tools[web_search]")


async def test_calls_come_back_as_what_they_were(
    tool_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell(monkeypatch, answer(call(0, "n__weather", '{"a": 1}'), call(1, "now", '{"input": "ls \\"x\\""}')))
    tools = [{"type": "namespace", "name": "n", "description": "d", "tools": [WEATHER]}, NOW]
    first, second = (await post(tool_client, tools=tools)).json()["output"]
    assert (first["type"], first["name"], first["namespace"]) == ("function_call", "weather", "n")
    assert (first["arguments"], first["call_id"], first["status"]) == ('{"a": 1}', "call_0", "completed")
    assert (second["type"], second["name"], second["input"]) == ("custom_tool_call", "now", 'ls "x"')
    tell(monkeypatch, answer(call(1, "now", '{"input": "ls'), reason="length"))
    (cut,) = (await post(tool_client, tools=tools)).json()["output"]
    assert (cut["input"], cut["status"]) == ("ls", "incomplete")


async def test_a_kept_response(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    first = await sdk.responses.create(model=MODEL, input="one", instructions="Not for later.")
    assert first.store is True  # type: ignore[attr-defined]
    kept = await sdk.responses.retrieve(first.id)
    assert kept.model_dump() == first.model_dump()
    second = await sdk.responses.create(model=MODEL, input="two", previous_response_id=first.id)
    assert second.previous_response_id == first.id
    assert prompt_of(engine) == f"<user>one<assistant>{GREETING}<user>two<assistant>"
    items = await sdk.responses.input_items.list(second.id, order="asc")
    roles = [getattr(item, "role", None) for item in items.data]
    assert roles == ["user", "assistant", "user"] and all(item.id for item in items.data)
    newest = await sdk.responses.input_items.list(second.id, limit=1)
    assert len(newest.data) == 1 and newest.has_more
    rest = await sdk.responses.input_items.list(second.id, after=newest.data[0].id or "")
    assert [item.id for item in rest.data] == [item.id for item in items.data][1::-1]
    reference: Any = {"type": "item_reference", "id": first.output[0].id}
    user: Any = {"role": "user", "content": "three"}
    await sdk.responses.create(model=MODEL, input=[reference, user])
    assert prompt_of(engine) == f"<assistant>{GREETING}<user>three<assistant>"
    with pytest.raises(openai.BadRequestError, match="background"):
        await sdk.responses.cancel(first.id)
    await sdk.responses.delete(first.id)
    for gone in (sdk.responses.retrieve(first.id), sdk.responses.delete(first.id), sdk.responses.cancel(first.id)):
        with pytest.raises(openai.NotFoundError):
            await gone
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.create(model=MODEL, input="x", previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError):
        await sdk.responses.create(model=MODEL, input=[reference])
    await sdk.responses.retrieve(second.id)


async def test_a_streamed_response_is_kept(client: httpx.AsyncClient) -> None:
    last = stream_events(await post(client, stream=True))[-1]["response"]
    assert (await client.get(f"/v1/responses/{last['id']}")).json() == last
    unkept = (await post(client, store=False)).json()
    assert unkept["store"] is False
    assert_error(await client.get(f"/v1/responses/{unkept['id']}"), 404, "store is false", param="response_id")
    assert_error(await client.get(f"/v1/responses/{last['id']}?stream=true"), 400, "stream", param="stream")
    for query, param in (("order=up", "order"), ("limit=0", "limit"), ("limit=x", "limit"), ("after=x", "after")):
        answer = await client.get(f"/v1/responses/{last['id']}/input_items?{query}")
        assert_error(answer, 400, param, param=param)


def test_the_store_is_bounded() -> None:
    now = 0.0
    store = ResponseStore(max_bytes=10_000, max_age_s=60.0, clock=lambda: now)
    for number in range(20):
        now = float(number)
        store.put(str(number), b"x" * 1000, b"[]")
        assert store.num_bytes <= 10_000
    assert len(store) == 4 and store.get("19").response == b"x" * 1000
    store.put("huge", b"x" * 10_000, b"")
    assert len(store) == 4
    store.delete("17")
    now = 78.5
    with pytest.raises(Exception, match="does not exist"):
        store.get("18")
    assert store.get("19") and len(store) == 1
    now = 80.0
    with pytest.raises(Exception, match="does not exist"):
        store.get("19")
    assert store.num_bytes == 0 and not ResponseStore(max_bytes=0).keeps


async def test_a_store_of_no_size(model: ServedModel) -> None:
    client = client_of(app_for(model, responses=ResponseStore(max_bytes=0)))
    answer = (await post(client)).json()
    assert answer["store"] is False
    assert_error(await client.get(f"/v1/responses/{answer['id']}"), 404, "--response-store", param="response_id")


async def test_truncation(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.info.max_model_len = MAX_MODEL_LEN
    said = [
        {"role": "system", "content": "S"},
        *({"role": role, "content": f"{n}{role[0] * 40}"} for n in range(6) for role in ("user", "assistant")),
        {"role": "user", "content": "last"},
    ]
    assert_error(await post(client, input=said), 400, "context length", param="input")
    assert (await post(client, input=said, truncation="auto")).status_code == 200
    prompt = prompt_of(engine)
    assert prompt.startswith("<system>S\n<user>") and prompt.endswith("<user>last\n<assistant>")
    first = int(prompt.partition("<user>")[2][0])
    assert first > 0 and MAX_MODEL_LEN - 120 < len(prompt) < MAX_MODEL_LEN
    assert_error(await post(client, input="x" * 999, truncation="auto"), 400, "context length", param="input")


async def test_input_tokens(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    counted = await sdk.responses.input_tokens.count(model=MODEL, input="hi", instructions="Be brief.")
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == len("<system>Be brief.<user>hi<assistant>") and not engine.requests


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"input": None}, "input", "must be a string or a list of items"),
        ({"input": []}, "input", "is required"),
        ({"model": None}, "model", "string"),
        ({"input": [5]}, "input[0]", "must be an object with a type"),
        ({"input": [{"role": "bot", "content": "a"}]}, "input[0].role", "bot"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "text only"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type", "text only"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input[0].call_id", "is required"),
        ({"input": [{"type": "compaction_trigger"}]}, "input[0].type", "compact"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "does not exist"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "is required"),
        ({"tools": [{}]}, "tools[0].type", "is required"),
        ({"tools": [WEATHER, WEATHER]}, "tools[1]", "second tool"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools", "list of tools"),
        ({"tools": [{"type": "function", "name": "a", "parameters": 5}]}, "tools[0].parameters", "got 5"),
        ({"tool_choice": "required"}, "tool_choice", "names none"),
        ({"tool_choice": {"type": "function", "name": "b"}, "tools": [WEATHER]}, "tool_choice", '"b"'),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"top_logprobs": 99}, "top_logprobs", "99"),
        ({"max_output_tokens": 0}, "max_output_tokens", "0"),
        ({"background": True}, "background", "not supported"),
        ({"conversation": "c"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"truncation": "some"}, "truncation", "some"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "xml"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "JSON Schema"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "does not exist"),
    ],
)
async def test_refusals(client: httpx.AsyncClient, changes: dict[str, Any], param: str, part: str) -> None:
    for stream in (False, True):
        response = await post(client, stream=stream, **changes)
        assert_error(response, 404 if "does not exist" in part else 400, part, param=param)


async def test_an_error_within_a_stream(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after = 3
    *_, failed, error = stream_events(await post(client, stream=True))
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert "not finite" in failed["response"]["error"]["message"]
    assert error["type"] == "error" and "not finite" in error["message"] and error["code"] == "generation_failed"
    assert (await client.get(f"/v1/responses/{failed['response']['id']}")).status_code == 404


async def test_neutral_fields(client: httpx.AsyncClient) -> None:
    response = await post(
        client,
        background=False,
        client_metadata={"a": "b"},
        include=["web_search_call.results"],
        max_tool_calls=3,
        parallel_tool_calls=False,
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        reasoning=None,
        safety_identifier="u",
        service_tier="auto",
        stream_options=None,
        text={"format": {"type": "text"}, "verbosity": "low"},
        user="u",
    )
    assert response.status_code == 200, response.text
    assert "x-ingle-ignored-fields" not in response.headers
    body = response.json()
    assert (body["user"], body["text"]["verbosity"], body["parallel_tool_calls"]) == ("u", "low", False)
    assert body["service_tier"] == "default" and body["max_tool_calls"] == 3


async def test_methods_of_a_path(client: httpx.AsyncClient) -> None:
    assert (await client.options("/v1/responses/resp_1")).headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert (await client.put("/v1/responses/resp_1")).headers["allow"] == "DELETE, GET, HEAD"


async def test_an_answer_may_be_bound_to_a_schema(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    wanted = {"type": "json_schema", "name": "place", "schema": schema, "strict": True}
    answer = (await post(client, text={"format": wanted})).json()
    grammar = engine.requests[-1].grammar
    assert grammar is not None and "city" in grammar.text and answer["text"]["format"] == wanted
    assert (await post(client, text={"format": {"type": "json_object"}})).status_code == 200
    assert engine.requests[-1].grammar is not None
    wrong = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}
    assert_error(await post(client, text=wrong), 400, "text.format", param="text.format")
