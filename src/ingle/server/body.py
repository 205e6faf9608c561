"""From the bytes of a request to a validated model, with OpenAI's errors instead of pydantic's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import Request

from ingle.errors import RequestError
from ingle.server.decode import decode_json

MAX_BODY_BYTES = 32 * 1024 * 1024
_MAX_SHOWN_CHARS = 80

Neutral = dict[str, tuple[Any, ...]]
ModelT = TypeVar("ModelT", bound="StrictModel")


class FieldError(ValueError):
    """A validator's objection to one field of its model; the message is `before`, the field's full path, `after`."""

    def __init__(self, name: str, after: str = "", *, before: str = "", code: str | None = None) -> None:
        super().__init__(before + name + after)
        self.name = name
        self.before = before
        self.after = after
        self.code = code


class StrictModel(BaseModel):
    """An object of the API. Types are taken as they are, and a field is used, known to be neutral, or refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    UNSUPPORTED: ClassVar[Neutral] = {}
    """Known fields without support, with the values that ask for nothing. null always asks for nothing."""

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name not in cls.model_fields:
                cls._check_neutral(name, value)
        return {name: value for name, value in data.items() if name in cls.model_fields}

    @classmethod
    def _check_neutral(cls, name: str, value: Any) -> None:
        if name not in cls.UNSUPPORTED:
            raise FieldError(name, before="Unrecognized request argument: ", code="unknown_argument")
        if value is not None and not _is_one_of(value, cls.UNSUPPORTED[name]):
            after = f" is not supported by this server: leave it out, or null (got {show(value)})"
            raise FieldError(name, after, code="unsupported_argument")


async def read_body(request: Request) -> bytes:
    """The body of a JSON request, at most `MAX_BODY_BYTES`, counted while it arrives.

    A type other than JSON is refused, which also keeps web pages from posting here without the browser asking first.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            f"Send JSON with the header 'Content-Type: application/json', got {show(content_type)}.", status=415
        )
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > MAX_BODY_BYTES:
            raise RequestError(f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large", status=413)
    return bytes(chunks)


_SUBJECT = re.compile(r"^\w+ should")
"""How pydantic's messages begin: Input, List, String."""


def parse_body(model: type[ModelT], body: bytes) -> ModelT:
    """`body` as `model`. Raises `RequestError` naming the first field that is wrong, and its value."""
    try:
        data = decode_json(body)
    except RecursionError as error:
        raise RequestError("The body is nested too deeply.") from error
    except ValueError as error:
        raise RequestError(f"The body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"The body must be a JSON object, got {show(data)}.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _request_error(error) from error


def show(value: object) -> str:
    """A value from a request, as JSON spells it, short enough for a message."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value[:_MAX_SHOWN_CHARS] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def _is_one_of(value: object, neutral: tuple[Any, ...]) -> bool:
    return any(type(value) is type(known) and value == known for known in neutral)


def _request_error(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        path = _path((*first["loc"], cause.name))
        return RequestError(cause.before + path + cause.after, param=path, code=cause.code)
    path = _path(first["loc"])
    if isinstance(cause, ValueError):
        return RequestError(f"{path} {cause}", param=path)
    if first["type"] == "missing":
        return RequestError(f"{path} is required", param=path)
    return RequestError(f"{path} {_rule(first['type'], first['msg'])}, got {show(first['input'])}", param=path)


def _rule(kind: str, message: str) -> str:
    if kind in ("model_type", "dict_type"):
        return "must be an object"
    return _SUBJECT.sub("must", message).partition(" after validation")[0]


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content`, each name cut to a bounded length since a client may have chosen it."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_SHOWN_CHARS]}" for part in location)
    return path.removeprefix(".")
