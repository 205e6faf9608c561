"""Calls of tools, read as each kind of body writes them.

A reader tells `Sink.call` once it is certain that there is a call, and nothing before: until then it may still raise
`NotACall`, and all of it is text. From then on what is damaged is passed on as it stands, and left to the tool's owner.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol

from ingle.text.formats.declared import Body, Json, Lax, NamedJson, Pythonic, Tagged
from ingle.text.formats.source import Reading, Source, marks

MAX_HEADER_CHARS = 4096
"""Most that is read in the hope of a name: as much is read again as text."""
_MAX_NAME_CHARS = 256
_MAX_PYTHON_CHARS = 1 << 20
_NAME_KEYS = ("name", "tool_name", "function_name")
_ARGUMENT_KEYS = ("arguments", "parameters", "args")
_IN_JSON = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


class NotACall(Exception):
    """What looked like a call is text."""


class Sink(Protocol):
    """Who is told what is read of calls."""

    def call(self, name: str, id: str | None = None) -> None:
        """Raises `NotACall` where there can be no call of that name."""

    def arguments(self, piece: str) -> None: ...


class Tools:
    """The functions that were given, and the types of their parameters."""

    def __init__(self, tools: Any) -> None:
        functions = [tool.get("function") for tool in tools if isinstance(tool, Mapping)]
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for function in functions:
            if isinstance(function, Mapping):
                schema = function.get("parameters")
                properties = schema.get("properties") if isinstance(schema, Mapping) else None
                self._parameters[str(function.get("name"))] = properties if isinstance(properties, Mapping) else {}

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def types(self, name: str, parameter: str) -> frozenset[str]:
        """JSON's types that a parameter may have; empty where nothing is said."""
        return frozenset(_types(self._parameters.get(name, {}).get(parameter), 4))


def _types(schema: Any, depth: int) -> set[str]:
    if not isinstance(schema, Mapping) or depth == 0:
        return set()
    given = schema.get("type")
    found = {given} if isinstance(given, str) else {each for each in given or () if isinstance(each, str)}
    for name in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(name)
        for choice in choices if isinstance(choices, list) else ():
            found |= _types(choice, depth - 1)
    values = schema.get("enum")
    if not found and isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        found = {"string"}
    return found


def read_body(body: Body, source: Source, sink: Sink, tools: Tools) -> Reading[None]:
    """One call, or a list of them, behind what opens it. Raises `NotACall`."""
    match body:
        case Json():
            yield from _json_calls(source, sink)
        case NamedJson():
            first = yield from source.skip_spaces()
            if first in ("[", "{"):
                yield from _json_calls(source, sink)
            else:
                yield from _named_json(re.compile(body.header), source, sink)
        case Tagged():
            yield from _tagged(body, source, sink, tools)
        case Pythonic():
            yield from _pythonic(source, sink)
        case Lax():
            yield from _lax(body, source, sink)


def _name(text: str) -> str:
    name = text.strip()
    if not name or len(name) > _MAX_NAME_CHARS or any(char.isspace() or char in "<>{}\"'" for char in name):
        raise NotACall
    return name


# ---- JSON


def _json_calls(source: Source, sink: Sink) -> Reading[None]:
    first = yield from source.skip_spaces()
    if first == "{":
        yield from _json_call(source, sink)
        while (yield from source.skip_spaces()) == ";":  # Llama's way to write several
            place = source.hold()
            source.at += 1
            try:
                if (yield from source.skip_spaces()) != "{":
                    raise NotACall
                yield from _json_call(source, sink)
            except NotACall:
                source.rewind(place)
                return
            finally:
                source.release()
        return
    if first != "[":
        raise NotACall
    source.at += 1
    num_calls = 0
    while True:
        next = yield from source.skip_spaces()
        if next == "]" and num_calls:
            source.at += 1
            return
        if next == "," and num_calls:
            source.at += 1
            continue
        if next != "{":
            if num_calls:  # the list is broken off
                return
            raise NotACall
        try:
            yield from _json_call(source, sink)
        except NotACall:
            if not num_calls:
                raise
            return
        num_calls += 1


