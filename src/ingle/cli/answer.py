"""An answer on its way to the terminal, and how fast it came."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from ingle.events import Begin, Event, Finish, Text, Usage

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Stream(Protocol):
    """`ingle.jobs.AnswerStream`: the events of an answer; closing it stops the answer, also from a signal handler."""

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def close(self) -> None: ...


@dataclass
class Shown:
    """What came of an answer. Times are seconds."""

    pieces: list[str] = field(default_factory=list)
    finish: Finish | None = None
    usage: Usage | None = None
    began: float = 0.0
    first: float | None = None
    ended: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def was_cut(self) -> bool:
        return self.finish is not None and self.finish.reason == "length"

    @property
    def failed(self) -> bool:
        return self.finish is not None and self.finish.reason == "error"

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return 0 if self.usage is None else self.usage.num_prompt_tokens + self.usage.num_completion_tokens

    def speed(self) -> str:
        """Tokens and seconds of prompt and answer."""
        if self.usage is None or self.first is None:
            return f"[stopped after {self.ended - self.began:.2f} s]"
        usage, reading, writing = self.usage, self.first - self.began, self.ended - self.first
        new = usage.num_prompt_tokens - usage.num_cached_tokens
        return (
            f"[prompt: {usage.num_prompt_tokens} tokens, {usage.num_cached_tokens} of them known, in {reading:.2f} s, "
            f"{_rate(new, reading)} · answer: {usage.num_completion_tokens} tokens in {writing:.2f} s, "
            f"{_rate(usage.num_completion_tokens - 1, writing)}]"
        )


def show(stream: Stream) -> Shown:
    """Prints an answer as it comes, and a line feed after it.

    In a terminal the escapes that it may hold are spelled out; elsewhere it is written as it is.
    """
    shown = Shown(began=time.perf_counter())
    spelled = sys.stdout.isatty()
    try:
        for event in stream:
            if isinstance(event, Begin):
                shown.first = time.perf_counter()
            elif isinstance(event, Text) and event.text:
                shown.pieces.append(event.text)
                print(harmless(event.text) if spelled else event.text, end="", flush=True)
            elif isinstance(event, Finish):
                shown.finish = event
            elif isinstance(event, Usage):
                shown.usage = event
    finally:
        stream.close()
        shown.ended = time.perf_counter()
        if shown.pieces and not shown.pieces[-1].endswith("\n"):
            print(flush=True)
    return shown


def harmless(text: str) -> str:
    """Without what a terminal obeys: control characters are spelled out, but for line feeds and tabs."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def _rate(count: int, seconds: float) -> str:
    return f"{max(count, 0) / max(seconds, 1e-9):.1f} tokens/s"
