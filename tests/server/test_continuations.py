"""A completion goes on where its prompt ends, for tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer as Backend

from ingle.server.models import ServedModel
from ingle.text.tokenizer import Tokenizer
from tests.text import toys

from .fakes import MAX_MODEL_LEN, Info, ScriptedEngine, app_for, client_of, events

pytestmark = pytest.mark.anyio

KINDS = {"byte-level": toys.byte_level, "sentencepiece": toys.sentence_piece}
PROMPTS = ["a", " ab", "ab c", "你好", "ab\n", "😀", "a 😀", "<tool>"]
ANSWERS = [" ab", "b c", "a", "😀 a", " 你好", "\nab", "  b"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend: Backend = KINDS[request.param]()
    eos = "</s>" if request.param == "sentencepiece" else "<|im_end|>"
    return Tokenizer(backend, special_tokens={"eos_token": eos}, eos_token_ids=[], chat_template=None)


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer, Info(MAX_MODEL_LEN, tokenizer.vocab_size), lambda request: ())


@pytest.fixture
def client(model: ServedModel, tokenizer: Tokenizer, engine: ScriptedEngine) -> httpx.AsyncClient:
    return client_of(app_for(model, tokenizer=tokenizer, engine=engine, chat_template=None))


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """As the model writes it after a text: without the space that this tokenizer puts before one."""
    ids = tokenizer.encode("a" + answer, add_special_tokens=False)
    return ids[len(tokenizer.encode("a", add_special_tokens=False)) :]


async def post(client: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> list[dict[str, Any]]:
    response = await client.post("/v1/completions", json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    parts = events(response)[:-1] if stream else [response.json()]
    return [choice for part in parts for choice in part["choices"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_prompt_and_answer_are_one_text(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool, as_ids: bool
) -> None:
    for prompt in PROMPTS:
        for answer in ANSWERS:
            ids = answer_ids(tokenizer, answer)
            engine.reply = lambda request, ids=ids: [*ids, *tokenizer.eos_token_ids]
            prompt_ids = tokenizer.encode(prompt)
            whole = tokenizer.decode([*prompt_ids, *ids])
            assert whole == prompt + answer, "as these tokenizers lose nothing"
            body = {"prompt": prompt_ids if as_ids else prompt, "max_tokens": 40}
            assert "".join(part["text"] for part in await post(client, body, stream)) == answer
            assert "".join(part["text"] for part in await post(client, body | {"echo": True}, stream)) == whole


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_with_a_leading_space_matches_the_first_token(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool
) -> None:
    ids = answer_ids(tokenizer, " ab")
    engine.reply = lambda request: ids
    parts = await post(client, {"prompt": "c", "stop": [" a"]}, stream)
    assert "".join(part["text"] for part in parts) == "" and parts[-1]["stop_reason"] == " a"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("echo", [False, True])
async def test_offsets_are_positions_in_the_text(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer, stream: bool, as_ids: bool, echo: bool
) -> None:
    for prompt in PROMPTS:
        for answer in ANSWERS:
            ids = answer_ids(tokenizer, answer)
            engine.reply = lambda request, ids=ids: [*ids, *tokenizer.eos_token_ids]
            prompt_ids = tokenizer.encode(prompt)
            body = {"prompt": prompt_ids if as_ids else prompt, "max_tokens": 40, "logprobs": 0, "echo": echo}
            parts = await post(client, body, stream)
            text = "".join(part["text"] for part in parts)
            lists = [part["logprobs"] for part in parts if part["logprobs"]]
            tokens = [token for each in lists for token in each["tokens"]]
            offsets = [offset for each in lists for offset in each["text_offset"]]
            assert len(offsets) == len(ids) + 1 + len(prompt_ids) * echo
            assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] == len(text)
            for token, offset in zip(tokens, offsets, strict=True):
                hidden = token in ("<s>", "</s>", "<|im_end|>")
                split = "\ufffd" in token
                first = offset == 0 and text.startswith(token.lstrip(" "))
                assert hidden or split or first or text.startswith(token, offset), (text, token, offset)
            for char in "你😀":
                if char in text:
                    assert text.index(char) + 1 in offsets


async def test_a_character_that_the_prompt_begins_and_the_answer_ends(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    ids = answer_ids(tokenizer, "😀")
    engine.reply = lambda request: [*ids[-2:], *tokenizer.eos_token_ids]
    prompt = [*tokenizer.encode("a"), *ids[:-2]]
    for echo, whole in ((False, "😀"), (True, "a😀")):
        (choice,) = await post(client, {"prompt": prompt, "echo": echo}, stream=False)
        assert choice["text"] == whole


async def test_an_echo_is_what_was_sent(
    client: httpx.AsyncClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    special = next(iter(tokenizer.special_tokens.values()))
    engine.reply = lambda request: tokenizer.eos_token_ids
    sent = f"a{special}b"
    (choice,) = await post(client, {"prompt": sent, "echo": True, "logprobs": 0}, stream=False)
    assert choice["text"] == sent
    offsets = dict(zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True))
    assert offsets["b"] == len(sent) - 1
