from __future__ import annotations

import gc
import json
import threading
import tracemalloc
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from ingle.request import EngineOutput, EngineRequest, TokenLogprobs
from ingle.server.body import parse_body
from ingle.server.models import ServedModel
from ingle.server.openai.completions import prepare_completion
from ingle.server.openai.protocol import CompletionRequest

from .fakes import GREETING, MAX_MODEL_LEN, MODEL, Health, ScriptedEngine, assert_error, events

pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": "ab", "max_tokens": 100} | body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_a_completion(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.num_cached_tokens = lambda request: 2
    answer = await complete(client)
    num_tokens = len(GREETING.encode()) + 1
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "text_completion",
        "model": MODEL,
        "choices": [{"index": 0, "text": GREETING, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": num_tokens,
            "total_tokens": 3 + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }


async def test_max_tokens_defaults_to_16_and_is_cut_to_the_context(
    client: httpx.AsyncClient, engine: ScriptedEngine
) -> None:
    await client.post("/v1/completions", json={"prompt": "ab"})
    await complete(client, max_tokens=10_000)
    await complete(client, max_tokens=-1)
    room = MAX_MODEL_LEN - 3
    assert [request.sampling.max_tokens for request in engine.requests] == [16, room, room]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["<s>ab"]),
        (["a", "bc"], ["<s>a", "<s>bc"]),
        ([66, 67], [[66, 67]]),
        ([[66], [67, 68]], [[66], [67, 68]]),
    ],
)
async def test_forms_of_a_prompt(
    client: httpx.AsyncClient, engine: ScriptedEngine, prompt: Any, expected: list[Any]
) -> None:
    answer = await complete(client, prompt=prompt)
    sent = [list(request.prompt_token_ids) for request in engine.requests]
    texts = [engine.tokenizer.decode(ids, skip_special_tokens=False) for ids in sent]
    assert [
        text if isinstance(want, str) else ids for ids, text, want in zip(sent, texts, expected, strict=True)
    ] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, sent))


@pytest.mark.parametrize(
    "prompt", [[], [[]], 3, None, [1.5], [True], ["a", 1], [["a"]], {"a": 1}, [-1], [10**9], [[3], "a"]]
)
async def test_wrong_prompts(client: httpx.AsyncClient, prompt: Any) -> None:
    assert_error(await client.post("/v1/completions", json={"prompt": prompt}), 400, param="prompt")


async def test_prompt_is_required(client: httpx.AsyncClient) -> None:
    assert_error(await client.post("/v1/completions", json={}), 400, "prompt is required", param="prompt")


async def test_an_empty_prompt_without_special_tokens(client: httpx.AsyncClient) -> None:
    body = {"prompt": "", "add_special_tokens": False}
    assert_error(await client.post("/v1/completions", json=body), 400, "empty", param="prompt")


async def test_a_prompt_that_fills_the_context(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "x" * 300})
    error = assert_error(response, 400, str(MAX_MODEL_LEN), "301", param="prompt")
    assert error["code"] == "context_length_exceeded"


