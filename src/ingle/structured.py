"""What an answer may be bound to: a schema, an expression, some choices, a grammar. Plain values, and their checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec

from ingle.limits import limits

KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Binds an answer. One of the first five is given; names and meanings are vLLM's.

    Raises `ValueError` for none or several of them, and for what is too large, before anything is compiled.
    """

    json: str | bool | dict[str, Any] | None = None
    """A JSON Schema, or its text. What of the standard cannot be kept to is refused."""
    regex: str | None = None
    """A regular expression that all of the answer matches, in the syntax of Rust's `regex`."""
    choice: tuple[str, ...] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """A grammar as Lark writes it, whose rule `start` the answer follows, or in GBNF, whose rule is `root`."""
    json_object: bool | None = None
    """The answer is some JSON object."""
    whitespace_pattern: str | None = None
    """What may stand between the tokens of JSON, as a regular expression; by default a few blanks and line feeds."""
    disable_any_whitespace: bool = False
    """Nothing stands between the tokens of JSON."""
    disable_additional_properties: bool = False
    """Objects have the properties that the schema names, and no others, where it does not say whether there may be."""
    after: str = ""
    """The answer is free until it has this text, such as `</think>`, and bound from there on."""
    asked_as: str = "structured_outputs"
    """The field of the request that it came in, which errors name."""

    def __post_init__(self) -> None:
        if self.json is False:
            raise ValueError("json is the schema false, which no answer can follow")
        if self.choice is not None:
            msgspec.structs.force_setattr(self, "choice", _choices(self.choice))
        if not isinstance(self.json_object, bool | None):
            raise ValueError(f"json_object must be true or false, got {self.json_object!r:.80}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r:.80}")
        given = self._given()
        if len(given) != 1:
            raise ValueError(f"takes one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}")
        if self.json is not None:
            msgspec.structs.force_setattr(self, "json", _schema(self.json))
        for name in ("json", "regex", "grammar", "whitespace_pattern", "after"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} must be a string, got {value!r:.80}")
            _check_size(name, len((value or "").encode(errors="replace")))
        if (self.whitespace_pattern or self.disable_any_whitespace) and not (self.json or self.json_object):
            raise ValueError(f"whitespace is that of JSON, and {given[0]} is given")

    def _given(self) -> list[str]:
        return [name for name in KINDS if getattr(self, name) not in (None, False)]

    @property
    def kind(self) -> str:
        """The one of `KINDS` that is given."""
        return self._given()[0]

    @classmethod
    def of(cls, value: Any) -> StructuredOutputs:
        """From an object of JSON, or from vLLM's own `StructuredOutputsParams`. Raises `ValueError`."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            value = _attributes(value)
        given = {name: each for name, each in value.items() if each is not None and name not in _IDLE}
        if unknown := [name for name in given if name not in cls.__struct_fields__ and given[name] is not False]:
            known = ", ".join(name for name in cls.__struct_fields__ if name != "asked_as")
            raise ValueError(f"has no {str(unknown[0])[:80]}: there are {known}")
        return cls(**{name: each for name, each in given.items() if name in cls.__struct_fields__})


_IDLE = ("backend", "disable_fallback", "_backend", "_backend_was_auto")
"""Which library binds the answer is no choice here."""


def _attributes(value: Any) -> dict[str, Any]:
    """The public fields of another tool's object."""
    if not hasattr(value, "__dict__") or isinstance(value, type):
        raise ValueError(f"must be an object with one of {', '.join(KINDS)}, got {value!r:.80}")
    return {name: each for name, each in vars(value).items() if not name.startswith("_")}


class Grammar(msgspec.Struct, frozen=True):
    """As llguidance reads it; it was compiled once, and is not refused."""

    text: str
    after: str = ""
    """The answer is free until it has this text."""
    is_json: bool = False
    """All of it is JSON, whose numbers are to end."""
    fuel: int = 1_000_000
    """Most work to compile it."""
    num_bytes: int = 0
    """What it takes compiled, as far as that is known."""


def _choices(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"choice must be a list of strings, got {values!r:.80}")
    choices = tuple(values)
    if (text := limits().over("max_grammar_choices", len(choices), f"choice has {len(choices)} strings")) is not None:
        raise ValueError(text)
    if not choices or any(not isinstance(each, str) or not each for each in choices):
        raise ValueError(f"choice takes 1 to {limits().max_grammar_choices} strings that are not empty")
    _check_size("choice", sum(len(each.encode(errors="replace")) for each in choices))
    return choices


def _check_size(name: str, size: int) -> None:
    if (text := limits().over("max_grammar_bytes", size, f"{name} has {size} bytes")) is not None:
        raise ValueError(text)


def _schema(value: Any) -> str:
    """The text of a schema. Properties come in answers as they are ordered here."""
    if isinstance(value, str):
        _check_size("json", len(value))
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"json is not valid JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise ValueError(f"json must be a JSON Schema, which is an object, got {value!r:.80}")
    _check_depth(value)
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"json is no JSON Schema: {error}") from None


def _check_depth(value: dict[str, Any] | bool) -> None:
    level: list[Any] = [value]
    for _ in range(limits().max_schema_depth):
        nested = [each for each in level if isinstance(each, dict | list | tuple)]
        level = [inner for each in nested for inner in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    most = limits().max_schema_depth
    raise ValueError(f"json is nested too deeply: at most {most} levels are taken{limits().by('max_schema_depth')}")