def _json_call(source: Source, sink: Sink) -> Reading[None]:
    """An object with a name and arguments, in any order."""
    argued = yield from _json_members(source, sink)
    if not argued:
        sink.arguments("{}")


def _json_members(source: Source, sink: Sink) -> Reading[bool]:
    """Returns whether there were arguments. Raises `NotACall` where there is no name."""
    source.at += 1
    start = source.at
    named = argued = False
    early: list[str] = []
    while True:
        next = yield from source.skip_spaces()
        if next == ",":
            source.at += 1
            continue
        if next == "}" and named:
            source.at += 1
            return argued
        if next != '"':
            if named:  # it is broken off, or ends without its brace
                return argued
            raise NotACall
        key = yield from _json_text(source, None if named else start)
        if (yield from source.skip_spaces()) != ":":
            if named:
                return argued
            raise NotACall
        source.at += 1
        yield from source.skip_spaces()
        if key in _NAME_KEYS and not named:
            name = yield from _json_text(source, start)
            sink.call(_name(name))
            named, argued = True, bool(early)
            for piece in early:
                sink.arguments(piece)
        elif key in _ARGUMENT_KEYS and not argued:
            yield from _json_arguments(source, sink if named else _Early(early), None if named else start)
            argued = named
        else:
            yield from _json_value(source, None if named else start)


class _Early:
    """Keeps arguments that come before the name."""

    def __init__(self, pieces: list[str]) -> None:
        self._pieces = pieces

    def call(self, name: str, id: str | None = None) -> None:
        raise NotACall

    def arguments(self, piece: str) -> None:
        self._pieces.append(piece)


def _check_size(source: Source, start: int | None) -> None:
    if start is not None and source.at - start > MAX_HEADER_CHARS:
        raise NotACall


def _json_text(source: Source, start: int | None) -> Reading[str]:
    """A string that comes next. Raises `NotACall`, also where it ends too far behind `start`."""
    if (yield from source.peek()) != '"':
        raise NotACall
    begin = source.at
    source.at += 1
    while (char := (yield from source.peek())) != '"':
        _check_size(source, start)
        if not char:
            raise NotACall
        source.at += 1
        if char == "\\":
            yield from source.peek()
            source.at += 1
    source.at += 1
    try:
        text = json.loads(source.text[begin : source.at], strict=False)
    except ValueError:
        raise NotACall from None
    return str(text)


def _json_arguments(source: Source, sink: Sink, start: int | None) -> Reading[None]:
    """An object is passed on as it comes; so is the JSON text of one, once it is whole."""
    first = yield from source.peek()
    if first == "{":
        yield from _json_span(source, sink, start)
        return
    place = source.hold()
    try:
        yield from _json_value(source, start)
        text = source.text[place : source.at]
    finally:
        source.release()
    if first == '"':
        try:
            inner = json.loads(text, strict=False)
        except ValueError:
            inner = text
        text = inner if str(inner).strip().startswith("{") else json.dumps({"value": inner}, ensure_ascii=False)
    elif text.strip() in ("null", ""):
        text = "{}"
    if text:
        sink.arguments(text)


def _json_span(source: Source, sink: Sink | None, start: int | None = None) -> Reading[None]:
    """An object, a list or a string, passed on as it comes."""
    depth, in_string = 0, False
    while True:
        pattern = _IN_STRING if in_string else _IN_JSON
        match = pattern.search(source.text, source.at)
        end = match.end() if match else len(source.text)
        if match and match[0] == "\\":
            waits = end >= len(source.text) and not source.final  # for the character that it escapes
            end = match.start() if waits else min(end + 1, len(source.text))
        if end > source.at:
            if sink is not None:
                sink.arguments(source.text[source.at : end])
            source.at = end
        _check_size(source, start)
        if match and match[0] != "\\":
            if match[0] == '"':
                in_string = not in_string
            else:
                depth += 1 if match[0] in "{[" else -1
            if depth <= 0 and not in_string:
                return
        if source.at >= len(source.text) or (match and match.start() == source.at):
            if source.final:
                return
            yield


