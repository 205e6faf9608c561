"""What must hold for any tokens and for any body."""

from __future__ import annotations

import asyncio
import json
import string
from typing import Any

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.server.models import ServedModel
from ingle.server.openai.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest
from ingle.text.chat_template import ChatTemplate
from ingle.text.load import TextSide
from ingle.text.tokenizer import Tokenizer

from .fakes import MAX_MODEL_LEN, MODEL, TEMPLATE, Info, ScriptedEngine, app_for, client_of, events


def server_for(tokenizer: Tokenizer) -> tuple[httpx.AsyncClient, ScriptedEngine]:
    engine = ScriptedEngine(tokenizer, Info(MAX_MODEL_LEN, tokenizer.vocab_size), lambda request: ())
    engine.say("ok")
    template = ChatTemplate(TEMPLATE, tokenizer.special_tokens)
    model = ServedModel(engine, TextSide(tokenizer, template, {}), (MODEL,), "/models/tiny")
    return client_of(app_for(model, access_log=False)), engine


def post(client: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    content = json.dumps(body).encode()
    return asyncio.run(client.post(path, content=content, headers={"Content-Type": "application/json"}))


characters = st.sampled_from("ab \né你😀�")


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(characters, max_size=12).map(str.encode)
    | st.lists(st.integers(0, 255), max_size=20).map(bytes),  # broken UTF-8 as well
    tokens_per_step=st.integers(1, 5),
    stop=st.lists(st.text(characters, min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 30),
    n=st.integers(1, 3),
    chat=st.booleans(),
)
def test_joined_deltas_are_the_whole_text(
    tokenizer: Tokenizer, text: bytes, tokens_per_step: int, stop: list[str], max_tokens: int, n: int, chat: bool
) -> None:
    client, engine = server_for(tokenizer)
    token_of = {tokenizer.token_bytes(token): token for token in range(2, tokenizer.vocab_size)}
    reply = [*(token_of[bytes([byte])] for byte in text), *tokenizer.eos_token_ids[:1]]
    engine.reply = lambda request: reply
    engine.tokens_per_step = tokens_per_step
    prompt = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = prompt | {"n": n, "stop": stop, "max_tokens": max_tokens}
    whole = post(client, path, body).json()
    *chunks, usage, _ = events(post(client, path, body | {"stream": True, "stream_options": {"include_usage": True}}))
    assert usage["usage"] == whole["usage"]
    for choice in whole["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        texts = [part["delta"].get("content", "") if chat else part["text"] for part in own]
        assert "".join(texts) == (choice["message"]["content"] if chat else choice["text"])
        for field in ("finish_reason", "stop_reason"):
            assert own[-1][field] == choice[field]
    assert engine.running == 0


def requests_of(chat: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies with all that shows in an answer, of those fields that a stream takes as well."""
    texts = st.text(characters, max_size=4)
    optional: dict[str, st.SearchStrategy[Any]] = {
        "n": st.integers(1, 3),
        "max_tokens": st.integers(1, 30),
        "min_tokens": st.just(1),
        "stop": st.lists(st.text(characters, min_size=1, max_size=3) | st.just("</s>"), max_size=2),
        "stop_token_ids": st.lists(st.integers(2, 250), max_size=3),
        "include_stop_str_in_output": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "seed": st.integers(0, 9),
    }
    if chat:
        messages = st.lists(texts.map(lambda text: {"role": "user", "content": text}), min_size=1, max_size=2)
        scored = {"logprobs": st.just(True), "top_logprobs": st.integers(0, 3)}
        return st.one_of(
            st.fixed_dictionaries({"messages": messages}, optional=optional),
            st.fixed_dictionaries({"messages": messages, **scored}, optional=optional),
        )
    ids = st.lists(st.integers(1, 250), min_size=1, max_size=5)
    prompts = texts | ids | st.lists(texts, min_size=1, max_size=3) | st.lists(ids, min_size=1, max_size=3)
    optional |= {"echo": st.booleans(), "logprobs": st.integers(0, 3)}
    return st.fixed_dictionaries({"prompt": prompts}, optional=optional)


@settings(max_examples=200, deadline=None)
@given(
    chat_body=st.booleans().flatmap(lambda chat: st.tuples(st.just(chat), requests_of(chat))),
    replies=st.lists(st.lists(st.integers(1, 250), max_size=15), min_size=1, max_size=3),
    tokens_per_step=st.integers(1, 5),
)
def test_a_stream_adds_up_to_the_whole_answer(
    tokenizer: Tokenizer, chat_body: tuple[bool, dict[str, Any]], replies: list[list[int]], tokens_per_step: int
) -> None:
    """Texts, log probabilities, finish reasons and usage, for any request and any tokens."""
    chat, body = chat_body
    client, engine = server_for(tokenizer)
    engine.reply = lambda request: [*replies[int(request.id.rpartition("-")[2]) % len(replies)], 1]
    engine.tokens_per_step = tokens_per_step
    engine.num_cached_tokens = lambda request: len(request.prompt_token_ids) // 2
    path = "/v1/chat/completions" if chat else "/v1/completions"
    whole = post(client, path, body).json()
    *chunks, usage, done = events(
        post(client, path, body | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    joined: dict[int, list[dict[str, Any]]] = {}
    for chunk in chunks:
        [choice] = chunk["choices"]
        joined.setdefault(choice["index"], []).append(choice)
    assert [choice["index"] for choice in whole["choices"]] == sorted(joined)
    for choice in whole["choices"]:
        pieces = joined[choice["index"]]
        assert joined_text(pieces) == (choice["message"]["content"] if chat else choice["text"])
        assert joined_logprobs(pieces) == choice["logprobs"]
        assert all(piece["finish_reason"] is None for piece in pieces[:-1])
        for field in ("finish_reason", "stop_reason"):
            assert pieces[-1][field] == choice[field]
    assert engine.running == 0


def joined_text(pieces: list[dict[str, Any]]) -> str:
    return "".join(piece["delta"].get("content", "") if "delta" in piece else piece["text"] for piece in pieces)


def joined_logprobs(pieces: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Lists end to end, whatever their names; None when no piece has any."""
    scored = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    names = scored[0].keys() if scored else ()
    joined = {name: [entry for part in scored for entry in part[name] or ()] for name in names}
    return joined | ({"refusal": None} if "refusal" in joined else {}) if scored else None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(string.ascii_letters, max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
field_names = st.sampled_from(
    sorted(
        CompletionRequest.model_fields.keys()
        | ChatCompletionRequest.model_fields.keys()
        | CompletionRequest.UNSUPPORTED.keys()
        | ChatCompletionRequest.UNSUPPORTED.keys()
    )
)
message_fields = st.sampled_from(sorted(ChatMessage.model_fields.keys() | ChatMessage.UNSUPPORTED.keys()))
junk = st.dictionaries(field_names | st.text(max_size=5), json_values, max_size=3)
prompts = json_values | st.text(max_size=5) | st.lists(st.integers(-2, 300), max_size=4)
messages = json_values | st.lists(
    st.builds(
        lambda base, extra: base | extra,
        st.just({"role": "user", "content": "a"}),
        st.dictionaries(message_fields, json_values, max_size=2),
    ),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(body=st.builds(lambda own, extra: own | extra, st.fixed_dictionaries({"prompt": prompts}), junk) | json_values)
def test_no_completion_body_breaks_the_server(tokenizer: Tokenizer, body: Any) -> None:
    check_answered(tokenizer, "/v1/completions", body)


@settings(max_examples=200, deadline=None)
@given(
    body=st.builds(lambda own, extra: own | extra, st.fixed_dictionaries({"messages": messages}), junk) | json_values
)
def test_no_chat_body_breaks_the_server(tokenizer: Tokenizer, body: Any) -> None:
    check_answered(tokenizer, "/v1/chat/completions", body)


@settings(max_examples=150, deadline=None)
@given(field=field_names, value=json_values)
def test_no_single_field_breaks_the_server(tokenizer: Tokenizer, field: str, value: Any) -> None:
    check_answered(tokenizer, "/v1/completions", {"prompt": "a", field: value})
    check_answered(tokenizer, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], field: value})


def check_answered(tokenizer: Tokenizer, path: str, body: Any) -> None:
    client, engine = server_for(tokenizer)
    response = post(client, path, body)
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"] and error["message"]
    assert engine.running == 0
