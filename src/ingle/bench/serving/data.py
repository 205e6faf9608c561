"""What is asked: sessions of one or more turns, made up or read from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ingle.bench.serving.options import DataOptions, dataset_of
from ingle.bench.serving.tokens import Counter
from ingle.bench.serving.words import FILLER, WORDS
from ingle.errors import ConfigError

Message = dict[str, Any]
DEFAULT_OUTPUT_LEN = 128
WARM_UP_OUTPUT_LEN = 8
_MAX_FITS = 12
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


@dataclass(frozen=True)
class Turn:
    messages: tuple[Message, ...]
    """What is said beside what was said before."""
    max_tokens: int


@dataclass(frozen=True)
class Session:
    turns: tuple[Turn, ...]


class Synthetic:
    """Made-up texts of common words, of exact lengths where something counts their tokens."""

    def __init__(self, options: DataOptions, counter: Counter | None) -> None:
        self._options = options
        self._counter = counter
        self._prefixes: dict[int, str] = {}
        self.num_inexact = 0
        """Prompts whose length no words would give."""

    def described(self) -> str:
        options = self._options
        ratio = f" ± {options.range_ratio:.0%}" if options.range_ratio else ""
        lengths = f"{options.input_len} tokens in, {options.output_len or DEFAULT_OUTPUT_LEN} out{ratio}"
        prefix = f", behind one of {options.num_prefixes} beginnings of {options.prefix_len} tokens"
        turns = f"; {options.turns} turns a session" if options.turns > 1 else ""
        return f"made-up texts of {lengths}{prefix if options.prefix_len else ''}{turns}"

    async def sessions(self, name: str, count: int) -> list[Session]:
        """The same for the same name and seed, and others for others, so that no prompt is known to the server."""
        self._prefixes.clear()
        return [await self._session(f"{self._options.seed}/{name}", index) for index in range(count)]

    def skip(self, count: int) -> None:
        """Made-up sessions go by their names."""

    async def _session(self, seed: str, index: int) -> Session:
        options, rng = self._options, random.Random(f"{seed}/{index}")
        prefix = ""
        if options.prefix_len:
            prefix = await self._prefix(seed, rng.randrange(options.num_prefixes))
        turns = []
        for _ in range(options.turns):
            num_in = _varied(options.input_len, options.range_ratio, rng)
            num_out = _varied(options.output_len or DEFAULT_OUTPUT_LEN, options.range_ratio, rng)
            text = await self._text(prefix, num_in + (options.prefix_len if prefix else 0), rng)
            message = {"role": "user", "content": text}
            turns.append(Turn((message,), num_out))
            prefix = ""
        return Session(tuple(turns))

    async def _prefix(self, seed: str, index: int) -> str:
        if index not in self._prefixes:
            rng = random.Random(f"{seed}/prefix/{index}")
            self._prefixes[index] = await self._text("", self._options.prefix_len, rng)
        return self._prefixes[index]

    async def _text(self, prefix: str, length: int, rng: random.Random) -> str:
        """`length` tokens, the prefix's among them."""
        words = rng.choices(WORDS, k=length if not prefix else max(length - self._options.prefix_len, 1))
        text = _joined(prefix, words)
        if self._counter is None:
            return text
        for _ in range(_MAX_FITS):
            count = await self._counter(text)
            if count == length:
                return text
            if count > length:  # so some words have several tokens: the place of these is filled with short ones
                del words[max(len(words) - (count - length), 1) :]
            else:
                words += [FILLER] * (length - count)
            text = _joined(prefix, words)
        self.num_inexact += 1
        return text


def _joined(prefix: str, words: list[str]) -> str:
    return " ".join([prefix, *words] if prefix else words)


def _varied(length: int, ratio: float, rng: random.Random) -> int:
    if not ratio:
        return length
    return max(rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))), 1)


class Recorded:
    """A file's prompts and conversations, in an order that the seed gives; from the beginning again when all were
    asked."""

    def __init__(self, options: DataOptions, counter: Counter | None) -> None:
        assert options.dataset_path is not None
        self._options, self._counter = options, counter
        self._path = options.dataset_path
        self._conversations = list(_read(options.dataset_path, dataset_of(options)))
        random.Random(options.seed).shuffle(self._conversations)
        self._next = 0

    def described(self) -> str:
        turns = f", {self._options.turns} turns a session at most" if self._options.turns > 1 else ""
        return f"{len(self._conversations)} conversations of {self._path.name}{turns}"

    @property
    def repeats(self) -> bool:
        """Whether some were asked more than once, so that a server may have kept what it computed of them."""
        return self._next > len(self._conversations)

    async def sessions(self, name: str, count: int) -> list[Session]:
        """The next in the file's order, whatever the name."""
        found = []
        for _ in range(count):
            found.append(await self._session(self._conversations[self._next % len(self._conversations)]))
            self._next += 1
        return found

    def skip(self, count: int) -> None:
        """Those that a run asked before which this one completes."""
        self._next += count

    async def _session(self, conversation: _Conversation) -> Session:
        turns = []
        for messages, reply in self._turns_of(conversation):
            num_out = self._options.output_len or conversation.max_tokens or await self._length(reply)
            turns.append(Turn(messages, num_out))
        return Session(tuple(turns))

    def _turns_of(self, conversation: _Conversation) -> list[tuple[tuple[Message, ...], str]]:
        if self._options.turns > 1 or conversation.first_turn_only:
            return list(conversation.turns())[: self._options.turns]
        return [conversation.whole()]

    async def _length(self, reply: str) -> int:
        if not reply or self._counter is None:
            return DEFAULT_OUTPUT_LEN
        return max(await self._counter(reply), 1)


