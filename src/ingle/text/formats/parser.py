"""Tells thoughts and calls of tools apart from an answer's text, as it comes.

One reader goes through the whole of an answer, and waits where the text ends for now (`source.py`): what it finds is
the same wherever the text was cut, and a whole answer is a stream of one piece.
"""

from __future__ import annotations

import secrets
import string
import uuid
from collections.abc import Sequence
from typing import Any

from ingle.events import Arguments, Event, Text, Thought, ToolCall
from ingle.text.formats.bodies import NotACall, Tools, read_body
from ingle.text.formats.declared import ReasoningFormat, ToolFormat
from ingle.text.formats.of_model import Formats
from ingle.text.formats.source import Marks, Reading, Source, marks

_SHORT = string.ascii_letters + string.digits
_MAX_HEADER_CHARS = 1024


class Parser:
    """Of the text of one choice."""

    def __init__(
        self,
        formats: Formats,
        tools: Sequence[Any] = (),
        *,
        thinking: bool = False,
        parallel: bool = True,
        choice: int = 0,
    ) -> None:
        """Without `tools` nothing is a call. `thinking`: the prompt ends within thoughts, or, of an answer in parts
        with headers, within the header of the first. Not `parallel`: the answer ends with its first call.
        """
        self._source = Source()
        self._out = Out(choice, formats.tools if tools else None, parallel=parallel)
        self._reasoning = formats.reasoning
        self._format = formats.tools if tools else None
        self._tools = Tools(tools)
        if self._reasoning is not None and self._reasoning.channels:
            self._reading = self._harmony(in_header=thinking)
        else:
            self._reading = self._read(thinking=thinking)
        self._ended = False
        self._run()

    @property
    def thinking(self) -> bool:
        return self._out.thinking

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    @property
    def ended(self) -> bool:
        """The one call that is allowed was made: nothing more is wanted."""
        return self._out.full

    def push(self, text: str) -> list[Event]:
        """What the text tells. A `Text` among them has no tokens."""
        if text and not self._ended:
            self._source.push(text)
            self._run()
        return self._out.take()

    def flush(self) -> list[Event]:
        """The same, when no text follows."""
        self._source.final = True
        self._run()
        self._out.flush()
        return self._out.take()

    def _run(self) -> None:
        if not self._ended and next(self._reading, self) is self:
            self._ended = True

    # ---- marks

    def _read(self, *, thinking: bool) -> Reading[None]:
        reasoning, format = self._reasoning, self._format
        at_start = True
        if thinking and reasoning is not None:
            yield from self._thought(reasoning)
        while True:
            if at_start:
                at_start = False
                first = yield from self._source.skip_spaces_given(self._out.text)
                if reasoning is not None and not reasoning.anywhere and (yield from self._source.take(reasoning.open)):
                    yield from self._thought(reasoning)
                    at_start = True
                    continue
                if format is not None and first and first in format.starts:
                    yield from self._call(format, "")
            found = yield from self._source.until(self._looked_for, self._out.text)
            if found is None:
                return
            if reasoning is not None and found == reasoning.open:
                yield from self._thought(reasoning)
            elif format is not None and found in format.opens:
                yield from self._call(format, found)

    @property
    def _looked_for(self) -> Marks:
        reasoning, format = self._reasoning, self._format
        wanted = (reasoning.open,) if reasoning is not None and reasoning.anywhere else ()
        return marks(*wanted, *((*format.opens, *format.dropped) if format is not None else ()))

    def _thought(self, reasoning: ReasoningFormat) -> Reading[None]:
        source, out = self._source, self._out
        format = self._format if self._format is not None and self._format.ends_thought else None
        wanted = marks(reasoning.close, *((*format.opens, *format.dropped) if format is not None else ()))
        out.begin_thought()
        while True:
            found = yield from source.until(wanted, out.text)
            if found is None:
                return
            if found == reasoning.close:
                out.end_thought()
                return
            assert format is not None
            opened = found if found in format.opens else (yield from self._opening(format))
            if opened is None:
                out.text(found)
                continue
            yield from self._call(format, opened)
            if not out.thinking:
                return

    def _opening(self, format: ToolFormat) -> Reading[str | None]:
        """What opens a call, if it comes next."""
        place = self._source.hold()
        try:
            yield from self._source.skip_spaces()
            for mark in format.opens:
                if (yield from self._source.take(mark)):
                    return mark
            self._source.rewind(place)
            return None
        finally:
            self._source.release()

    def _call(self, format: ToolFormat, opened: str) -> Reading[None]:
        """Behind what opens it, which is text if there is no call."""
        source, out = self._source, self._out
        place, before = source.hold(), out.num_calls
        out.known = None if opened else self._tools
        try:
            yield from read_body(format.body, source, out, self._tools)
        except NotACall:
            if out.num_calls == before:
                source.rewind(place)
                out.text(opened)
                return
        finally:
            source.release()
        for close in format.closes:
            yield from source.skip_spaces()
            yield from source.take(close)

    # ---- parts with headers

    def _harmony(self, *, in_header: bool) -> Reading[None]:
        """OpenAI's Harmony: `<|channel|>analysis<|message|>…<|end|><|start|>assistant…`, and to a tool's name."""
        source, out = self._source, self._out
        ends = marks("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
        found: str | None = None
        if in_header:
            found = "<|start|>"
        while True:
            if found in ("<|start|>", "<|channel|>"):
                found = yield from self._part(found)
            else:
                found = yield from source.until(ends, out.text)
            if found is None:
                return

    def _part(self, opened: str) -> Reading[str | None]:
        """A header, and the text that it stands before; what ends that. A header that is none is text."""
        source, out = self._source, self._out
        ends = marks("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
        parts: list[str] = []
        place = source.hold()
        try:
            found = yield from source.until(
                marks("<|message|>", "<|end|>", "<|return|>"), parts.append, _MAX_HEADER_CHARS
            )
            header = "".join(parts)
            if found != "<|message|>":
                source.rewind(place)
                return (yield from source.until(ends, out.text))
        finally:
            source.release()
        words = header.replace("<|channel|>", " ").replace("<|constrain|>", " ").split()
        recipient = next((word.removeprefix("to=") for word in words if word.startswith("to=")), "")
        if recipient.startswith("functions.") and self._format is not None:
            out.known = None
            try:
                out.call(recipient.removeprefix("functions."))
            except NotACall:
                return (yield from source.until(ends, out.text))
            return (yield from source.until(ends, out.arguments))
        if "analysis" not in words:
            return (yield from source.until(ends, out.text))
        out.begin_thought()
        found = yield from source.until(ends, out.text)
        if found is not None:
            out.end_thought()
        return found


class Out:
    """Makes events. White space between thoughts, text and calls belongs to none of them."""

    def __init__(self, choice: int, format: ToolFormat | None, *, parallel: bool) -> None:
        self._choice = choice
        self._short_ids = format is not None and format.short_ids
        self._parallel = parallel
        self._events: list[Event] = []
        self._spaces: list[str] = []
        """Held back, until text follows it."""
        self._at_edge = False
        """Behind a thought or a call."""
        self._gap = ""
        """White space between two texts, before what stood between them."""
        self._told = False
        """Some text was given."""
        self.known: Tools | None = None
        """If given, calls of others are none."""
        self.thinking = False
        self.num_calls = 0
        self.full = False
        self._seen: set[str] = set()

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def forget(self) -> None:
        """What was told so far is none of the answer's."""
        self._events, self._spaces, self._gap, self._told = [], [], "", False

    def text(self, piece: str) -> None:
        if self.full:
            return
        if not (kept := piece.rstrip()):
            self._spaces.append(piece)
            return
        kept, self._spaces = "".join(self._spaces) + kept, [piece[len(kept) :]]
        if self._at_edge:
            kept, self._at_edge = kept.lstrip(), False
            if not self.thinking:
                kept, self._gap = self._gap + kept, ""
        self._told = self._told or not self.thinking
        self._events.append(Thought(self._choice, kept) if self.thinking else Text(self._choice, kept, []))

    def begin_thought(self) -> None:
        self._edge(thinking=True)

    def end_thought(self) -> None:
        self._edge(thinking=False)

    def _edge(self, *, thinking: bool) -> None:
        if not self.thinking and self._told:
            self._gap = self._gap or "".join(self._spaces)
        self._spaces, self._at_edge, self.thinking = [], True, thinking

    def call(self, name: str, id: str | None = None) -> None:
        if self.known is not None and name not in self.known:
            raise NotACall
        if not self._parallel and self.num_calls:
            self.full = True
        if self.full:
            self.num_calls += 1
            return
        self._edge(thinking=False)
        if id is None or id in self._seen:
            id = "".join(secrets.choice(_SHORT) for _ in range(9)) if self._short_ids else f"call_{uuid.uuid4().hex}"
        self._seen.add(id)
        self._events.append(ToolCall(self._choice, self.num_calls, id, name))
        self.num_calls += 1

    def arguments(self, piece: str) -> None:
        if piece and not self.full:
            self._events.append(Arguments(self._choice, self.num_calls - 1, piece))

    def flush(self) -> None:
        """White space that ends an answer is its text, but not where thoughts or calls stand before it."""
        spaces, self._spaces = "".join(self._spaces), []
        if spaces and not self._at_edge and not self.thinking and not self.full:
            self._events.append(Text(self._choice, spaces, []))
