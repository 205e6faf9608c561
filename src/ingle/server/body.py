"""From the bytes of a request to a validated model, with OpenAI's errors instead of pydantic's."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails
from starlette.requests import Request

from ingle.errors import RequestError
from ingle.habits.sampling import REFUSED
from ingle.limits import LimitsConfig
from ingle.request import refusal
from ingle.server.decode import decode_json
from ingle.server.queue import BodyAccount

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
    from typing_extensions import Self

MAX_TIMEOUT_S = 604_800
"""A week."""
_MAX_SHOWN_CHARS = 80
_MAX_FOUND = 100
"""Most unknown fields of an object that are counted."""

Neutral = dict[str, tuple[Any, ...]]
ModelT = TypeVar("ModelT", bound="StrictModel")
Kind = type[ModelT] | Callable[[Mapping[str, Any]], type[ModelT]]
"""What a body is, or how to tell that from its fields."""


class FieldError(ValueError):
    """A validator's objection to one field of its model; the message is `before`, the field's full path, `after`.

    Without a name it objects to the field that the validator is for.
    """

    def __init__(self, name: str = "", after: str = "", *, before: str = "", code: str | None = None) -> None:
        super().__init__(before + name + after)
        self.name = name
        self.before = before
        self.after = after
        self.code = code


class UnknownFields:
    """Fields of one body that nobody knows: noted while it is validated, or refused where the server is `strict`."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.paths: tuple[str, ...] = ()
        """Of those that were ignored, once it is validated: `messages[].mood`, with no two alike."""
        self._found: dict[int, list[str]] = {}
        """Names, by the identity of the object that they are in."""

    @classmethod
    def of(cls, request: Request) -> UnknownFields:
        """Those of a request: the middleware names them in the answer's headers."""
        found: UnknownFields = request.scope.setdefault(
            UNKNOWN_FIELDS, cls(strict=getattr(request.app.state, "strict_fields", False))
        )
        return found

    def note(self, data: dict[str, Any], names: list[str]) -> None:
        """What one kind of object does not know of `data`; of several kinds that it might be, what none knows."""
        if not self.strict:
            before = self._found.get(id(data))
            self._found[id(data)] = names[:_MAX_FOUND] if before is None else [name for name in before if name in names]

    def skip(self, paths: Sequence[str]) -> None:
        """Notes what an endpoint leaves out that it knows nothing of, such as a tool of another server.

        Raises `RequestError` where the server is strict.
        """
        if paths and self.strict:
            raise RequestError(f"{paths[0]} is not supported by this server", code="unsupported_argument")
        self.paths = tuple(dict.fromkeys([*self.paths, *paths]))[:_MAX_FOUND]

    def locate(self, body: Any) -> None:
        """Says where in `body` they are."""
        if any(self._found.values()):
            self.paths = tuple(dict.fromkeys(islice(self._within(body), _MAX_FOUND)))

    def _within(self, body: Any) -> Iterator[str]:
        left: deque[tuple[str, Any]] = deque([("", body)])
        while left:
            path, value = left.popleft()
            if isinstance(value, list):
                left += ((f"{path}[]", entry) for entry in value if isinstance(entry, (dict, list)))
                continue
            before = f"{path}." if path else ""
            yield from (before + name[:_MAX_SHOWN_CHARS] for name in self._found.get(id(value), ()))
            nested = ((name, entry) for name, entry in value.items() if isinstance(entry, (dict, list)))
            left += ((before + name[:_MAX_SHOWN_CHARS], entry) for name, entry in nested)


_STRICT = UnknownFields(strict=True)
"""Of what is no body's."""
UNKNOWN_FIELDS = "ingle.unknown_fields"
"""Where an ASGI scope has the `UnknownFields` of its request."""
_unknown: ContextVar[UnknownFields] = ContextVar("unknown_fields")
"""Of the body that is validated now, in this thread."""