def _json_value(source: Source, start: int | None) -> Reading[None]:
    """Any value, passed over."""
    first = yield from source.peek()
    if first in ("{", "[", '"') and first:
        yield from _json_span(source, None, start)
        return
    while (char := (yield from source.peek())) and char not in ",}]" and not char.isspace():
        _check_size(source, start)
        source.at += 1


# ---- a name, then JSON


def _named_json(header: re.Pattern[str], source: Source, sink: Sink) -> Reading[None]:
    parts: list[str] = []
    place = source.hold()
    try:
        brace = yield from source.until(marks("{"), parts.append, MAX_HEADER_CHARS)
        source.rewind(place + sum(map(len, parts)))
    finally:
        source.release()
    match = header.fullmatch("".join(parts))
    if brace is None or match is None:
        raise NotACall
    sink.call(_name(match["name"]), match.groupdict().get("id"))
    yield from _json_span(source, sink)


# ---- tags


def _tagged(body: Tagged, source: Source, sink: Sink, tools: Tools) -> Reading[None]:
    parts: list[str] = []
    place = source.hold()
    ends = (body.name_end,) if body.name_end else (body.key, body.close)
    try:
        found = yield from source.until(marks(*ends), parts.append, _MAX_NAME_CHARS)
        name = _name("".join(parts))
        if found is None:
            raise NotACall
        if not body.name_end:
            source.rewind(place + sum(map(len, parts)))
    finally:
        source.release()
    sink.call(name)
    opening = "{"
    while True:
        yield from source.skip_spaces()
        if (yield from source.take(body.close)):
            break
        if not (yield from source.take(body.key)):
            break
        keys: list[str] = []
        if (yield from source.until(marks(body.key_end), keys.append, MAX_HEADER_CHARS)) is None:
            break
        key, _, attributes = "".join(keys).strip().partition('"')
        if body.value:
            yield from source.skip_spaces()
            yield from source.take(body.value)
        sink.arguments(opening + json.dumps(key, ensure_ascii=False) + ": ")
        opening = ", "
        yield from _value(body.value_end, tools.types(name, key) or _types_of(attributes), source, sink)
    sink.arguments("{}" if opening == "{" else "}")


def _types_of(attributes: str) -> frozenset[str]:
    if 'string="true"' in attributes:
        return frozenset({"string"})
    return frozenset({"any"}) if 'string="false"' in attributes else frozenset()


def _value(end: str, types: frozenset[str], source: Source, sink: Sink) -> Reading[None]:
    """The text up to `end`, without one line break at either side, as JSON of a type that the parameter may have."""
    if (yield from source.peek()) == "\n":
        source.at += 1
    if types != {"string"}:
        parts: list[str] = []
        yield from source.until(marks(end), parts.append)
        sink.arguments(json.dumps(typed("".join(parts).removesuffix("\n"), types), ensure_ascii=False))
        return
    held = ""
    sink.arguments('"')

    def give(piece: str) -> None:
        nonlocal held
        piece = held + piece
        held = "\n" if piece.endswith("\n") else ""
        if piece := piece.removesuffix("\n"):
            sink.arguments(json.dumps(piece, ensure_ascii=False)[1:-1])

    yield from source.until(marks(end), give)
    sink.arguments('"')


def typed(text: str, types: frozenset[str]) -> Any:
    """What a text stands for, where a parameter has one of the `types`; the text itself if it is none of those."""
    if types == {"string"}:
        return text
    stripped = text.strip()
    python = {"True": True, "False": False, "None": None}
    try:
        value = python[stripped] if stripped in python else json.loads(stripped)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    if "string" in types and not _fits(value, types):
        return text
    return value


def _fits(value: Any, types: frozenset[str]) -> bool:
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types
        case str():
            return False  # a text in quotes, where the text itself may be meant
        case list():
            return "array" in types
    return "object" in types


# ---- Python


