"""What comes of a request: when its tokens came, and how many they were."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from ingle.bench.serving.connection import AnswerBroken

_MAX_BODY_BYTES = 1 << 24
_SHOWN_CHARS = 300


class RequestFailed(Exception):
    """The server refused a request, or gave an error in its answer."""

    def __init__(self, message: str, status: int = 200) -> None:
        super().__init__(message)
        self.status = status


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


_NULL = msgspec.Raw(b"null")


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: msgspec.Raw = _NULL


_decoder = msgspec.json.Decoder(_Event)


class Body:
    """A whole body, for what is not a stream."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.content = bytearray()

    def begin(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status, self.headers = status, dict(headers)

    def feed(self, chunk: bytes, at: float) -> None:
        self.content += chunk
        if len(self.content) > _MAX_BODY_BYTES:
            raise AnswerBroken(f"the answer is larger than {_MAX_BODY_BYTES} bytes")

    def json(self) -> Any:
        """Raises `RequestFailed` for another status than 200, and for what is no JSON."""
        if self.status != 200:
            raise RequestFailed(f"HTTP {self.status}: {error_text(bytes(self.content))}", self.status)
        try:
            return msgspec.json.decode(self.content)
        except msgspec.DecodeError as error:
            raise RequestFailed(f"the answer is no JSON: {error}") from None


class Stream:
    """Server-sent events of a completion or a chat. Times are `time.perf_counter()`'s."""

    __slots__ = (
        *("_body", "_rest", "cached_tokens", "completion_tokens", "event_s", "finish_reason", "headers"),
        *("last_s", "done", "prompt_tokens", "sent_s", "status", "text"),
    )

    def __init__(self, *, keep_text: bool) -> None:
        self.status = 0
        self.headers: Mapping[bytes, bytes] = {}
        self.sent_s = time.perf_counter()
        self.event_s: list[float] = []
        """When events with text came."""
        self.last_s: float | None = None
        """When the last event of the answer came, which may tell its end alone."""
        self.text: list[str] | None = [] if keep_text else None
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.done = False
        self._rest = b""
        self._body: Body | None = None

    def begin(self, status: int, headers: Mapping[bytes, bytes]) -> None:
        self.status, self.headers = status, headers
        if status != 200 or b"json" in headers.get(b"content-type", b""):
            self._body = Body()
            self._body.begin(status, headers)

    def feed(self, chunk: bytes, at: float) -> None:
        if self._body is not None:
            self._body.feed(chunk, at)
            return
        lines = (self._rest + chunk if self._rest else chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_BODY_BYTES:
            raise AnswerBroken(f"an event is larger than {_MAX_BODY_BYTES} bytes")
        for line in lines:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.done = True
                elif data:
                    self._take(data, at)

    def check(self) -> None:
        """Once all was read. Raises `RequestFailed` unless it is a whole answer."""
        if self._body is not None:
            text = bytes(self._body.content)
            if self.status != 200:
                raise RequestFailed(f"HTTP {self.status}: {error_text(text)}", self.status)
            raise RequestFailed(f"a stream was asked for, and JSON came: {error_text(text)}")
        if not self.done and self.finish_reason is None:
            raise RequestFailed("the stream ended without an end: neither finish_reason nor [DONE]")
        if self.last_s is None:
            raise RequestFailed("the stream has no choices in it")

    def _take(self, data: bytes, at: float) -> None:
        try:
            event = _decoder.decode(data)
        except msgspec.DecodeError as error:
            raise AnswerBroken(f"an event is not of the API: {error}") from None
        if event.error != _NULL:
            raise AnswerBroken(f"the server says: {error_text(data)}")
        if (usage := event.usage) is not None:
            self._count(usage)
        for choice in event.choices or ():
            self.last_s = at
            text = choice.text
            if (delta := choice.delta) is not None:
                text = delta.content or delta.reasoning_content or delta.reasoning or delta.refusal
                if delta.tool_calls and not text:
                    self.event_s.append(at)
            if text:
                self.event_s.append(at)
                if self.text is not None:
                    self.text.append(text)
            if choice.finish_reason is not None:
                self.finish_reason = choice.finish_reason

    def _count(self, usage: _Usage) -> None:
        """Some servers tell it in each event: the last is whole."""
        if usage.completion_tokens is not None:
            self.completion_tokens = usage.completion_tokens
        if usage.prompt_tokens is not None:
            self.prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            self.cached_tokens = usage.prompt_tokens_details.cached_tokens


def error_text(body: bytes) -> str:
    """What an error's body says, for people, in a line."""
    try:
        said = msgspec.json.decode(body)
    except msgspec.DecodeError:
        said = body.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(key):
            said = said[key]
    words = " ".join(str(said).split())
    return words if len(words) <= _SHOWN_CHARS else words[:_SHOWN_CHARS] + "…"
