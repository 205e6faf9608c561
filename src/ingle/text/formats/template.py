"""`response_template` of `tokenizer_config.json`: how a model's makers declare what its answers are made of.

The format is that of transformers (`utils/chat_parsing` of 5.x): named fields, each with what opens and closes it, the
kind of its content, and a shape to put that into. Patterns and shapes come with the model: patterns run under `regex`,
which gives up on one that takes too long, and nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex

from ingle.text.formats.bodies import Tools, typed

_MAX_FIELDS = 64
_MAX_PATTERN_CHARS = 4096
_PATIENCE_S = 0.05
"""For one search: patterns of models take microseconds."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
_FIELD_KEYS = {
    *("open", "open_pattern", "close", "close_pattern", "content", "content_args", "repeats", "join", "optional"),
    *("transform", "transform_each"),
}
_TEMPLATE_KEYS = {"version", "defaults", "fields", "start_anchor", "start_anchor_pattern"}
_PLAIN = ("text", "int", "float", "bool")


class TooSlow(Exception):
    """A pattern took too long: what was read so far stands, and the rest is text."""


@dataclass(frozen=True)
class Delimiter:
    """What opens or closes a field: one of several texts, or a pattern."""

    pattern: str
    literals: tuple[str, ...]
    """Empty for a pattern."""

    @cached_property
    def _compiled(self) -> regex.Pattern[str]:
        return regex.compile(self.pattern, regex.DOTALL)

    def search(self, text: str, at: int, *, final: bool) -> regex.Match[str] | None:
        """The first match, which may be partial unless the text is `final`. Raises `TooSlow`."""
        try:
            return self._compiled.search(text, at, partial=not final, timeout=_PATIENCE_S)
        except TimeoutError:
            raise TooSlow from None

    def last_end(self, text: str) -> int | None:
        """Where the last match in `text` ends."""
        last = None
        try:
            for match in self._compiled.finditer(text, timeout=_PATIENCE_S):
                last = match.end()
        except TimeoutError:
            raise TooSlow from None
        return last

    def can_grow(self, match: regex.Match[str], size: int) -> bool:
        """Whether a whole match could be another once more follows a text of that size."""
        if match.end() != size:
            return False
        longer = any(one != match[0] and one.startswith(match[0]) for one in self.literals)
        return match.start() == match.end() or not self.literals or longer