def _pythonic(source: Source, sink: Sink) -> Reading[None]:
    if (yield from source.skip_spaces()) != "[":
        raise NotACall
    source.at += 1
    num_calls = 0
    while True:
        next = yield from source.skip_spaces()
        if num_calls and next in (",", "]"):
            source.at += 1
            if next == "]":
                return
            continue
        place = source.hold()
        try:
            yield from _python_call(source, place)
            name, arguments = _evaluated(source.text[place : source.at])
            sink.call(name)
            sink.arguments(json.dumps(arguments, ensure_ascii=False))
        except NotACall:
            if not num_calls:
                raise
            source.rewind(place)
            return
        finally:
            source.release()
        num_calls += 1


def _python_call(source: Source, place: int) -> Reading[None]:
    """`name(…)`, passed over. Raises `NotACall`."""
    while (char := (yield from source.peek())) and (char.isalnum() or char in "_.-"):
        if source.at - place > _MAX_NAME_CHARS:
            raise NotACall
        source.at += 1
    if char != "(" or source.at == place:
        raise NotACall
    depth, quote = 0, ""
    while char := (yield from source.peek()):
        source.at += 1
        if source.at - place > _MAX_PYTHON_CHARS:
            raise NotACall
        if quote:
            if char == "\\":
                yield from source.peek()
                source.at += 1
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return
    raise NotACall


def _evaluated(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition("(")
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise NotACall
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
        json.dumps(arguments, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise NotACall from None
    return name, arguments


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List):
        return list(map(_literal, node.elts))
    if isinstance(node, ast.Dict) and all(key is not None for key in node.keys):
        keys = [ast.literal_eval(key) for key in node.keys if key is not None]
        return dict(zip(map(str, keys), map(_literal, node.values), strict=True))
    value = ast.literal_eval(node)
    if isinstance(value, tuple):
        return list(value)
    return value


# ---- bare keys


def _lax(body: Lax, source: Source, sink: Sink) -> Reading[None]:
    yield from source.skip_spaces()
    if not (yield from source.take("call:")):
        raise NotACall
    parts: list[str] = []
    if (yield from source.until(marks("{"), parts.append, _MAX_NAME_CHARS)) is None:
        raise NotACall
    sink.call(_name("".join(parts)))
    yield from _lax_object(body, source, sink)
    yield from source.skip_spaces()
    yield from source.take(body.close)


def _lax_object(body: Lax, source: Source, sink: Sink) -> Reading[None]:
    """Behind its brace, as JSON. What is damaged ends it, and all that is open is closed."""
    open_ends = ["}"]
    sink.arguments("{")
    key_next, comma = True, ""
    while open_ends:
        char = yield from source.skip_spaces()
        if not char:
            break
        if char in "}]":
            source.at += 1
            sink.arguments(open_ends.pop())
            key_next, comma = bool(open_ends) and open_ends[-1] == "}", ", "
        elif char == ",":
            source.at += 1
            key_next, comma = open_ends[-1] == "}", ", "
        elif key_next:
            keys: list[str] = []
            if (yield from source.until(marks(":"), keys.append, _MAX_NAME_CHARS)) is None:
                break
            key = "".join(keys).strip().strip('"').replace(body.quote, "")
            sink.arguments(comma + json.dumps(key, ensure_ascii=False) + ": ")
            key_next, comma = False, ""
        elif char in "{[":
            source.at += 1
            open_ends.append("}" if char == "{" else "]")
            sink.arguments(comma + char)
            key_next, comma = char == "{", ""
        elif (yield from source.take(body.quote)):
            sink.arguments(comma + '"')
            yield from source.until(
                marks(body.quote), lambda piece: sink.arguments(json.dumps(piece, ensure_ascii=False)[1:-1])
            )
            sink.arguments('"')
            comma = ", "
        else:
            start = source.hold()
            while (next := (yield from source.peek())) and next not in ",}]":
                source.at += 1
            text = source.text[start : source.at].strip()
            source.release()
            plain = text in ("true", "false", "null") or bool(_NUMBER.fullmatch(text))
            sink.arguments(comma + (text if plain else json.dumps(text.strip('"'), ensure_ascii=False)))
            comma = ", "
    for end in reversed(open_ends):
        sink.arguments(end)
