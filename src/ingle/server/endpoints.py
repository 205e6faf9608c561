"""What the server answers to: a value for each endpoint, of which the application and its description are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request
from starlette.responses import Response

if TYPE_CHECKING:
    from ingle.server.body import StrictModel


@dataclass(frozen=True)
class Endpoint:
    method: Literal["GET", "POST", "DELETE"]
    path: str
    """With parameters as Starlette writes them."""
    answer: Callable[[Request], Awaitable[Response]]
    body: type[StrictModel] | None = None
    """What the request's body holds."""
