"""What the server answers to: a value for each endpoint, of which the application and its description are made."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from ingle.server.access import Guarded, Guards

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
    query: Mapping[str, Any] = field(default_factory=dict)
    """Parameters behind the path, and the JSON schema of each."""
    form: Mapping[str, Any] | None = None
    """The JSON schema of a body that is a form, multipart/form-data."""
    guards: Guards = None
    """Whether it changes the server or tells about it, which takes more than a client's key."""
    media_type: str = "application/json"
    """Of the answer."""
    about: str = ""
    """In a line, for people; else the first line of what `answer` says of itself."""


def guarded(endpoints: Sequence[Endpoint]) -> Guarded:
    """Those that take more than a client's key."""
    found: dict[str, list[tuple[re.Pattern[str], Guards]]] = {}
    for endpoint in endpoints:
        if endpoint.guards is not None:
            pattern, _, _ = compile_path(endpoint.path)
            found.setdefault(endpoint.method, []).append((pattern, endpoint.guards))
    return found
