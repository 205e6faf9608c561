"""Tells answers apart as a model's `response_template` declares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import regex

from ingle.events import Event
from ingle.text.formats.bodies import NotACall, Tools
from ingle.text.formats.parser import Out
from ingle.text.formats.template import Field, ResponseTemplate, TooSlow, reading_order


class TemplateParser:
    """Of the text of one choice: what `Parser` is for the formats that ingle knows."""

    def __init__(
        self,
        template: ResponseTemplate,
        tools: Sequence[Any] = (),
        *,
        prompt: str = "",
        parallel: bool = True,
        choice: int = 0,
    ) -> None:
        """The end of the `prompt`, from where the assistant's message begins, belongs to the answer."""
        self._template = template
        self._calls = bool(tools)
        self._tools = Tools(tools)
        self._out = Out(choice, None, parallel=parallel)
        self._buffer, self._at = "", 0
        self._field = template.implicit
        self._opened = ""
        """What opened the field at hand."""
        self._captures: dict[str, str] = {}
        self._body: list[str] = []
        """Of a field that is read once it is whole."""
        self._failed = False
        if (start := self._start(prompt)) is not None:
            self.push(prompt[start:])
            self._out.forget()

    @property
    def thinking(self) -> bool:
        return self._out.thinking

    @property
    def num_calls(self) -> int:
        return self._out.num_calls

    @property
    def ended(self) -> bool:
        return self._out.full

    def push(self, text: str) -> list[Event]:
        self._buffer, self._at = self._buffer[self._at :] + text, 0
        self._run(final=False)
        return self._out.take()

    def flush(self) -> list[Event]:
        self._run(final=True)
        self._close()
        self._out.flush()
        return self._out.take()

    def _start(self, prompt: str) -> int | None:
        try:
            return self._template.anchor.last_end(prompt)
        except TooSlow:
            return None

    def _run(self, *, final: bool) -> None:
        while not self._failed:
            try:
                found, end = self._scan(final=final)
            except TooSlow:
                self._failed = True
                break
            if found is None:
                self._take(self._buffer[self._at : end])
                self._at = end
                return
            field, opens, match = found
            self._take(self._buffer[self._at : match.start()])
            stuck = match.start() == match.end() and not opens and self._at == match.start()
            self._at = match.end()
            self._close()
            if opens:
                self._open(field, match)
            elif stuck:
                break
        self._take(self._buffer[self._at :])
        self._at = len(self._buffer)

    def _scan(self, *, final: bool) -> tuple[tuple[Field, bool, regex.Match[str]] | None, int]:
        """The next delimiter that is certain, or up to where there is none."""
        certain, end = [], len(self._buffer)
        for field, opens in self._watched():
            delimiter = field.open if opens else field.close
            assert delimiter is not None
            match = delimiter.search(self._buffer, self._at, final=final)
            if match is None:
                continue
            if not final and (match.partial or delimiter.can_grow(match, len(self._buffer))):
                end = min(end, match.start())
            else:
                certain.append((field, opens, match))
        found = reading_order(certain) if certain else None
        return (None, end) if found is None or (found[2].start() >= end and not final) else (found, end)

    def _watched(self) -> list[tuple[Field, bool]]:
        field, implicit = self._field, self._template.implicit
        if field is not None and field is not implicit:
            return [(field, False)] if field.close is not None else []
        fields = [each for each in self._template.fields if each.open is not None and (self._calls or not each.is_call)]
        closing = [(implicit, False)] if implicit is not None and implicit.close is not None else []
        return [*((each, True) for each in fields), *closing]

    def _open(self, field: Field, match: regex.Match[str]) -> None:
        self._field, self._opened = field, match[0]
        self._captures = {name: value for name, value in match.groupdict().items() if value is not None}
        if field.is_thought:
            self._out.begin_thought()

    def _take(self, text: str) -> None:
        field = self._field
        if not text or field is None:
            return
        if field.is_thought or field.is_text:
            self._out.text(text)
        elif field.is_call:
            self._body.append(text)

    def _close(self) -> None:
        field, body = self._field, "".join(self._body)
        self._field, self._body = self._template.implicit, []
        if field is None:
            return
        if field.is_thought and self._out.thinking:
            self._out.end_thought()
        if field.is_call:
            try:
                for name, arguments in field.calls(body, self._captures, self._tools):
                    self._out.call(name)
                    self._out.arguments(arguments)
            except (ValueError, NotACall):
                self._out.text(self._opened + body)