class StrictModel(BaseModel):
    """An object of the API. Types are taken as they are.

    A field is used; or it is known without support, and refused unless it asks for nothing; or nobody knows it, and it
    is ignored and noted (`UnknownFields`).
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    UNSUPPORTED: ClassVar[Neutral] = {}
    """Known fields without support, with the values that ask for nothing. null always asks for nothing."""
    ALIASES: ClassVar[Mapping[str, str]] = {}
    """What others call fields, which count where the field itself is not given."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """With the fields that are known without support, and what they may hold."""
        schema = handler.resolve_ref_schema(handler(core))
        for name in sorted(cls.UNSUPPORTED.keys() - cls.model_fields.keys()):
            neutral = [list(value) if isinstance(value, tuple) else value for value in cls.UNSUPPORTED[name]]
            unlike = [value for index, value in enumerate(neutral) if value not in neutral[:index]]
            schema["properties"][name] = {"enum": [*unlike, None], "description": "Known, and not supported."}
        return schema

    @model_validator(mode="wrap")
    @classmethod
    def _drop_neutral(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Objections to fields that the model lacks, together with those to its own."""
        if not isinstance(data, dict):
            return handler(data)
        data, given = cls._own_names(data), data
        others = [name for name in data if name not in cls.model_fields]
        refused = ((name, data[name], cls._refused(name, data[name])) for name in others)
        found = list(islice((field_error((n,), v, error) for n, v, error in refused if error is not None), _MAX_FOUND))
        try:
            checked = handler({name: value for name, value in data.items() if name in cls.model_fields})
        except ValidationError as error:
            found += map(again, error.errors(include_url=False))
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        _unknown.get(_STRICT).note(given, [name for name in others if name not in cls.UNSUPPORTED])
        return checked

    @classmethod
    def _own_names(cls, data: dict[str, Any]) -> dict[str, Any]:
        others = {name: cls.ALIASES[name] for name in data if name not in cls.model_fields and name in cls.ALIASES}
        if not others:
            return data
        renamed = {others[name]: value for name, value in data.items() if name in others}
        return renamed | {name: value for name, value in data.items() if name not in others and value is not None}

    @classmethod
    def _refused(cls, name: str, value: Any) -> FieldError | None:
        if name not in cls.UNSUPPORTED:
            strict = _unknown.get(_STRICT).strict
            return FieldError(before="Unrecognized request argument: ", code="unknown_argument") if strict else None
        if value is not None and not _is_one_of(value, cls.UNSUPPORTED[name]):
            _, instead = REFUSED.get(name, ((), "leave it out, or null"))
            after = f" is not supported by this server: {instead} (got {show(value)})"
            return FieldError(after=after, code="unsupported_argument")
        return None


class ModelRequest(StrictModel):
    """What every request for an answer has, whatever its protocol."""

    model: str | None = None
    """None means the server's first model."""
    timeout: float | None = Field(None, gt=0, le=MAX_TIMEOUT_S)
    """Seconds from its arrival after which a request ends with an error."""


def field_error(location: tuple[str | int, ...], value: Any, error: ValueError) -> InitErrorDetails:
    return InitErrorDetails(type="value_error", loc=location, input=value, ctx={"error": error})


def again(details: ErrorDetails, *before: str | int) -> InitErrorDetails:
    """An error as pydantic reported it, to be raised once more, of an object that stands at the place `before`."""
    location = (*before, *details["loc"])
    return InitErrorDetails(type=details["type"], loc=location, input=details["input"], ctx=details.get("ctx", {}))


