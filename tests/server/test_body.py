"""What a body may be, whatever the endpoint."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from ingle.limits import LimitsConfig
from ingle.server.body import StrictModel
from ingle.server.models import ServedModel
from ingle.server.openai.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest

from .fakes import ScriptedEngine, app_for, assert_error, client_of, served, until

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "a"} x',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"9" * 5000 + b"}",
    ],
)
async def test_malformed_json(client: httpx.AsyncClient, body: bytes) -> None:
    assert_error(await client.post("/v1/completions", content=body, headers=JSON), 400, "not valid JSON")


@pytest.mark.parametrize(
    "body", [rb'{"prompt": "a\ud83d"}', rb'{"prompt": "a\ud83d and more"}', rb'{"prompt": "a\ude00 and more"}']
)
async def test_half_of_a_surrogate_pair(client: httpx.AsyncClient, body: bytes) -> None:
    """As a client sends it that cuts a text within an emoji."""
    response = await client.post("/v1/completions", content=body, headers=JSON)
    assert_error(response, 400, "not valid JSON", "surrogate pair")


@pytest.mark.parametrize("body", [b"[]", b'"text"', b"3", b"null"])
async def test_not_an_object(client: httpx.AsyncClient, body: bytes) -> None:
    assert_error(await client.post("/v1/completions", content=body, headers=JSON), 400, "must be a JSON object")


@pytest.mark.parametrize("depth", [50, 300, 900, 100_000])
@pytest.mark.parametrize("field", ["prompt", "stop", "metadata", "response_format", "unknown"])
async def test_deep_nesting_is_answered(client: httpx.AsyncClient, depth: int, field: str) -> None:
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    body = b'{"prompt": "a", "' + field.encode() + b'": ' + nested + b"}"
    response = await client.post("/v1/completions", content=body, headers=JSON)
    if field in ("metadata", "unknown") and response.status_code == 200:
        assert depth <= 900
    else:
        assert_error(response, 400, param=response.json()["error"]["param"])


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
async def test_other_content_types(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post("/v1/completions", content=b'{"prompt":"a"}', headers={"Content-Type": content_type})
    assert_error(response, 415, "application/json")


async def test_charset_is_allowed(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert (await client.post("/v1/completions", content=b'{"prompt":"a"}', headers=headers)).status_code == 200


async def test_body_limit_holds_for_announced_and_chunked_bodies(
    make_client: Callable[..., httpx.AsyncClient],
) -> None:
    client = make_client(limits=LimitsConfig(max_body_bytes=1024))
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 100
            yield b" " * 100

    response = await client.post("/v1/completions", content=b" " * 1025, headers=JSON)
    assert_error(response, 413, "1024 bytes (--max-body-bytes)")
    assert response.headers["connection"] == "close"
    assert_error(
        await client.post("/v1/completions", content=endless(), headers=JSON), 413, "1024 bytes (--max-body-bytes)"
    )
    assert read <= 1200


@pytest.mark.parametrize(
    ("extra", "param", "message"),
    [
        ({"temperature": "hot"}, "temperature", 'temperature must be a valid number, got "hot"'),
        ({"temperature": True}, "temperature", "temperature must be a valid number, got true"),
        ({"temperature": -1}, "temperature", "temperature must be between 0.0 and 100.0, got -1"),
        ({"top_p": 0}, "top_p", "top_p must be greater than 0"),
        ({"n": 0}, "n", "n must be between 1 and 128 (--max-n), got 0"),
        ({"n": 10**6}, "n", "n must be between 1 and 128 (--max-n), got 1000000"),
        ({"n": 1.5}, "n", "n must be a valid integer, got 1.5"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, or"),
        ({"max_tokens": -2}, "max_tokens", "max_tokens must be greater than or equal to -1, got -2"),
        ({"max_tokens": 5.5}, "max_tokens", "max_tokens must be a valid integer, got 5.5"),
        (
            {"prompt_logprobs": 21},
            "prompt_logprobs",
            "between 0 and 20 (--max-prompt-logprobs), got 21",
        ),
        ({"stop_token_ids": [1, -5, -6]}, "stop_token_ids", "stop_token_ids must be between 0 and 2147483647, got -5"),
        ({"min_tokens": 20, "max_tokens": 3}, "min_tokens", "min_tokens (20) is greater than max_tokens (3)"),
        ({"seed": 2**64}, "seed", "seed must be"),
        ({"stop": [1]}, "stop", "stop must be a string or a list of strings, got a list"),
        ({"stop": [""]}, "stop", "not empty"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids", "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000"),
        ({"logit_bias": {"x": 1}}, "logit_bias", 'logit_bias has the key "x"'),
        ({"logit_bias": {"1": "a"}}, "logit_bias", 'logit_bias has "a" for token 1'),
        ({"logit_bias": {"1": 101}}, "logit_bias", "between -100.0 and 100.0"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logit_bias": []}, "logit_bias", "logit_bias must be an object"),
        ({"stream": "yes"}, "stream", 'stream must be a valid boolean, got "yes"'),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
        ({"stream": True, "stream_options": []}, "stream_options", "stream_options must be an object, got a list"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "not available when stream is true"),
        ({"user": 3}, "user", "user must be a valid string, got 3"),
        ({"store": 0}, "store", "store must be a valid boolean, got 0"),
        ({"vllm_xargs": {}}, "vllm_xargs", "not supported by this server: leave it out, or null (got an object)"),
        ({"use_beam_search": True}, "use_beam_search", "server: beams are not searched: sample with temperature"),
        ({"use_beam_search": 0}, "use_beam_search", "not supported"),
        ({"logits_processors": ["x"]}, "logits_processors", "no code of others runs in a step"),
        ({"do_sample": False}, "do_sample", "temperature=0 is the same"),
        ({"typical_p": 0.5}, "typical_p", "there is no such sampler"),
        ({"temp": -1}, "temperature", "between 0.0 and 100.0, got -1"),
        ({"bad_words": "x"}, "bad_words", "bad_words must be a list of strings"),
        ({"bad_words": [" "]}, "bad_words", "words that are not empty"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "allows no token"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "1000000"),
        ({"allowed_token_ids": [1], "min_tokens": 2}, "allowed_token_ids", "min_tokens rules out"),
        ({"cache_salt": "x" * 2000}, "cache_salt", "at most 1024 characters"),
        ({"priority": 2**70}, "priority", "priority must be"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "truncate_prompt_tokens must be"),
        ({"response_format": {"type": "xml"}}, "response_format.type", 'text, json_object or json_schema, got "xml"'),
        ({"response_format": "json"}, "response_format", 'response_format must be an object, got "json"'),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is required"),
        ({"guided_regex": 3}, "guided_regex", "must be a string, got 3"),
        ({"guided_choice": []}, "guided_choice", "choice takes 1 to 4096 strings"),
        ({"guided_regex": "("}, "guided_regex", "guided_regex: regex:"),
        ({"guided_json": {"not": {}}}, "guided_json", 'json: Unimplemented keys: ["not"]'),
        ({"guided_json": {"type": "nothing"}}, "guided_json", "Invalid type: nothing"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "json is not valid JSON"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got regex and choice"),
        ({"structured_outputs": {"rule": "a"}}, "structured_outputs", "has no rule"),
        ({"structured_outputs": {"grammar": "?"}}, "structured_outputs", "structured_outputs: grammar:"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens", "says when an answer ends"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "cannot be sent together with guided_regex"),
        ({"model": "gpt"}, "model", "The model 'gpt' does not exist. This server has: tiny/bytes, alias"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_bad_field_is_named(
    client: httpx.AsyncClient, path: str, extra: dict[str, object], param: str, message: str
) -> None:
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = await client.post(path, json=base | extra)
    assert_error(response, 404 if param == "model" else 400, message, param=param)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_neutral_and_informational_fields_are_accepted(client: httpx.AsyncClient, path: str) -> None:
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    neutral = {
        "model": "alias",
        "user": "u",
        "metadata": {"k": "v"},
        "store": True,
        "service_tier": "flex",
        "verbosity": "low",
        "prompt_cache_retention": "24h",
        "spaces_between_special_tokens": False,
        "mirostat": 0,
        "typical_p": 1,
        "dry_multiplier": 0.0,
        "early_stopping": False,
        "safety_identifier": "s",
        "prompt_cache_key": "p",
        "response_format": {"type": "text"},
        "use_beam_search": False,
        "length_penalty": 1.0,
        "truncate_prompt_tokens": None,
        "n": None,
        "temperature": None,
        "stop": None,
        "logit_bias": None,
        "stream": None,
        "stream_options": None,
    }
    assert (await client.post(path, json=base | neutral)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_wrong_fields_are_named_together(make_client: Callable[..., httpx.AsyncClient], path: str) -> None:
    client = make_client(strict_fields=True)
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    wrong = {"foo": 1, "vllm_xargs": True, "n": 0, "temperature": "hot", "top_p": 7, "min_tokens": -1}
    response = await client.post(path, json=base | wrong | {"stream_options": {"x": 1}})
    error = assert_error(response, 400, *wrong, "stream_options.x", "top_p must be between 0.0 and 1.0", param="foo")
    assert error["code"] == "unknown_argument"
    response = await client.post(path, json=base | {f"field{i}": i for i in range(1000)})
    assert_error(response, 400, "field7", "and 92 more", param="field0")
    response = await client.post(path, json={**base, "prompt" if path == "/v1/completions" else "messages": 3, "n": 0})
    assert_error(response, 400, "n must be", "got 3", param=response.json()["error"]["param"])


DIGITS = "9" * 4000
SHAPES = ["%s", "-%s", "%s.5", "1e%s", "[%s]", "[[%s]]", '{"1": %s}', '{"%s": 1}', '{"include_usage": %s}']
OF_THE_CLIENT = {"guided_json", "metadata", "chat_template_kwargs"}
"""What these hold is passed on as it is."""


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
async def test_numbers_of_many_digits_are_refused_in_every_field(
    make_client: Callable[..., httpx.AsyncClient], kind: type[StrictModel]
) -> None:
    client = make_client(strict_fields=True)
    chat = kind is ChatCompletionRequest
    path, own = ("/v1/chat/completions", "messages") if chat else ("/v1/completions", "prompt")
    base = {own: [{"role": "user", "content": "a"}] if chat else "a", "stream": True}
    for field in [*kind.model_fields, *kind.UNSUPPORTED]:
        rest = json.dumps({name: value for name, value in base.items() if name != field})[1:-1]
        for shape in SHAPES:
            body = f'{{"{field}": {shape.replace("%s", DIGITS)}, {rest}}}'
            response = await client.post(path, content=body.encode(), headers=JSON)
            if response.status_code == 200:
                assert field in OF_THE_CLIENT and shape.startswith("{")
                continue
            error = assert_error(response, 400, param=response.json()["error"]["param"])
            assert error["message"].startswith("The body is not valid JSON") or error["param"].startswith(field)
            assert_no_innards(error["message"])


@pytest.mark.parametrize("field", [*ChatMessage.model_fields, *ChatMessage.UNSUPPORTED, "content[0].type"])
async def test_numbers_of_many_digits_are_refused_in_every_message(
    make_client: Callable[..., httpx.AsyncClient], field: str
) -> None:
    client = make_client(strict_fields=True)
    for value in ("%s", '[{"type": "text", "text": %s}]', '[{"type": %s, "text": "a"}]', "[%s]"):
        fields = {"role": '"user"', "content": '"a"'} | {field: value.replace("%s", DIGITS)}
        message = ", ".join(f'"{name}": {text}' for name, text in fields.items())
        body = f'{{"messages": [{{{message}}}]}}'.encode()
        response = await client.post("/v1/chat/completions", content=body, headers=JSON)
        error = assert_error(response, 400, param=response.json()["error"]["param"])
        assert error["param"].startswith("messages[0]")
        assert_no_innards(error["message"])


def assert_no_innards(message: str) -> None:
    """Nothing of the server's inside: no traceback, path, class or module name."""
    assert not re.search(
        r"Traceback|File \"|\.py|/(?:home|usr|tmp|work)|[a-z]Error\b|pydantic|ingle|Request\b", message
    )