@dataclass(frozen=True)
class Field:
    name: str
    open: Delimiter | None
    close: Delimiter | None
    content: str
    arguments: Mapping[str, Any]
    transform: Any
    each: bool

    @property
    def is_thought(self) -> bool:
        return self.name in _REASONING

    @property
    def is_text(self) -> bool:
        return self.name == "content"

    @property
    def is_call(self) -> bool:
        return self.name == "tool_calls"

    def calls(self, body: str, captures: Mapping[str, str], tools: Tools) -> list[tuple[str, str]]:
        """Names and arguments, as JSON. Raises `ValueError` for what the field cannot hold."""
        value = _parsed(body, self.content, self.arguments)
        if self.transform is not None:
            items = value if self.each else [{"content": value}]
            if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
                raise ValueError("no list of objects")
            value = [_shaped(self.transform, {**captures, **item}) for item in items]
        found = []
        for item in value if isinstance(value, list) else [value]:
            function = item.get("function", item) if isinstance(item, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(function, dict) or not isinstance(name, str) or not name:
                raise ValueError("no function with a name")
            arguments = function.get("arguments", function.get("parameters")) or {}
            if isinstance(arguments, dict):
                arguments = {key: _cast(value, tools.types(name, key)) for key, value in arguments.items()}
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append((name, text))
        return found


@dataclass(frozen=True)
class ResponseTemplate:
    fields: tuple[Field, ...]
    anchor: Delimiter
    """Before the assistant's message, the last time that it stands in a prompt."""

    @property
    def implicit(self) -> Field | None:
        """What all that is in no other field belongs to."""
        return next((field for field in self.fields if field.open is None), None)

    @property
    def has_thoughts(self) -> bool:
        return any(field.is_thought for field in self.fields)

    @property
    def thought_close(self) -> str | None:
        """What closes thoughts, where that is a text."""
        closes = (field.close for field in self.fields if field.is_thought and field.close is not None)
        return next((close.literals[0] for close in closes if close.literals), None)

    def marks(self, tokens: Iterable[str]) -> tuple[str, ...]:
        """Those of the special tokens that the template looks for."""
        delimiters = [each for field in self.fields for each in (field.open, field.close) if each is not None]
        looked_for = "\n".join(regex.sub(r"\\(.)", r"\1", each.pattern) for each in delimiters)
        spelled = "\n".join(json.dumps(dict(field.arguments), ensure_ascii=False) for field in self.fields)
        looked_for += spelled.replace('\\"', '"').replace("\\\\", "")
        return tuple(token for token in tokens if token and token in looked_for)


def read_response_template(spec: Any) -> ResponseTemplate:
    """Raises `ValueError`, saying what is wrong with it."""
    if not isinstance(spec, dict):
        raise ValueError("response_template is no object")
    if spec.get("version", 1) != 1:
        raise ValueError("response_template is of another version")
    if others := sorted(map(str, set(spec) - _TEMPLATE_KEYS)):
        raise ValueError(f"response_template has {others[0]!r:.60}, which is not known")
    given = spec.get("fields")
    if not isinstance(given, dict) or not 0 < len(given) <= _MAX_FIELDS:
        raise ValueError("response_template has no fields")
    fields = tuple(_field(str(name), field) for name, field in given.items())
    if sum(field.open is None for field in fields) > 1:
        raise ValueError("response_template has several fields that nothing opens")
    anchor = _delimiter("response_template", spec, "start_anchor")
    if anchor is None:
        raise ValueError("response_template has no start_anchor")
    return ResponseTemplate(fields, anchor)


def _field(name: str, given: Any) -> Field:
    where = f"response_template: field {name!r:.60}"
    if not isinstance(given, dict) or not set(given) <= _FIELD_KEYS:
        raise ValueError(f"{where} is not of a known form")
    content, arguments = given.get("content", "text"), given.get("content_args", {})
    if content not in _PARSERS or not isinstance(arguments, dict):
        raise ValueError(f"{where} has the content {content!r:.60}, which is not known")
    if content == "xml-inline" and "key" not in _compiled(where, arguments.get("tag_pattern")).groupindex:
        raise ValueError(f"{where} has a tag_pattern without a key")
    return Field(
        name,
        _delimiter(where, given, "open"),
        _delimiter(where, given, "close"),
        content,
        arguments,
        given.get("transform"),
        bool(given.get("transform_each", False)),
    )


def _delimiter(where: str, given: Mapping[str, Any], name: str) -> Delimiter | None:
    texts, pattern = given.get(name), given.get(f"{name}_pattern")
    if texts is not None:
        literals = [texts] if isinstance(texts, str) else texts
        if not isinstance(literals, list) or not all(isinstance(one, str) and one for one in literals) or not literals:
            raise ValueError(f"{where}: {name} is no text")
        ordered = tuple(sorted(set(literals), key=len, reverse=True))
        pattern = "|".join(map(regex.escape, ordered))
        _compiled(where, pattern)
        return Delimiter(pattern, ordered)
    if pattern is None:
        return None
    _compiled(where, pattern)
    return Delimiter(pattern, ())


def _compiled(where: str, pattern: Any) -> regex.Pattern[str]:
    if not isinstance(pattern, str) or len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(f"{where} has a pattern that is no text, or too long")
    try:
        return regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{where} has a pattern that cannot be used: {error}") from None


# ---- contents


def _cast(value: Any, types: frozenset[str]) -> Any:
    if isinstance(value, list) and value and "array" not in types:
        return [_cast(item, types) for item in value]
    return typed(value, types) if isinstance(value, str) and types else value


def _shaped(shape: Any, scope: Mapping[str, Any]) -> Any:
    """A shape with its placeholders, `{name}` or `{name.key}`, filled in."""
    if isinstance(shape, dict):
        return {key: _shaped(value, scope) for key, value in shape.items()}
    if isinstance(shape, list):
        return [_shaped(value, scope) for value in shape]
    if not isinstance(shape, str) or not (whole := regex.fullmatch(r"\{(\w+(?:\.\w+)*)\}", shape)):
        return shape
    value: Any = scope
    for key in whole[1].split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"there is no {key!r:.60}")
        value = value[key]
    return value


