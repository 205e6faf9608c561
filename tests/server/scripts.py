"""Answers as their events, for what is told apart within them before any text is."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st

from ingle.events import Arguments, Begin, Event, Finish, Text, Thought, ToolCall
from ingle.request import TokenLogprobs
from ingle.server.generation import Generation

NUM_CACHED = 3


def said(text: str, size: int = 2) -> Iterator[Event]:
    """A token for every two characters."""
    for start in range(0, len(text), size):
        yield Text(0, text[start : start + size], [start % 7])


def thought(text: str, size: int = 2) -> Iterator[Event]:
    for start in range(0, len(text), size):
        yield Text(0, "", [start % 7])
        yield Thought(0, text[start : start + size])


def call(index: int, name: str, arguments: str) -> Iterator[Event]:
    yield ToolCall(0, index, f"call_{index}", name)
    for start in range(0, len(arguments), 3):
        yield Text(0, "", [start % 7])
        yield Arguments(0, index, arguments[start : start + 3])


def answer(*parts: Iterable[Event], reason: Any = "stop", stop: Any = None) -> list[Event]:
    """The last token is one that no text shows."""
    told = [Begin(0, NUM_CACHED), *(event for part in parts for event in part), Text(0, "", [1])]
    if reason == "stop" and any(isinstance(event, ToolCall) for event in told):
        reason = "tool_calls"
    return [*told, Finish(0, reason, stop, sum(isinstance(event, Thought) for event in told))]


ANSWERS: dict[str, list[Event]] = {
    "text": answer(said("Hello, wörld 你好 😀!")),
    "thought and text": answer(thought("Let me see.\n"), said("\n\n42")),
    "one call": answer(call(0, "weather", '{"city": "Zürich", "days": 3}')),
    "text and calls": answer(
        said("I'll look. "), call(0, "weather", '{"city":"Bern"}'), said("\n"), call(1, "weather", '{"city":"Genf"}')
    ),
    "all, in turns": answer(
        thought("first"), said("A."), thought("then"), call(0, "now", "{}"), said("\nB."), call(1, "now", ""), said(" ")
    ),
    "cut in a text": answer(said("and so o"), reason="length"),
    "cut in a thought": answer(thought("hm, "), reason="length"),
    "cut in a call": answer(call(0, "weather", '{"city": "Zü'), reason="length"),
    "at a stop string": answer(said("one, two"), reason="stop", stop="END"),
    "nothing": answer(),
    "white space": answer(said(" \n ")),
}
KINDS = ("text", "thought", "call")


def tell(monkeypatch: pytest.MonkeyPatch, told: Sequence[Event], random: Random | None = None) -> None:
    """Every request is answered with these events, which come one by one or in random portions."""

    async def run(
        self: Generation, choice: int, prompt: Any, choices: Any, request: Any
    ) -> AsyncGenerator[Sequence[Event], None]:
        engine: Any = self.model.engine
        engine.requests.append(request)
        self.model.queue.leave(request.id)
        left = list(told)
        while left:
            size = 1 if random is None else random.randint(1, 4)
            portion, left = left[:size], left[size:]
            yield portion

    monkeypatch.setattr(Generation, "_run", run)


def _random_answer(runs: list[tuple[str, list[tuple[str, int]]]], scored: bool, reason: str) -> list[Event]:
    told: list[Event] = []
    calls = 0
    for kind, pieces in runs:
        if kind == "call":
            told.append(ToolCall(0, calls, f"call_{calls}", f"tool{calls}"))
        for piece, num_tokens in pieces:
            entries = [TokenLogprobs([65 + n], [-1.0 - n], 1) for n in range(num_tokens)]
            text = piece if kind == "text" else ""
            told.append(Text(0, text, list(range(num_tokens)), entries if scored else None))
            if kind == "thought":
                told.append(Thought(0, piece))
            elif kind == "call":
                told.append(Arguments(0, calls, piece))
        calls += kind == "call"
    return answer(told, reason=reason)


answers = st.builds(
    _random_answer,
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.lists(st.tuples(st.text(" \n{}ab", max_size=3), st.integers(0, 2)), max_size=4),
        ),
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from(["stop", "length"]),
)


def portions(told: Sequence[Event], random: Random) -> Iterator[Sequence[Event]]:
    at = 0
    while at < len(told):
        size = random.randint(1, 4)
        yield told[at : at + size]
        at += size


TOOL_TEMPLATE = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.id }} {{ c.function.name }} {{ c.function.arguments }}]{% endfor %}"
    "{% if m.name %}={{ m.name }}{% endif %}\n{% endfor %}"
    "{% if enable_thinking is defined %}E{{ enable_thinking }}{% endif %}"
    "{% if reasoning_effort is defined %}R{{ reasoning_effort }}{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""That of a model which knows tools and thoughts."""
