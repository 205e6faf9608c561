"""The endpoints as an OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import UnionType
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from ingle.limits import LimitsConfig, holding
from ingle.server.access import HEALTH_PATHS
from ingle.server.body import StrictModel
from ingle.server.endpoints import Endpoint
from ingle.server.errors import ErrorBody
from ingle.version import __version__

_Kind = type[msgspec.Struct] | UnionType
_REF = "#/components/schemas/{}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_ALWAYS = (401, 403, 405, 408, 431, 500, 503)
"""Errors that any request may get."""
_WITH_BODY = (400, 404, 413, 415, 429, 504)
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_HEADERS = {
    "X-Request-Id": {"description": "Names the request in the log: the client's own, or a new one."},
    "X-Ingle-Ignored-Fields": {"description": "Fields of the body that nobody here knows, and that changed nothing."},
}


def document(endpoints: Sequence[Endpoint], limits: LimitsConfig = LimitsConfig()) -> dict[str, Any]:  # noqa: B008
    """OpenAPI 3.1: bodies are described by what validates them within the limits, answers by what writes them."""
    with holding(limits):
        return _document(endpoints)


def _document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    bodies = dict.fromkeys(body for endpoint in endpoints for body in bodies_of(endpoint))
    _, defined = models_json_schema([(b, "validation") for b in bodies], ref_template=_REF.format("{model}"))
    kinds = [*dict.fromkeys(kind for endpoint in endpoints for kind in _kinds(endpoint))]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF.format("{name}"))
    of_kind = dict(zip(kinds, schemas, strict=True))
    requests: dict[str, Any] = _tidied(defined.get("$defs", {}))
    if twice := requests.keys() & components.keys():
        raise ValueError(f"two schemas have one name: {sorted(twice)}")
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, of_kind)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ingle",
            "version": __version__,
            "description": "Language models behind the OpenAI API, with fields that vLLM and llama.cpp add.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted((requests | components).items())),
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A key of the server, which without --api-key asks for none.",
                },
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same."},
            },
        },
    }


def _tidied(schema: Any) -> Any:
    """With the bounds of numbers that have a validator of their own as JSON Schema spells them, and without defaults
    that are null: those say that a field is left out, and many a schema takes no null."""
    if isinstance(schema, list):
        return [_tidied(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    given = {name: value for name, value in schema.items() if not (name == "default" and value is None)}
    return {_BOUNDS.get(name, name): _tidied(value) for name, value in given.items()}


def bodies_of(endpoint: Endpoint) -> tuple[type[StrictModel], ...]:
    if endpoint.body is None:
        return ()
    return endpoint.body if isinstance(endpoint.body, tuple) else (endpoint.body,)


def statuses_of(endpoint: Endpoint) -> list[int]:
    """Errors that it may answer with."""
    return sorted({*_ALWAYS, *endpoint.statuses, *(_WITH_BODY if endpoint.body is not None else ())})


def about(endpoint: Endpoint) -> str:
    return endpoint.about or (endpoint.answer.__doc__ or "").strip().partition("\n")[0]


def _kinds(endpoint: Endpoint) -> list[_Kind]:
    others = (kind for _, kinds in endpoint.other_answers for kind in kinds)
    told = (endpoint.answers, endpoint.chunks, *others, endpoint.error, ErrorBody)
    return [kind for kind in told if kind is not None]


def _operation(endpoint: Endpoint, of_kind: Mapping[_Kind, dict[str, Any]]) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_")
    operation: dict[str, Any] = {"operationId": name, "responses": _responses(endpoint, of_kind)}
    if text := about(endpoint):
        operation["summary"] = text.rstrip(".")
    if parameters := _PARAMETER.findall(endpoint.path):
        string = {"type": "string", "minLength": 1}
        operation["parameters"] = [
            {"name": each, "in": "path", "required": True, "schema": string} for each in parameters
        ]
    for each, wanted in endpoint.query.items():
        operation.setdefault("parameters", []).append({"name": each, "in": "query", "schema": wanted})
    if endpoint.form is not None:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": endpoint.form}}}
    if bodies := bodies_of(endpoint):
        refs = [{"$ref": _REF.format(body.__name__)} for body in bodies]
        schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if endpoint.path in HEALTH_PATHS:
        operation["security"] = []
    return operation


def _responses(endpoint: Endpoint, of_kind: Mapping[_Kind, dict[str, Any]]) -> dict[str, Any]:
    others: dict[int, tuple[type[msgspec.Struct], ...]] = dict(endpoint.other_answers)
    error = of_kind[endpoint.error or ErrorBody]
    answers = [of_kind[kind] for kind in (endpoint.answers, *others.get(200, ())) if kind is not None]
    schema = _any_of(answers) if answers else {}
    if endpoint.media_type != "application/json":
        schema = {"type": "string", "contentMediaType": endpoint.media_type}
    content: dict[str, Any] = {endpoint.media_type: {"schema": schema}}
    if endpoint.chunks is not None:
        content["text/event-stream"] = {"schema": _event([of_kind[endpoint.chunks], error])}
    responses = {"200": _response("The answer.", content)}
    for status in statuses_of(endpoint):
        shown = _any_of([*(of_kind[kind] for kind in others.get(status, ())), error])
        responses[str(status)] = _response(_phrase(status), {"application/json": {"schema": shown}})
    return responses


def _any_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}


def _phrase(status: int) -> str:
    return "Overloaded" if status == 529 else HTTPStatus(status).phrase


def _event(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One server-sent event: JSON, but for what closes a stream of OpenAI's."""
    content = {"anyOf": [*chunks, {"const": "[DONE]"}]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


def _response(text: str, content: dict[str, Any]) -> dict[str, Any]:
    headers = {name: {**header, "schema": {"type": "string"}} for name, header in _HEADERS.items()}
    return {"description": text, "headers": headers, "content": content}