def _text(text: str, arguments: Mapping[str, Any]) -> str:
    return text.strip() if arguments.get("strip", True) else text


def _json(text: str, arguments: Mapping[str, Any]) -> Any:
    """JSON, or near to it: `unquoted_keys`, and texts between other marks than quotes (`string_delims`)."""
    marks = [pair for pair in arguments.get("string_delims", []) if isinstance(pair, list) and len(pair) == 2]
    texts: list[str] = []
    working = text
    for start, end in marks:
        parts = working.split(str(start))
        working, rest = parts[0], parts[1:]
        if start == end:  # texts and what is between them take turns
            for index, part in enumerate(rest):
                working += _kept(part, texts) if index % 2 == 0 else part
            continue
        for part in rest:
            inner, _, after = part.partition(str(end))
            working += _kept(inner, texts) + after
    if arguments.get("unquoted_keys"):
        working = regex.sub(r"(?<=[{,])\s*(\w+)\s*:", r'"\1":', working, timeout=_PATIENCE_S)
    for index, inner in enumerate(texts):
        working = working.replace(f"\x01{index}\x02", json.dumps(inner, ensure_ascii=False))
    try:
        return json.loads(working, strict=False)
    except (ValueError, RecursionError):
        if arguments.get("allow_non_json"):
            return _text(text, arguments)
        raise ValueError("no JSON") from None


def _kept(inner: str, texts: list[str]) -> str:
    texts.append(inner)
    return f"\x01{len(texts) - 1}\x02"


def _inner(text: str, arguments: Mapping[str, Any]) -> Any:
    parser = arguments.get("value_parser")
    if not isinstance(parser, dict):
        return text
    given = parser.get("args", {})
    return _parsed(text, str(parser.get("name", "text")), given if isinstance(given, dict) else {})


def _tags(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for match in regex.finditer(arguments["tag_pattern"], text, flags=regex.DOTALL, timeout=_PATIENCE_S):
        groups = match.groupdict()
        key, value = groups["key"], _inner(groups.get("value") or "", arguments)
        if key in found and arguments.get("merge_duplicates"):
            before = found[key] if isinstance(found[key], list) else [found[key]]
            value = [*before, value]
        found[key] = value
    return found


def _lines(text: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    separator = str(arguments.get("kv_sep", ":")) or ":"
    pairs = (line.partition(separator) for line in text.split(str(arguments.get("line_sep", "\n")) or "\n"))
    return {key.strip(): _inner(value.strip(), arguments) for key, found, value in pairs if found}


_PARSERS: Mapping[str, Callable[[str, Mapping[str, Any]], Any]] = {
    **dict.fromkeys(_PLAIN, _text),
    "json": _json,
    "xml-inline": _tags,
    "kv-lines": _lines,
}


def _parsed(text: str, kind: str, arguments: Mapping[str, Any]) -> Any:
    if kind not in _PARSERS:
        raise ValueError(f"no content is {kind!r:.60}")
    try:
        value = _PARSERS[kind](text, arguments)
        return typed(value, frozenset({"any"})) if kind in ("int", "float", "bool") else value
    except TimeoutError:
        raise ValueError("a pattern takes too long") from None


def reading_order(watched: Sequence[tuple[Field, bool, regex.Match[str]]]) -> tuple[Field, bool, regex.Match[str]]:
    """Of delimiters that were found, with whether each opens its field: the first; of several there the longest."""
    return min(
        watched,
        key=lambda found: (found[2].start(), found[2].start() - found[2].end(), not found[1], found[0].name),
    )
