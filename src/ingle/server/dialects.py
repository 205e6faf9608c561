"""Which protocol a request speaks, so that it is told in it also what went wrong before its endpoint was reached."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from ingle.server.anthropic.errors import ANTHROPIC
from ingle.server.errors import OPENAI, Dialect

_ANTHROPIC_PATHS = ("/v1/messages", "/v1/complete")


def speaks_anthropic(scope: Scope) -> bool:
    path: str = scope["path"]
    return any(path == known or path.startswith(f"{known}/") for known in _ANTHROPIC_PATHS) or (
        "anthropic-version" in Headers(scope=scope)
    )


def dialect_of(scope: Scope) -> Dialect:
    return ANTHROPIC if speaks_anthropic(scope) else OPENAI
