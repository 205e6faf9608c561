"""How many tokens a text has: by the server's `/tokenize`, or by a tokenizer on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ingle.bench.serving.answer import Body, RequestFailed
from ingle.bench.serving.connection import AnswerBroken, Client
from ingle.errors import ConfigError, IngleError

Counter = Callable[[str], Awaitable[int]]
"""Tokens of a text, without special tokens."""


class Counting(NamedTuple):
    counter: Counter
    described: str


async def find_counter(client: Client, model: str, tokenizer: str | None) -> Counting | None:
    """What counts, or None where nothing does. Raises `ConfigError` for a tokenizer that was asked for."""
    if tokenizer is not None:
        return Counting(await asyncio.to_thread(_local, tokenizer), f"tokenizer {tokenizer}")
    if (asked := await _of_server(client, model)) is not None:
        return asked
    try:
        return Counting(await asyncio.to_thread(_stored, model), f"tokenizer of {model} on this machine")
    except IngleError:
        return None


async def _of_server(client: Client, model: str) -> Counting | None:
    bodies: tuple[dict[str, Any], ...] = (
        {"model": model, "add_special_tokens": False},  # vLLM and ingle
        {"add_special": False},  # llama.cpp
    )
    for fields, key in zip(bodies, ("prompt", "content"), strict=True):
        counter = _asking(client, fields, key)
        try:
            if await counter("one two three") > 0:
                return Counting(counter, "the server's /tokenize")
        except (RequestFailed, AnswerBroken):
            continue
    return None


def _asking(client: Client, fields: dict[str, Any], key: str) -> Counter:
    path = f"{client.address.root}/tokenize"

    async def counter(text: str) -> int:
        body = Body()
        await client.ask("POST", path, msgspec.json.encode({**fields, key: text}), body)
        said = body.json()
        tokens = said.get("tokens") if isinstance(said, dict) else None
        if not isinstance(tokens, list):
            raise RequestFailed("/tokenize gives no tokens")
        return len(tokens)

    return counter


def _local(name: str) -> Counter:
    """Raises `ConfigError`."""
    try:
        path = Path(name)
        if path.name == "tokenizer.json" and path.is_file():
            return _of_file(path)
        from ingle.hub.resolve import ensure_model

        return _of_model(ensure_model(name).path)
    except IngleError as error:
        raise ConfigError(f"--tokenizer {name}: {error}") from None


def _stored(name: str) -> Counter:
    """Nothing is fetched. Raises `IngleError`."""
    from ingle.hub.resolve import resolve_model

    return _of_model(resolve_model(name).path)


def _of_file(path: Path) -> Counter:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # of the library, which has no type for it
        raise ConfigError(f"{path} is no tokenizer: {error}") from None

    async def counter(text: str) -> int:
        return len(backend.encode(text, add_special_tokens=False).ids)

    return counter


def _of_model(path: Path) -> Counter:
    from ingle.text.load import load_tokenizer

    tokenizer = load_tokenizer(path)

    async def counter(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    return counter
