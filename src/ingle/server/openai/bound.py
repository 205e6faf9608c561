"""Fields that bind an answer: OpenAI's `response_format`, vLLM's `structured_outputs`, and its older `guided_*`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from typing_extensions import NotRequired, TypedDict

from ingle.server.body import FieldError, show
from ingle.structured import StructuredOutputs

FIELDS = ("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_NO_SCHEMA_KEYS = frozenset(("name", "description", "strict", "schema"))


class JsonSchemaFormat(TypedDict):
    """A schema with its name, as OpenAI writes it."""

    name: NotRequired[str]
    description: NotRequired[str | None]
    schema: dict[str, Any] | bool
    strict: NotRequired[bool | None]


class ResponseFormatObject(TypedDict):
    """`schema` is llama.cpp's place for what stands in `json_schema`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NotRequired[JsonSchemaFormat | None]
    schema: NotRequired[dict[str, Any] | None]


class StructuredOutputsObject(TypedDict, total=False):
    """One of the first five."""

    json: str | dict[str, Any] | bool | None
    regex: str | None
    choice: list[str] | None
    grammar: str | None
    json_object: bool | None
    whitespace_pattern: str | None
    disable_any_whitespace: bool | None
    disable_additional_properties: bool | None
    after: str | None


def _response_format(value: Any) -> StructuredOutputs | None:
    """A schema binds the answer whether or not it is `strict`."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, got {show(value)}")
    kind = value.get("type")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise FieldError("type", f" must be text, json_object or json_schema, got {show(kind)}")
    schema = value.get("schema")
    if kind == "json_schema" and (given := value.get("json_schema")) is not None:
        if not isinstance(given, dict):
            raise FieldError("json_schema", f" must be an object, got {show(given)}")
        if unknown := given.keys() - _NO_SCHEMA_KEYS:
            raise FieldError("json_schema", f" holds no {show(min(unknown))}: its schema belongs into schema")
        schema = given.get("schema")
    if kind == "json_schema" and schema is None:
        raise FieldError("json_schema.schema", " is required: the JSON Schema that the answer follows")
    return _made("response_format", {"json_object": True} if schema is None else {"json": schema})


def _structured(value: Any) -> StructuredOutputs | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, got {show(value)}")
    return _made("structured_outputs", value)


def _guided(name: str) -> Callable[[Any], StructuredOutputs | None]:
    return lambda value: None if value is None else _made(f"guided_{name}", {name: value})


def _made(asked_as: str, value: Mapping[str, Any]) -> StructuredOutputs:
    return StructuredOutputs.of({**value, "asked_as": asked_as})


ResponseFormat = Annotated[
    StructuredOutputs | None,
    PlainValidator(_response_format, json_schema_input_type=ResponseFormatObject | None),
]
Structured = Annotated[
    StructuredOutputs | None,
    PlainValidator(_structured, json_schema_input_type=StructuredOutputsObject | None),
]
GuidedJson = Annotated[
    StructuredOutputs | None,
    PlainValidator(_guided("json"), json_schema_input_type=str | dict[str, Any] | bool | None),
]
GuidedRegex = Annotated[StructuredOutputs | None, PlainValidator(_guided("regex"), json_schema_input_type=str | None)]
GuidedChoice = Annotated[
    StructuredOutputs | None, PlainValidator(_guided("choice"), json_schema_input_type=list[str] | None)
]
GuidedGrammar = Annotated[
    StructuredOutputs | None, PlainValidator(_guided("grammar"), json_schema_input_type=str | None)
]
