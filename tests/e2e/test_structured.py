"""Answers of the default model that follow schemas, at temperature 1, through the server as its clients use it."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from jsonschema import Draft202012Validator

from tests.e2e.conftest import Server

_TEXT = {"type": "string", "maxLength": 24}
SCHEMAS: dict[str, dict[str, Any]] = {
    "nesting and arrays": {
        "type": "object",
        "properties": {
            "title": _TEXT,
            "author": {
                "type": "object",
                "properties": {"name": _TEXT, "born": {"type": "integer", "minimum": 1000, "maximum": 2020}},
                "required": ["name", "born"],
                "additionalProperties": False,
            },
            "tags": {"type": "array", "items": {"type": "string", "minLength": 1, "maxLength": 8}, "maxItems": 3},
        },
        "required": ["title", "author", "tags"],
        "additionalProperties": False,
    },
    "enums in Chinese": {
        "type": "object",
        "properties": {
            "城市": {"enum": ["北京", "上海", "广州", "深圳"]},
            "天气": {"type": "string", "pattern": "^[晴阴雨雪]{1,3}$"},
            "备注": {"type": ["string", "null"], "maxLength": 10},
        },
        "required": ["城市", "天气", "备注"],
        "additionalProperties": False,
    },
    "patterns and formats": {
        "type": "object",
        "properties": {
            "phone": {"type": "string", "pattern": "^\\+[0-9]{1,3} [0-9]{4,8}$"},
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2}$"},
        },
        "required": ["phone", "day", "code"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "object",
        "properties": {
            "price": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 1000},
            "count": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 500},
            "ratio": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["price", "count", "ratio"],
        "additionalProperties": False,
    },
    "references and alternatives": {
        "$defs": {
            "circle": {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1, "maximum": 99}},
                "required": ["kind", "radius"],
                "additionalProperties": False,
            },
            "group": {
                "type": "object",
                "properties": {
                    "kind": {"const": "group"},
                    "shapes": {"type": "array", "items": {"$ref": "#/$defs/circle"}, "minItems": 1, "maxItems": 2},
                },
                "required": ["kind", "shapes"],
                "additionalProperties": False,
            },
        },
        "anyOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/group"}],
    },
}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def check(client: openai.OpenAI, seed: int) -> None:
    """Every other answer is streamed."""
    name, schema = list(SCHEMAS.items())[seed % len(SCHEMAS)]
    options: dict[str, Any] = {
        "model": "smollm2:135m",
        "messages": [{"role": "user", "content": f"Write an example of {name} as JSON."}],
        "temperature": 1,
        "seed": seed,
        "max_tokens": 400,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    }
    if seed // len(SCHEMAS) % 2:
        chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True) if c.choices]
        text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert reason == "stop", (name, seed, text)
    checker = Draft202012Validator.FORMAT_CHECKER
    Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def check_all(client: openai.OpenAI, seeds: range) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, itertools.repeat(client), seeds))


def test_20_of_20_answers_follow_their_schemas(client: openai.OpenAI) -> None:
    check_all(client, range(20))


@pytest.mark.slow
def test_200_of_200_answers_follow_their_schemas(client: openai.OpenAI) -> None:
    check_all(client, range(1000, 1200))


def test_what_cannot_be_followed_is_a_400_before_anything_is_streamed(server: Server, client: openai.OpenAI) -> None:
    body = {"prompt": "x", "stream": True, "max_tokens": 4}
    for field, value in {
        "guided_json": {"not": {"type": "null"}},
        "guided_regex": "(",
        "guided_grammar": "start: A\nA: /(.*a.{30})/ & /(.*b.{30})/ & ~/(.*c.{20})/",
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
    }.items():
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, field: value})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text
    check(client, 0)


def test_completions_and_vllms_fields(client: openai.OpenAI) -> None:
    for extra, allowed in (
        ({"guided_choice": ["red", "green"]}, {"red", "green"}),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, {a + b + c for a in "ab" for b in "ab" for c in "ab"}),
        ({"guided_grammar": 'root ::= "你好" "!"?'}, {"你好", "你好!"}),
    ):
        made = client.completions.create(model="smollm2:135m", prompt="A word:", n=3, seed=1, extra_body=extra)
        assert {choice.text for choice in made.choices} <= allowed
        assert {choice.finish_reason for choice in made.choices} == {"stop"}
