"""Writes a conversation so that a chat template renders all of it, or says which message would be lost.

Templates loop over what they know. What they do not know, such as a role, a second system message or content in parts,
many of them render to nothing, and the model answers a question that nobody asked. So the conversation is rendered
once more with a mark in place of every text, and each mark must be in the prompt. What comes of that depends on the
shape of a conversation, not on its texts, and is remembered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ingle.errors import RequestError
from ingle.text import call_forms
from ingle.text.call_forms import Form, Message, each
from ingle.text.system_message import merged, num_leading_system

Place = tuple[int, int | str | None]
"""Index of a message, and of a part of its content, or what of its calls it is: see `call_forms.marks`."""

MESSAGE_NOT_RENDERED = "message_not_rendered"
_MAX_REMEMBERED = 4096


class TemplateError(RequestError):
    """The template failed; `reason` is what the log should say of it beside the message, if anything."""

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message, param="messages")
        self.reason = reason


class Forms:
    """Which form of a conversation a template renders in full. Safe to use from any thread."""

    def __init__(self, source: str) -> None:
        self._knows_developer = "developer" in source
        self._knows_calls = "tool_calls" in source
        self._remembered: OrderedDict[bytes, tuple[int, Place | None]] = OrderedDict()
        self._lock = threading.Lock()

    def write(
        self,
        messages: Sequence[Message],
        options: Sequence[Any],
        render: Callable[[Sequence[Message]], str],
        *,
        num_before: int = 0,
    ) -> list[Message]:
        """`messages` in the form that `render`, which has the `options`, puts into the prompt in full.

        Raises `RequestError` naming a message that is in no form, of which the first is messages[`num_before`]. What
        else `render` raises than `TemplateError`, such as that it takes too long, is raised at once.
        """
        forms, last_resorts = self._forms(messages)
        key = _shape(messages, options)
        with self._lock:
            found = self._remembered.get(key)
        if found is None:
            found = _first_whole(forms, last_resorts, messages, render)
            with self._lock:
                self._remembered[key] = found
                if len(self._remembered) > _MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        index, lost = found
        if lost is not None:
            raise _refusal(messages, lost, num_before)
        return [*forms, *last_resorts][index](messages)

    def _forms(self, messages: Sequence[Message]) -> tuple[list[Form], list[Form]]:
        """In the order in which they are tried, as it was sent first, and what is tried when none of them will do."""
        roles: list[Form] = [_as_it_is]
        if any(message.get("role") == "developer" for message in messages):
            roles = [_as_it_is, _system_for_developer] if self._knows_developer else [_system_for_developer]
        contents: list[Form] = [_as_it_is, _in_parts]
        if any(isinstance(message.get("content"), list) for message in messages):
            contents.insert(1, _as_text)
        bare = any("content" not in message or message.get("tool_calls") for message in messages)
        empties = [_as_it_is, *(call_forms.EMPTY if bare else ())]
        if not any(message.get("tool_calls") or message.get("role") == "tool" for message in messages):
            return list(map(_all_of, itertools.product(contents, roles, empties))), []
        calls = call_forms.CALLS if self._knows_calls else call_forms.CALLS[:1]
        known = list(map(_all_of, itertools.product(contents, roles, empties, calls)))
        words = map(_all_of, itertools.product(contents, roles, [call_forms.in_words]))
        # Mistral's leave out the system message while a tool's result is the last.
        alone = [_all_of((merged, form)) for form in known] if num_leading_system(messages) else []
        return known, [*alone, *words]


def _all_of(forms: Sequence[Form]) -> Form:
    def write(messages: Sequence[Message]) -> list[Message]:
        written = list(messages)
        for form in forms:
            written = form(written)
        return written

    return write


def _as_it_is(messages: Sequence[Message]) -> list[Message]:
    return list(messages)


@each
def _system_for_developer(message: Message) -> Message:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


@each
def _as_text(message: Message) -> Message:
    """Parts joined by line breaks, as vLLM joins them."""
    texts = list(_texts_of_parts(message.get("content")))
    if not isinstance(message.get("content"), list) or len(texts) < len(message["content"]):
        return message
    return {**message, "content": "\n".join(text for _, text in texts)}


@each
def _in_parts(message: Message) -> Message:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _texts_of_parts(content: Any) -> Iterator[tuple[int, str]]:
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield index, part["text"]


def _texts(message: Message) -> Iterator[tuple[int | None, str]]:
    """The texts of a message that a prompt must hold, with the index of the part. White space alone may be dropped."""
    content = message.get("content")
    if isinstance(content, str):
        return iter([(None, content)] if content.strip() else [])
    return _texts_of_parts(content)


def _shape(messages: Sequence[Message], options: Sequence[Any]) -> bytes:
    """All that decides over what a template leaves out, without the texts."""
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True, default=repr).encode(), digest_size=16)
    for message in messages:
        content = message.get("content")
        size = len(content) if isinstance(content, list) else type(content).__name__
        texts = [index for index, _ in _texts(message)]
        calls = call_forms.shape(message)
        line = f"{message.get('role')!r} {sorted(map(str, message))} {size} {texts} {calls}\n"
        digest.update(line.encode(errors="replace"))
    return digest.digest()


def _first_whole(
    forms: Sequence[Form],
    last_resorts: Sequence[Form],
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], str],
) -> tuple[int, Place | None]:
    """The first form without a loss; else the first in which no more is lost than words beside a call, for which some
    formats have no room; else the first form, and the first loss in it unless the template failed there.

    A template may fail on marks alone: then the prompt itself will tell.
    """
    places = [(index, part) for index, message in enumerate(messages) for part in _parts(message)]
    marked = [_marked(at, message) for at, message in enumerate(messages)]
    lost_in_first: Place | None = None
    second_best: int | None = None
    for index, form in enumerate([*forms, *last_resorts]):
        if index == len(forms) and second_best is not None:
            break
        try:
            prompt = render(form(marked))
        except TemplateError:
            continue
        lost = _lost(places, prompt)
        if not lost:
            return index, None
        grave = [place for place in lost if isinstance(place[1], str) or not messages[place[0]].get("tool_calls")]
        if not grave and second_best is None:
            second_best = index
        if index == 0:
            lost_in_first = (grave or lost)[0]
    return (0, lost_in_first) if second_best is None else (second_best, None)


def _parts(message: Message) -> Iterator[int | str | None]:
    yield from (part for part, _ in _texts(message))
    yield from call_forms.marks(message)


def _mark(place: Place) -> str:
    index, part = place
    return f"zq{index}zq" if part is None else f"zq{index}x{part}zq"


def _marked(index: int, message: Message) -> Message:
    """With a mark for each text, and in each call."""
    message = call_forms.marked(message, lambda part: _mark((index, part)))
    content = message.get("content")
    marks = {part: _mark((index, part)) for part, _ in _texts(message)}
    if isinstance(content, str):
        return {**message, "content": marks.get(None, content)}
    if isinstance(content, list):
        parts = [{**part, "text": marks[at]} if at in marks else part for at, part in enumerate(content)]
        return {**message, "content": parts}
    return message


_FOUND_MARK = re.compile(
    r"""(["']text["']:\s*["'])?"""  # in a list of parts that was not looped over but written out
    rf"""({call_forms.WRONG_BEFORE})?"""
    r"""(zq\d+(?:x[a-z]?\d+)?zq)"""
)
"""A mark, and what stands before it where the template did not write a text but Python's or JSON's form of a value."""


def _lost(places: Sequence[Place], prompt: str) -> list[Place]:
    """Those whose marks the prompt lacks."""
    found = {mark for listed, wrong, mark in _FOUND_MARK.findall(prompt.lower()) if not listed and not wrong}
    return [place for place in places if _mark(place) not in found]


def _refusal(messages: Sequence[Message], lost: Place, num_before: int) -> RequestError:
    index, part = lost
    name = f"messages[{index + num_before}]"
    of_part = f".content[{part}]" if isinstance(part, int) else ""
    if isinstance(part, str):
        return RequestError(
            f"{name}.{call_forms.name_of(part)} would be lost: this model's chat template does not write calls of "
            "tools as they were sent. Serve the model with another --chat-template.",
            param=name,
            code=MESSAGE_NOT_RENDERED,
        )
    return RequestError(
        f"{name}{of_part} would be lost: this model's chat template leaves out a {messages[index].get('role')!r:.40} "
        "message that stands there. Put its text into another one, or serve the model with another --chat-template.",
        param=name,
        code=MESSAGE_NOT_RENDERED,
    )
