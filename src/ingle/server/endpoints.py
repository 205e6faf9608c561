"""What the server answers to: a value for each endpoint, of which the application and its description are made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Literal

import msgspec
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
    body: type[StrictModel] | tuple[type[StrictModel], ...] | None = None
    """What the request's body holds; of several, one."""
    answers: type[msgspec.Struct] | None = None
    """What the answer's JSON holds. None: nobody has said it."""
    chunks: type[msgspec.Struct] | UnionType | None = None
    """What an event of a streamed answer holds, where it may be streamed."""
    other_answers: tuple[tuple[int, tuple[type[msgspec.Struct], ...]], ...] = ()
    """Statuses whose bodies may be others than `answers`, or for errors an `ErrorBody`, and what they hold."""
    error: type[msgspec.Struct] | None = None
    """What errors hold, in a protocol that is not OpenAI's."""
    statuses: tuple[int, ...] = ()
    """Of errors that not every endpoint has: 404 where a path names something."""
    about: str = ""
    """In a line, for people; else the first line of what `answer` says of itself."""