@pytest.mark.parametrize("name", ["n", "top_k", "seed", "min_tokens", "max_tokens", "prompt_logprobs", "logprobs"])
async def test_whole_numbers_may_be_written_with_a_point(client: httpx.AsyncClient, name: str) -> None:
    body = b'{"prompt": "a", "max_tokens": 9, "%s": 5.0}' % name.encode()
    assert (await client.post("/v1/completions", content=body, headers=JSON)).status_code == 200


async def test_long_values_are_cut_in_messages(client: httpx.AsyncClient) -> None:
    for extra in ({"model": "m" * 10**6}, {"temperature": "h" * 10**6}, {"x" * 10**6: 1}):
        response = await client.post("/v1/completions", json={"prompt": "a"} | extra)
        assert len(response.content) < 3000


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "deflate", "zstd", "x"])
async def test_encoded_bodies_are_refused(client: httpx.AsyncClient, encoding: str) -> None:
    response = await client.post(
        "/v1/completions", content=b'{"prompt":"a"}', headers=JSON | {"Content-Encoding": encoding}
    )
    assert_error(response, 415, "Content-Encoding", encoding)
    assert response.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_body_that_is_as_it_is_may_say_so(client: httpx.AsyncClient, encoding: str) -> None:
    response = await client.post(
        "/v1/completions", content=b'{"prompt":"a"}', headers=JSON | {"Content-Encoding": encoding}
    )
    assert response.status_code == 200