Dataset = Synthetic | Recorded


def dataset(options: DataOptions, counter: Counter | None) -> Dataset:
    """Raises `ConfigError` for a file that cannot be read."""
    return Synthetic(options, counter) if options.dataset_path is None else Recorded(options, counter)


def warm_ups(options: DataOptions, counter: Counter | None) -> Synthetic:
    """Short answers to made-up texts, of which no measured prompt begins as they do."""
    alone = replace(
        options, dataset_path=None, dataset_name=None, prefix_len=0, turns=1, output_len=WARM_UP_OUTPUT_LEN,
        range_ratio=0.0,
    )  # fmt: skip
    return Synthetic(alone, counter)


@dataclass(frozen=True)
class _Conversation:
    asked: tuple[Message, ...]
    max_tokens: int | None = None
    first_turn_only: bool = False
    """As users of ShareGPT's file count: a request is the first question alone."""

    def turns(self) -> Iterator[tuple[tuple[Message, ...], str]]:
        """What is said in each turn, and the answer that stands there."""
        said: list[Message] = []
        for message in self.asked:
            if message["role"] != "assistant":
                said.append(message)
            elif said:
                yield tuple(said), _plain(message)
                said = []
        if said:
            yield tuple(said), ""

    def whole(self) -> tuple[tuple[Message, ...], str]:
        """All up to the last answer, and that."""
        if self.asked[-1]["role"] == "assistant" and len(self.asked) > 1:
            return self.asked[:-1], _plain(self.asked[-1])
        return self.asked, ""


def _plain(message: Message) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _read(path: Path, kind: str | None) -> Iterator[_Conversation]:
    """Raises `ConfigError`, which names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None
    found = 0
    for where, entry in _entries(path, text, kind):
        try:
            conversation = _conversation(entry)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ConfigError(f"--dataset-path {path}, {where}: {error or 'not a conversation'}") from None
        if conversation is not None:
            found += 1
            yield conversation
    if not found:
        raise ConfigError(f"--dataset-path {path}: there is no prompt in it")


def _entries(path: Path, text: str, kind: str | None) -> Iterator[tuple[str, Any]]:
    if kind == "sharegpt" or (kind is None and text.lstrip().startswith("[")):
        try:
            entries = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--dataset-path {path} is no JSON: {error}") from None
        if not isinstance(entries, list):
            raise ConfigError(f"--dataset-path {path}: a list of conversations belongs there")
        yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ConfigError(f"--dataset-path {path}, line {number} is no JSON: {error}") from None


def _conversation(entry: Any) -> _Conversation | None:
    """None for one in which nothing is asked. Raises `ValueError` for another shape."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, Mapping):
        raise ValueError("a text or an object belongs here")
    entry = entry["body"] if isinstance(entry.get("body"), Mapping) else entry  # a line of a batch
    limit = next((entry[key] for key in ("max_tokens", "output_tokens", "output_len") if entry.get(key)), None)
    max_tokens = None if limit is None else int(limit)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"{max_tokens} tokens are asked for")
    if isinstance(said := entry.get("conversations") or entry.get("conversation"), list):
        messages = [{"role": _ROLES.get(str(one["from"]), one["from"]), "content": one["value"]} for one in said]
        return _checked(messages, max_tokens, first_turn_only=True)
    if isinstance(said := entry.get("messages"), list):
        return _checked([dict(one) for one in said], max_tokens)
    prompt = next((entry[key] for key in ("prompt", "text", "question", "input") if entry.get(key)), None)
    if not isinstance(prompt, str):
        raise ValueError('a "prompt", "messages" or "conversations" belongs here')
    return _checked([{"role": "user", "content": prompt}], max_tokens)


def _checked(messages: list[Message], max_tokens: int | None, *, first_turn_only: bool = False) -> _Conversation | None:
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError('each message needs "role" and "content"')
    while messages and messages[0]["role"] == "assistant":  # answers to what was cut off
        del messages[0]
    if all(message["role"] != "user" or not message["content"] for message in messages):
        return None
    return _Conversation(tuple(messages), max_tokens, first_turn_only)