async def test_too_many_choices(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": ["a"] * 100, "n": 100})
    assert_error(response, 400, "10000 choices", param="prompt")


async def test_choices_of_several_prompts_are_in_order(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.reply = lambda request: [*request.prompt_token_ids[1:], request.sampling.seed or 2, 1]
    letter = engine.tokenizer.encode("0", add_special_tokens=False)[0]
    answer = await complete(client, prompt=["a", "bc"], n=2, seed=letter, best_of=2)
    assert [choice["text"] for choice in answer["choices"]] == ["a0", "a1", "bc0", "bc1"]
    assert answer["usage"]["prompt_tokens"] == 2 + 3
    assert answer["usage"]["completion_tokens"] == 3 + 3 + 4 + 4
    assert len({request.id for request in engine.requests}) == 4


async def test_cached_tokens_count_once_per_prompt(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    """What later choices find in the cache is what the first has just computed: it was not saved."""
    engine.num_cached_tokens = lambda request: 1 if request.id.endswith(("-0", "-2")) else 3
    answer = await complete(client, prompt=["abc", "abd"], n=2)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert answer["usage"]["prompt_tokens"] == 8


async def test_sampling_reaches_the_engine(
    make_client: Callable[..., httpx.AsyncClient], engine: ScriptedEngine
) -> None:
    client = make_client(default_sampling={"temperature": 0.5, "top_k": 7, "min_p": 0.1})
    own = {"top_k": 3, "temperature": None, "logit_bias": {"5": -2}, "ignore_eos": True, "min_tokens": 2}
    await complete(client, **own, presence_penalty=1, stop_token_ids=[9])
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p) == (0.5, 3, 0.1)
    assert sampling.logit_bias == {5: -2.0}
    assert sampling.stop_token_ids == (9,)
    assert (sampling.ignore_eos, sampling.min_tokens, sampling.presence_penalty) == (True, 2, 1.0)
    assert engine.requests[0].eos_token_ids == engine.tokenizer.eos_token_ids


async def test_a_stop_string_cuts_the_text_and_aborts(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    [choice] = (await complete(client, stop=["örl"]))["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("Hello, w", "stop", "örl")
    assert len(engine.aborted) == 1 and engine.running == 0


async def test_length_is_a_finish_reason(client: httpx.AsyncClient) -> None:
    answer = await complete(client, max_tokens=5)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == "Hello"
    assert answer["usage"]["completion_tokens"] == 5


async def test_logprobs(client: httpx.AsyncClient) -> None:
    [choice] = (await complete(client, logprobs=2, max_tokens=2))["choices"]
    assert choice["logprobs"] == {
        "tokens": ["H", "e"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"H": -1.5, "G": -0.5}, {"e": -1.5, "d": -0.5}],
        "text_offset": [0, 1],
    }


async def test_echo(client: httpx.AsyncClient) -> None:
    for prompt in (["ab", "c"], [[66, 67], [68]]):
        answer = await complete(client, prompt=prompt, echo=True, max_tokens=2)
        assert [choice["text"] for choice in answer["choices"]] == ["abHe", "cHe"]


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs(client: httpx.AsyncClient, stream: bool) -> None:
    body = {"prompt": [66, 67], "echo": True, "logprobs": 0, "max_tokens": 2, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    chunks = events(response)[:-1] if stream else [response.json()]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for part in parts for token in part["tokens"]] == ["a", "b", "H", "e"]
    assert [score for part in parts for score in part["token_logprobs"]] == [None, -1.5, -1.5, -1.5]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 1, 2, 3]
    assert [top for part in parts for top in part["top_logprobs"]] == [None, {"b": -1.5}, {"H": -1.5}, {"e": -1.5}]
    assert all("prompt_logprobs" not in chunk["choices"][0] for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_is_scored_without_an_answer(client: httpx.AsyncClient, stream: bool) -> None:
    for prompt in ([66, 67], [66] * MAX_MODEL_LEN):
        body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0, "stream": stream}
        response = await client.post(
            "/v1/completions", json=body | ({"stream_options": {"include_usage": True}} if stream else {})
        )
        assert response.status_code == 200, response.text
        parts = events(response)[:-1] if stream else [response.json()]
        [choice] = [choice for part in parts for choice in part["choices"]]
        assert choice["text"] == "ab" if len(prompt) == 2 else "a" * MAX_MODEL_LEN
        assert choice["finish_reason"] == "length"
        assert choice["logprobs"]["token_logprobs"] == [None, *[-1.5] * (len(prompt) - 1)]
        assert parts[-1]["usage"]["completion_tokens"] == 0 and parts[-1]["usage"]["prompt_tokens"] == len(prompt)


async def test_a_seed_of_minus_one_is_none(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    await complete(client, seed=-1)
    await complete(client, seed=-2, n=2)
    await complete(client, seed=2**63 - 1, n=2)
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[:2] == [None, -2] and None not in seeds[1:] and len(set(seeds)) == 4, "and no other seed becomes it"


async def test_prompt_logprobs(client: httpx.AsyncClient) -> None:
    [choice] = (await complete(client, prompt=[66, 67], prompt_logprobs=1))["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "67": {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
            "66": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
        },
    ]
    assert choice["logprobs"] is None


async def test_stream(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events(await client.post("/v1/completions", json=body))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == GREETING
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(GREETING.encode()) + 1
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1


async def test_stream_without_usage_has_no_usage_field(client: httpx.AsyncClient) -> None:
    *chunks, done = events(await client.post("/v1/completions", json={"prompt": "a", "stream": True}))
    assert done == "[DONE]" and all("usage" not in chunk for chunk in chunks)


async def test_one_stream_carries_every_choice(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.reply = lambda request: [*request.prompt_token_ids[1:], 1]
    *chunks, _ = events(await client.post("/v1/completions", json={"prompt": ["abc", "de"], "n": 2, "stream": True}))
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert list(texts.values()) == ["abc", "abc", "de", "de"]


async def test_best_of_returns_the_likeliest(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    for extra in ({"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}):
        response = await client.post("/v1/completions", json={"prompt": "a"} | extra)
        assert_error(response, 400, "best_of", param="best_of")
    words = ["aa", "bbb", "c", "d"]
    plain = engine.generate

    async def generate(request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        number = int(request.id.rpartition("-")[2])
        engine.say(words[number % 4])
        async for output in plain(request):
            entries = [TokenLogprobs([t], [-abs(number % 4 - 2)], 1) for t in output.token_ids]
            yield msgspec.structs.replace(output, logprobs=entries)

    engine.generate = generate  # type: ignore[method-assign]
    answer = await complete(client, prompt=["x", "y"], n=2, best_of=4, logprobs=None)
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [
        (0, "c"), (1, "bbb"), (2, "c"), (3, "bbb"),
    ]  # fmt: skip
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * sum(len(word) + 1 for word in words)


async def test_suffix_is_refused_without_tokens_for_it(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    error = assert_error(response, 400, "no tokens for that", "leave suffix out", param="suffix")
    assert error["code"] == "unsupported_argument"
    for nothing in (None, ""):
        await complete(client, suffix=nothing)


async def test_a_failed_generation_is_a_500(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after = 3
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert assert_error(response, 500, "the logits are not finite")["code"] == "generation_failed"


async def test_what_cannot_be_computed_now_is_a_503(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after, engine.busy = 0, True
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert assert_error(response, 503, "the logits are not finite")["code"] == "server_busy"


async def test_one_failing_choice_ends_the_others(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after = 3
    assert_error(await client.post("/v1/completions", json={"prompt": "a", "n": 3}), 500, "not finite")
    assert engine.running == 0


async def test_a_failure_in_a_stream_is_an_event(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.fail_after = 3
    *chunks, last = events(await client.post("/v1/completions", json={"prompt": "a", "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hel"
    assert last["error"]["type"] == "server_error"
    assert "not finite" in last["error"]["message"]


async def test_a_dead_engine_is_a_503(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
    engine.die_after = 2
    assert_error(await client.post("/v1/completions", json={"prompt": "a"}), 503, "killed by SIGKILL")
    *_, last = events(await client.post("/v1/completions", json={"prompt": "a", "stream": True}))
    assert last["error"]["code"] == "engine_unavailable"
    engine.status = Health(False, "it died")
    for stream in (False, True):
        assert_error(await client.post("/v1/completions", json={"prompt": "a", "stream": stream}), 503, "it died")


async def test_large_bodies_are_prepared_like_small_ones(client: httpx.AsyncClient) -> None:
    """A prompt of this size is tokenized in a thread; one that no tokens could hold is not tokenized at all."""
    response = await client.post("/v1/completions", json={"prompt": "x" * 10_000})
    assert_error(response, 400, "10001", param="prompt")
    response = await client.post("/v1/completions", json={"prompt": "x" * 100_000})
    assert assert_error(response, 400, "100000 characters", param="prompt")["code"] == "context_length_exceeded"


async def test_preparing_a_body_does_not_hold_up_streams(
    client: httpx.AsyncClient, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_thread = threading.get_ident()
    threads = []
    encode = model.tokenizer.encode

    def noted(text: str, add_special_tokens: bool = True) -> list[int]:
        threads.append(threading.get_ident())
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(model.tokenizer, "encode", noted)
    for size in (10, 10_000):
        await client.post("/v1/completions", json={"prompt": "x" * size})
    assert len(threads) == 2 and loop_thread not in threads


async def test_writing_many_log_probabilities_does_not_hold_up_streams(
    client: httpx.AsyncClient, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop_thread, token = threading.get_ident(), model.tokenizer.token
    threads = set()

    def noted(token_id: int) -> str:
        threads.add(threading.get_ident())
        return token(token_id)

    monkeypatch.setattr(model.tokenizer, "token", noted)
    few = await complete(client, prompt="a", max_tokens=200, n=2, logprobs=1, ignore_eos=True)
    assert threads == {loop_thread}
    threads.clear()
    many = await complete(client, prompt="a", max_tokens=200, n=3, logprobs=1, ignore_eos=True)
    assert len(threads) == 1 and loop_thread not in threads
    assert many["choices"][:2] == few["choices"]


def test_a_request_that_waits_is_kept_compactly(model: ServedModel, engine: ScriptedEngine) -> None:
    """4 bytes a token, whatever the body took: prompts wait by the million tokens."""
    engine.info.max_model_len, engine.info.vocab_size = 8192, 200_000
    num_prompts, num_ids = 64, 2000
    prompts = [[1000 + (31 * row + 7 * i) % 190_000 for i in range(num_ids)] for row in range(num_prompts)]
    body = json.dumps({"prompt": prompts, "max_tokens": 1}).encode()
    del prompts
    prepare_completion(model, parse_body(CompletionRequest, b'{"prompt": "a"}'))
    tracemalloc.start()
    try:
        writer = prepare_completion(model, parse_body(CompletionRequest, body))
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(request.prompt_token_ids) for request in writer.generation.requests) == num_prompts * num_ids
    assert held < 6 * num_prompts * num_ids
