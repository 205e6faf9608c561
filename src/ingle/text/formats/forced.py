"""Calls that a model must make: a list of objects, which a grammar can hold it to, whatever it writes by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_DEPTH = 256


def calls_schema(tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of a list of calls of the `tools`, of just one if not `parallel`; the format `json` reads it."""
    calls = [_call(tool["function"], index) for index, tool in enumerate(tools)]
    most = {} if parallel else {"maxItems": 1}
    return {"type": "array", "minItems": 1, **most, "items": {"anyOf": calls}}


def _call(function: Mapping[str, Any], index: int) -> dict[str, Any]:
    place = f"#/items/anyOf/{index}/properties/arguments"
    arguments = _moved(function.get("parameters") or {"type": "object"}, place, 0)
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": arguments},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str, depth: int) -> Any:
    """A schema whose references are to itself, within another one."""
    if depth > _MAX_DEPTH:
        raise ValueError("is nested too deeply")
    if isinstance(schema, list):
        return [_moved(each, place, depth + 1) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _moved(value, place, depth + 1) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
