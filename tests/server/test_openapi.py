"""The OpenAPI document: valid, whole, and true of what the server answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from ingle.server.app import ENDPOINTS
from ingle.server.description import document
from ingle.server.endpoints import Endpoint

pytestmark = pytest.mark.anyio

IDS = [f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(document(ENDPOINTS)))
    return made


def refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from refs(each)


def test_it_is_valid(schema: dict[str, Any]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(schema)


async def test_the_server_hands_it_out(client: httpx.AsyncClient, schema: dict[str, Any]) -> None:
    assert (await client.get("/openapi.json")).json() == schema


def test_every_reference_has_its_schema_and_every_schema_a_reference(schema: dict[str, Any]) -> None:
    named = {ref.removeprefix("#/components/schemas/") for ref in refs(schema)}
    assert named == schema["components"]["schemas"].keys()


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=IDS)
def test_every_endpoint_is_described_whole(schema: dict[str, Any], endpoint: Endpoint) -> None:
    path = re.sub(r"\{(\w+):\w+\}", r"{\1}", endpoint.path)
    operation = schema["paths"][path][endpoint.method.lower()]
    assert operation["summary"]
    assert {each["name"] for each in operation.get("parameters", ())} == set(re.findall(r"\{(\w+)\}", path))
    responses = operation["responses"]
    assert {"200", "401", "403", "405", "408", "431", "500", "503"} <= responses.keys()
    if endpoint.body is not None:
        assert {"400", "404", "413", "415", "429"} <= responses.keys() and operation["requestBody"]["required"]
    for status, response in responses.items():
        content = response["content"]["application/json"]["schema"]
        assert content, f"nobody has said what {status} holds"
    streams = "stream" in str(schema["components"]["schemas"].get(getattr(endpoint.body, "__name__", ""), {}))
    assert ("text/event-stream" in responses["200"]["content"]) == (streams and not endpoint.path.endswith("render"))


def test_it_has_the_bounds_and_what_is_not_supported(schema: dict[str, Any]) -> None:
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0.0, "maximum": 100.0}
    assert fields["top_p"]["anyOf"][0]["exclusiveMinimum"] == 0.0
    assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
    assert fields["use_beam_search"]["enum"] == [False, None]
    assert not re.search(r'"(?:ge|le|gt|lt)":', json.dumps(schema))


def test_who_may_ask(schema: dict[str, Any]) -> None:
    assert schema["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert schema["components"]["securitySchemes"]["key"]["name"] == "x-api-key"
    assert schema["security"] == [{}, {"bearer": []}, {"key": []}]
    assert schema["paths"]["/health"]["get"]["security"] == []
