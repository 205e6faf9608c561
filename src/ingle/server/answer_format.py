"""What an answer is bound to, as `/v1/messages` and `/v1/responses` say it."""

from __future__ import annotations

from typing import Any

from ingle.errors import RequestError
from ingle.request import SamplingParams
from ingle.server.body import show


def bound_params(format: dict[str, Any] | None, param: str, given: dict[str, Any]) -> SamplingParams:
    """Sampling parameters that are `given`, for answers in the `format` that stands in the field `param`.

    Raises `RequestError`.
    """
    bound = _bound(format or {"type": "text"}, param)
    free = SamplingParams(**given)  # what is wrong with these is not the format's fault
    if bound is None:
        return free
    try:
        return SamplingParams(**{**given, "structured_outputs": {**bound, "asked_as": param}})
    except RequestError as error:
        raise RequestError(f"{param}: {error}", param=param, code=error.code, status=error.status) from None


def _bound(format: dict[str, Any], param: str) -> dict[str, Any] | None:
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        at = f"{param}.type"
        raise RequestError(f"{at} must be text, json_object or json_schema, got {show(kind)}", param=at)
    nested = format.get("json_schema")
    schema = format.get("schema", nested.get("schema") if isinstance(nested, dict) else None)
    if not isinstance(schema, dict):
        at = f"{param}.schema"
        raise RequestError(f"{at} must be a JSON Schema, which is an object, got {show(schema)}", param=at)
    return {"json": schema}
