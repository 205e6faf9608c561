"""The official client, for which the API is written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from ingle.server.models import ServedModel

from .fakes import GREETING, MODEL, Health, ScriptedEngine, app_for, served

pytestmark = pytest.mark.anyio


@pytest.fixture
async def sdk(model: ServedModel) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        served(app_for(model, api_keys=("secret",))) as port,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as sdk,
    ):
        yield sdk


async def test_models(sdk: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in sdk.models.list()] == [MODEL, "alias"]
    assert (await sdk.models.retrieve(MODEL)).owned_by == "ingle"
    with pytest.raises(openai.NotFoundError):
        await sdk.models.retrieve("other")


async def test_chat(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    [choice] = answer.choices
    assert (choice.message.content, choice.finish_reason) == (GREETING, "stop")
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert choice.logprobs.content[0].token == "H"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    # An answer goes back as history the way the client dumps it, with all its nulls.
    history: list[Any] = [
        {"role": "user", "content": "hi"},
        choice.message.model_dump(),
        {"role": "user", "content": "more"},
    ]
    assert (await sdk.chat.completions.create(model=MODEL, messages=history)).choices[0].message.content == GREETING


async def test_chat_stream(sdk: openai.AsyncOpenAI) -> None:
    stream = await sdk.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hi"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == GREETING
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None and chunks[-1].usage.total_tokens > 0


async def test_chat_stream_helper(sdk: openai.AsyncOpenAI) -> None:
    """The client's own accumulator takes the chunks."""
    async with sdk.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "hi"}]) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == GREETING


async def test_completions(sdk: openai.AsyncOpenAI) -> None:
    answer = await sdk.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens == list("Hello")
    stream = await sdk.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello"


async def test_errors_become_the_clients_exceptions(sdk: openai.AsyncOpenAI, engine: ScriptedEngine) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await sdk.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        await sdk.completions.create(model="gpt", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        await sdk.with_options(api_key="wrong").models.list()
    engine.fail_after = 2
    with pytest.raises(openai.APIError, match="not finite"):
        async for _ in await sdk.completions.create(model=MODEL, prompt="a", stream=True):
            pass
    engine.status = Health(False, "dead")
    with pytest.raises(openai.InternalServerError, match="dead"):
        await sdk.completions.create(model=MODEL, prompt="a")
