from __future__ import annotations

import json

import pytest

from ingle.text.formats.forced import calls_schema
from tests.text.formats.test_parser import Found, read

PLACE = {"type": "object", "$defs": {"city": {"type": "string"}}, "properties": {"to": {"$ref": "#/$defs/city"}}}
TOOLS = [
    {"type": "function", "function": {"name": "go", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]


def test_the_schema_of_calls() -> None:
    schema = calls_schema(TOOLS, parallel=False)
    assert schema["maxItems"] == schema["minItems"] == 1 and "maxItems" not in calls_schema(TOOLS, parallel=True)
    go, now = schema["items"]["anyOf"]
    assert now["properties"] == {"name": {"const": "now"}, "arguments": {"type": "object"}}
    reference = go["properties"]["arguments"]["properties"]["to"]["$ref"]
    found = schema
    for key in reference.removeprefix("#/").split("/"):
        found = found[int(key)] if isinstance(found, list) else found[key]
    assert found == {"type": "string"}


def test_a_schema_that_never_ends() -> None:
    deep: dict = {}
    for _ in range(300):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="too deeply"):
        calls_schema([{"function": {"name": "f", "parameters": deep}}], parallel=True)


def test_what_follows_the_schema_is_read() -> None:
    calls = [{"name": "f", "arguments": {"a": "x"}}, {"name": "g", "arguments": {}}]
    assert read(json.dumps(calls), "json") == Found("", "", [("f", '{"a": "x"}'), ("g", "{}")])
    assert read("<think>so</think>" + json.dumps(calls[1:]), "json", "think") == Found("so", "", [("g", "{}")])
