"""Every error leaves in the shape of its protocol, which is OpenAI's where no other was asked for:
{"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from http import HTTPStatus

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ingle.errors import EngineError, RequestError, lack_of_disk

logger = logging.getLogger("ingle.server")

MAX_MESSAGE_CHARS = 1000
_HEADERS = {
    413: {"Connection": "close"},  # the rest of a refused upload is not worth reading
    415: {"Accept-Encoding": "identity", "Accept": "application/json"},
    429: {"Retry-After": "5"},
    503: {"Retry-After": "5"},
}
"""What goes with a refusal."""

current_request_id: ContextVar[str] = ContextVar("current_request_id", default="-")
"""That of the request at hand, as its answer carries it in `X-Request-Id`: what a client quotes, and the log names."""


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class Dialect(msgspec.Struct, frozen=True):
    """How a protocol tells an error."""

    status: Callable[[int], int]
    """The HTTP status that its clients know for ours."""
    body: Callable[[int, ErrorDetail], msgspec.Struct]
    """Of that status."""
    request_id_header: str = "X-Request-Id"


OPENAI = Dialect(lambda status: status, lambda status, detail: ErrorBody(detail))
current_dialect: ContextVar[Dialect] = ContextVar("current_dialect", default=OPENAI)
"""That of the request at hand."""


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The body of an error. The message, which may quote the client, becomes one line of bounded length."""
    line = " ".join(message.split())
    if len(line) > MAX_MESSAGE_CHARS:
        line = line[:MAX_MESSAGE_CHARS] + "…"
    kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    return ErrorBody(ErrorDetail(line, kind, param, code))


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """HTTP status and body for any exception. What nobody foresaw is logged in full and tells the client nothing."""
    if isinstance(error, RequestError):
        return error.status, error_body(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, EngineError):
        return 503, error_body(503, f"The engine is not available: {error}", code="engine_unavailable")
    request_id = current_request_id.get()
    if (lack := lack_of_disk(error)) is not None:
        logger.error("request %s failed: %s", request_id, lack)
        return 507, error_body(507, f"The server cannot store this: {lack}.", code="storage_full")
    logger.error("request %s failed", request_id, exc_info=error)
    message = f"The server failed on this request; its log has the reason, under the request id {request_id}."
    return 500, error_body(500, message, code="internal_error")


def error_response(status: int, body: ErrorBody, headers: Mapping[str, str] | None = None) -> Response:
    dialect = current_dialect.get()
    status = dialect.status(status)
    told = dialect.body(status, body.error)
    return Response(msgspec.json.encode(told), status, headers, media_type="application/json")


def error_event(status: int, body: ErrorBody) -> bytes:
    """The last of a stream that OpenAI's clients read."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def install_error_handlers(app: Starlette) -> None:
    app.add_exception_handler(RequestError, _answer)
    app.add_exception_handler(EngineError, _answer)
    app.add_exception_handler(HTTPException, _answer_routing)


async def _answer(request: Request, error: Exception) -> Response:
    status, body = describe(error)
    headers: dict[str, str] = {}
    if isinstance(error, RequestError):
        headers = {**_HEADERS.get(status, {}), **error.headers}
    elif isinstance(error, EngineError) and error.retry_after_s is not None:
        headers = {"Retry-After": str(error.retry_after_s)}
    return error_response(status, body, headers)


def _where(request: Request) -> str:
    """Where somebody meant to go whose base URL lacks `/v1`, or has it twice, or who ends paths with a slash."""
    path = request.url.path.rstrip("/")
    known = {route.path for route in request.app.routes}
    near = next((each for each in (path, f"/v1{path}", path.removeprefix("/v1")) if each and each in known), None)
    return "GET / lists what there is." if near is None else f"Did you mean {near}?"


def _methods(request: Request) -> list[str]:
    """Those of the path: each has a route of its own."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    path = next((route.path for route in routes if route.path_regex.match(request.url.path)), "")
    return sorted(set().union(*(route.methods or () for route in routes if route.path == path)))


async def _answer_routing(request: Request, error: Exception) -> Response:
    """404 for unknown paths and 405 for wrong methods, as the router raises them, and what OPTIONS asks."""
    assert isinstance(error, HTTPException)
    if request.method == "OPTIONS" and request.url.path == "/*":  # `OPTIONS *` asks of the server as a whole
        return Response(status_code=HTTPStatus.NO_CONTENT, headers={"Allow": "GET, HEAD, POST, OPTIONS"})
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"Allow": ", ".join(_methods(request))}
        if request.method == "OPTIONS":
            allow = f"{headers['Allow']}, OPTIONS"
            return Response(status_code=HTTPStatus.NO_CONTENT, headers={"Allow": allow})
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"Invalid URL ({request.method} {request.url.path}). {_where(request)}"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"Not allowed to {request.method} on {request.url.path}"
    else:
        message = error.detail
    return error_response(error.status_code, error_body(error.status_code, message), headers)