async def test_bodies_together_are_bounded_while_they_are_read(
    model: ServedModel,
) -> None:
    app = app_for(model, limits=LimitsConfig(max_body_bytes=1024, max_bodies_bytes=1024))
    client, memory = client_of(app), app.state.unread
    waiting = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"prompt":"a"' + b" " * 600
        await waiting.wait()
        yield b"}"

    first = asyncio.ensure_future(client.post("/v1/completions", content=slow(), headers=JSON))
    await until(lambda: memory.num_bytes > 600, within_s=5.0)
    body = b'{"prompt":"a"}' + b" " * 500
    response = await client.post("/v1/completions", content=body, headers=JSON)
    assert_error(response, 503, "at most 1024 are taken (--max-bodies-bytes)")
    assert int(response.headers["retry-after"]) > 0
    waiting.set()
    assert (await first).status_code == 200
    assert (await client.post("/v1/completions", content=body, headers=JSON)).status_code == 200
    assert memory.num_bytes == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": str(LimitsConfig().max_body_bytes + 1)}, 413),
        ({"Content-Length": str(10**15)}, 413),
        ({"Content-Length": "100", "Content-Encoding": "gzip"}, 415),
        ({"Content-Length": "100", "Content-Type": "text/plain"}, 415),
        ({"Content-Length": "100", "Authorization": "Bearer wrong"}, 401),
        ({"Transfer-Encoding": "chunked", "Authorization": ""}, 401),
    ],
)
async def test_what_headers_tell_is_refused_before_the_body_is_asked_for(
    model: ServedModel, headers: dict[str, str], status: int
) -> None:
    given = {"Content-Type": "application/json", "Authorization": "Bearer key", "Expect": "100-continue"} | headers
    lines = ["POST /v1/completions HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in given.items())]
    async with served(app_for(model, api_keys=("key",))) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write("\r\n".join([*lines, "", ""]).encode())
        raw = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert raw.startswith(b"HTTP/1.1 %d " % status) and b"connection: close" in raw


@pytest.mark.parametrize("tensor", ["gASVAAAAAAAAAA==", [0.5, 0.25], {"data": "AAAA", "dtype": "float32"}])
async def test_no_tensor_comes_in_a_request(client: httpx.AsyncClient, engine: ScriptedEngine, tensor: Any) -> None:
    answer = await client.post("/v1/completions", json={"prompt": "a", "prompt_embeds": tensor})
    assert_error(answer, 400, "prompt_embeds", param="prompt_embeds")
    parts = [{"type": kind, kind: tensor} for kind in ("image_embeds", "audio_embeds")]
    for part in parts:
        asked = {"messages": [{"role": "user", "content": [part]}]}
        assert_error(await client.post("/v1/chat/completions", json=asked), 400, param="messages[0].content[0].type")
    assert engine.requests == []