async def read_body(request: Request, account: BodyAccount) -> bytes:
    """The body of a JSON request, counted while it arrives, here and among all bodies.

    What its headers tell is refused before any of it is asked for (`Expect: 100-continue`).
    A type other than JSON is refused, which also keeps web pages from posting here without the browser asking first.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise RequestError(
            f"Send JSON with the header 'Content-Type: application/json', got {show(content_type)}.", status=415
        )
    encoding = request.headers.get("content-encoding", "")
    if any(part.strip().lower() not in ("", "identity") for part in encoding.split(",")):
        raise RequestError(
            f"Send the body as it is, without Content-Encoding, got {show(encoding)}.",
            code="unsupported_encoding",
            status=415,
        )
    limits: LimitsConfig = request.app.state.limits
    _check_size(limits, int(request.headers.get("content-length", "0")))  # a number, or the parser had refused it
    chunks = bytearray()
    try:
        async for chunk in request.stream():
            _check_size(limits, len(chunks) + len(chunk))
            account.add(len(chunk))
            chunks += chunk
        return bytes(chunks)
    finally:
        chunks.clear()  # the error may live on, and this frame with it


def _check_size(limits: LimitsConfig, num_bytes: int) -> None:
    if num_bytes > limits.max_body_bytes:
        raise RequestError(
            f"The body is larger than {limits.max_body_bytes} bytes{limits.by('max_body_bytes')}.",
            code="body_too_large",
            status=413,
        )


_SUBJECT = re.compile(r"^\w+ should")
"""How pydantic's messages begin: Input, List, String."""


def parse_body(model: Kind[ModelT], body: bytes, unknown: UnknownFields | None = None) -> ModelT:
    """`body` as `model`, and in `unknown` what of it nobody knows.

    Raises `RequestError` naming the fields that are wrong, and their values.
    """
    try:
        data = decode_json(body)
    except RecursionError as error:
        raise RequestError("The body is nested too deeply.") from error
    except ValueError as error:
        # msgspec looks for the second half behind the string's end, and says the same where the body ends there.
        half = ", or a string ends with half of a surrogate pair, such as \\ud83d" if "truncated" in str(error) else ""
        raise RequestError(f"The body is not valid JSON: {error}{half}") from error
    if not isinstance(data, dict):
        raise RequestError(f"The body must be a JSON object, got {show(data)}.")
    unknown = UnknownFields() if unknown is None else unknown
    token = _unknown.set(unknown)
    try:
        kind = cast("type[ModelT]", model) if isinstance(model, type) else model(data)
        parsed = kind.model_validate(data)
    except ValidationError as error:
        raise _request_error(error) from error
    finally:
        _unknown.reset(token)
    unknown.locate(data)
    return parsed


def show(value: object) -> str:
    """A value from a request, as JSON spells it, short enough for a message."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value[:_MAX_SHOWN_CHARS] if isinstance(value, str) else value, ensure_ascii=False)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


def _is_one_of(value: object, neutral: tuple[Any, ...]) -> bool:
    """Numbers are, whether written with a point or without."""
    kind: Any = (int, float) if type(value) in (int, float) else type(value)
    return any(isinstance(known, kind) and type(known) is not bool and value == known for known in neutral) or (
        isinstance(value, bool) and any(value is known for known in neutral)
    )


def _request_error(error: ValidationError) -> RequestError:
    """All that is wrong, in one error; its `param` and `code` are those of the first."""
    found = [_objection(details) for details in error.errors(include_url=False)]
    return refusal([(path, text) for path, text, _ in found], code=found[0][2])


def _objection(details: ErrorDetails) -> tuple[str, str, str | None]:
    """A field's path, what is wrong with it, and the code of the error."""
    path = _path(details["loc"])
    cause = details.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        path = _path((*details["loc"], cause.name)) if cause.name else path
        return path, cause.before + path + cause.after, cause.code
    if isinstance(cause, ValueError):
        return path, f"{path} {cause}", None
    if details["type"] == "missing":
        return path, f"{path} is required", None
    return path, f"{path} {_rule(details['type'], details['msg'])}, got {show(details['input'])}", None


def _rule(kind: str, message: str) -> str:
    if kind in ("model_type", "dict_type"):
        return "must be an object"
    return _SUBJECT.sub("must", message).partition(" after validation")[0]


def _path(location: Sequence[str | int]) -> str:
    """`messages[0].content`, each name cut to a bounded length since a client may have chosen it."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:_MAX_SHOWN_CHARS]}" for part in location)
    return path.removeprefix(".")
