"""Calls of tools and their results in a conversation, in the forms in which chat templates want them.

Clients send arguments as JSON text. Most templates want an object, which they write as JSON themselves, some the text;
some want no content beside a call, others an empty one; some take one call a message, and some ids of nine letters.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ingle.text.formats.words import call_in_words, result_in_words, text_of

Message = Mapping[str, Any]
Form = Callable[[Sequence[Message]], list[Message]]
"""One way to write a conversation."""

WRONG_BEFORE = r"""\\"|'q': '"""
"""Before the mark in a call's arguments, where these were written as JSON twice, or as Python writes them."""
_SHORT_ID = 9
"""Letters and digits of an id, as Mistral's templates ask for."""
_ID = re.compile(rf"[0-9A-Za-z]{{{_SHORT_ID}}}")


def each(write: Callable[[Message], Message]) -> Form:
    """A form that writes each message by itself."""
    return lambda messages: [write(message) for message in messages]


def calls_of(message: Message) -> Sequence[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    return function if isinstance(function, Mapping) else {}


def marks(message: Message) -> Iterator[str]:
    """What of each call must be in a prompt: `c3`, the name of the call 3, and `a3`, its arguments, if any."""
    for index, call in enumerate(calls_of(message)):
        yield f"c{index}"
        if _arguments(call):
            yield f"a{index}"


def name_of(mark: str) -> str:
    return f"tool_calls[{mark[1:]}]"


def marked(message: Message, mark: Callable[[str], str]) -> Message:
    """With a mark for each name of a function, and one as the arguments."""
    if not calls_of(message):
        return message
    calls = []
    for index, call in enumerate(calls_of(message)):
        arguments = {"q": mark(f"a{index}")} if _arguments(call) else {}
        calls.append({**call, "function": {"name": mark(f"c{index}"), "arguments": json.dumps(arguments)}})
    return {**message, "tool_calls": calls}


def shape(message: Message) -> list[tuple[bool, bool]]:
    ids = [call.get("id") for call in calls_of(message)] or [message.get("tool_call_id")]
    filled = [bool(_arguments(call)) for call in calls_of(message)] or [False]
    return [(has, isinstance(id, str) and bool(_ID.fullmatch(id))) for has, id in zip(filled, ids, strict=True)]


def _arguments(call: Mapping[str, Any]) -> Any:
    """As an object, if they are one; else as they were sent."""
    given = function_of(call).get("arguments")
    if not isinstance(given, str):
        return given if given is not None else {}
    try:
        return json.loads(given) if given.strip() else {}
    except (ValueError, RecursionError):
        return given


def _written(message: Message, arguments: Callable[[Any], Any]) -> Message:
    if not calls_of(message):
        return message
    calls = []
    for call in calls_of(message):
        function = {**function_of(call), "arguments": arguments(_arguments(call))}
        calls.append({"type": "function", **call, "function": function})
    return {**message, "tool_calls": calls}


@each
def _as_objects(message: Message) -> Message:
    return _written(message, lambda arguments: arguments)


@each
def _as_text(message: Message) -> Message:
    return _written(message, lambda given: given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))


def _with_ids(messages: Sequence[Message], write: Callable[[str, str, int], str]) -> list[Message]:
    """`write` makes an id of the one that was sent, the name of the function, and the number of the call."""
    ids: dict[str, str] = {}
    written: list[Message] = []
    count = itertools.count()
    for message in messages:
        if calls_of(message):
            calls = []
            for call in calls_of(message):
                sent = str(call.get("id"))
                ids[sent] = write(sent, str(function_of(call).get("name")), next(count))
                calls.append({**call, "id": ids[sent]})
            message = {**message, "tool_calls": calls}
        elif message.get("role") == "tool":
            sent = str(message.get("tool_call_id"))
            message = {**message, "tool_call_id": ids.get(sent) or write(sent, str(message.get("name")), 0)}
        written.append(message)
    return written


def _short_ids(messages: Sequence[Message]) -> list[Message]:
    return _with_ids(messages, lambda id, name, index: short_id(id))


def _naming_ids(messages: Sequence[Message]) -> list[Message]:
    """As Kimi K2's, whose template writes the id alone."""
    return _with_ids(messages, lambda id, name, index: f"functions.{name}:{index}")


def short_id(id: str) -> str:
    """Its last nine letters and digits, in which ids that servers make differ."""
    return re.sub(r"[^0-9A-Za-z]", "", id)[-_SHORT_ID:].rjust(_SHORT_ID, "0")


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """Calls that were made together, as if each result had been waited for."""
    written: list[Message] = []
    at = 0
    while at < len(messages):
        message, at = messages[at], at + 1
        calls = calls_of(message)
        if len(calls) < 2:
            written.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].get("role") == "tool":
            results.append(messages[at])
            at += 1
        bare = {name: value for name, value in message.items() if name in ("role", "tool_calls")}
        for index, call in enumerate(calls):
            written.append({**(bare if index else message), "tool_calls": [call]})
            found = next((each for each in results if each.get("tool_call_id") == call.get("id")), None)
            if found is not None:
                results.remove(found)
                written.append(found)
        written += results
    return written


def _both(first: Form, second: Form) -> Form:
    return lambda messages: second(first(messages))


CALLS: Sequence[Form] = tuple(
    _both(arguments, other)
    for arguments in (_as_objects, _as_text)
    for other in (list, _one_by_one, _short_ids, _naming_ids)
)


@each
def _empty_content(message: Message) -> Message:
    return {**message, "content": message.get("content", "")}


@each
def _absent_content(message: Message) -> Message:
    """Also of words beside a call."""
    return {name: value for name, value in message.items() if name != "content"} if calls_of(message) else message


@each
def _no_content(message: Message) -> Message:
    """None in it, also in place of words beside a call."""
    return {**message, "content": None} if calls_of(message) else {**message, "content": message.get("content")}


EMPTY: Sequence[Form] = (_empty_content, _absent_content, _no_content)


def in_words(messages: Sequence[Message]) -> list[Message]:
    """For templates that know no tools: calls in what the assistant says, and results in what the user says."""
    written: list[Message] = []
    for message in messages:
        if message.get("role") == "tool":
            result = result_in_words(message.get("content"))
            if written and written[-1].get("role") == "user" and written[-1].get("_results"):
                written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{result}"}
            else:
                written.append({"role": "user", "content": result, "_results": True})
        elif calls_of(message):
            called = "\n".join(
                call_in_words(str(function_of(call).get("name")), _arguments(call)) for call in calls_of(message)
            )
            said = message.get("content")
            said = said if isinstance(said, str) else text_of(said)
            written.append({"role": "assistant", "content": f"{said}\n{called}" if said else called})
        else:
            written.append(message)
    return [{name: value for name, value in message.items() if name != "_results"} for message in written]
