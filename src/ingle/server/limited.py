"""Fields of a body that a flag bounds: numbers, and how many entries a list has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from ingle.limits import limits
from ingle.request import bounded


@dataclass(frozen=True)
class Within:
    """Of a whole number: from `low` to the limit. The description says what it is on this server."""

    limit: str
    low: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(core) | {"minimum": self.low, "maximum": getattr(limits(), self.limit)}

    def _check(self, value: int) -> int:
        if (text := bounded(value, self.low, self.limit)) is not None:
            raise ValueError(text)
        return value


@dataclass(frozen=True)
class Fewer:
    """Of a list: at most as many entries, `what` they are, as the limit says. Checked before the entries are."""

    limit: str
    what: str
    low: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        least = {"minItems": self.low} if self.low else {}
        return handler(core) | least | {"maxItems": getattr(limits(), self.limit)}

    def _check(self, value: Any) -> Any:
        if isinstance(value, list):
            if (text := limits().over(self.limit, len(value), f"has {len(value)} {self.what}")) is not None:
                raise ValueError(text)
            if len(value) < self.low:
                raise ValueError(f"must have at least {self.low} {self.what}")
        return value


@dataclass(frozen=True)
class ToolsWithin(Fewer):
    """Of a list of tools: their size as JSON too."""

    limit: str = "max_tools"
    what: str = "tools"

    def _check(self, value: Any) -> Any:
        value = super()._check(value)
        if isinstance(value, list):
            size = len(msgspec.json.encode(value))
            if (text := limits().over("max_tools_bytes", size, f"takes {size} bytes")) is not None:
                raise ValueError(text)
        return value
