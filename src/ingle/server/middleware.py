"""Pure ASGI middleware: request ids, the fields that were ignored, and the access log.

Starlette's `BaseHTTPMiddleware` is not used: it pipes every streamed chunk through another task.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingle.errors import EngineError, printable
from ingle.server.body import UNKNOWN_FIELDS, UnknownFields
from ingle.server.dialects import dialect_of
from ingle.server.errors import current_dialect, current_request_id, describe, error_response
from ingle.server.observers import Observers
from ingle.server.request_log import begin_record, current_record, log_access
from ingle.server.stopping import STOPPED

logger = logging.getLogger("ingle.server")

CLIENT_CLOSED_REQUEST = 499
"""What the access log says of a client that left before its answer; nginx's number."""
SERVER_STOPPED = 503
"""What it says of an answer that the server's own end cut off."""

_MAX_IGNORED = 16
"""Most ignored fields that a header, or a line of the log, names."""
_MAX_LOGGED = 1000
"""A client may make up names without end."""
_logged: set[str] = set()

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Prefix:
    """Takes off what a proxy has left before the path. What comes without it is taken as it is."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._root_path or path.startswith(f"{self._root_path}/"):
            scope = {**scope, "path": path[len(self._root_path) :] or "/"}
        await self._app(scope, receive, send)


class RequestScope:
    """Outermost: names the request, counts and logs it, and answers what failed unforeseen."""

    def __init__(self, app: ASGIApp, access_log: bool, observers: Observers | None = None) -> None:
        self._app = app
        self._access_log = access_log
        observers = Observers() if observers is None else observers
        self._statistics, self._tracer, self._recent = observers.statistics, observers.tracer, observers.recent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        current_request_id.set(request_id)
        dialect = dialect_of(scope)
        current_dialect.set(dialect)
        record = begin_record(scope, request_id)
        current_record.set(record)
        self._statistics.in_flight += 1
        self._recent.begin(record)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers[dialect.request_id_header] = request_id
                if ignored := ignored_fields(scope):
                    headers["X-Ingle-Ignored-Fields"] = ignored
            await send(message)

        cut_off = False
        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            status, cut_off = CLIENT_CLOSED_REQUEST, True
        except asyncio.CancelledError:  # the server gives up on answers that outlast its grace; this task ends here
            if not status:
                await error_response(*describe(EngineError(STOPPED)))(scope, receive, send_named)
            status = SERVER_STOPPED
        except Exception as error:
            if status:
                raise  # part of the answer is out: only the closed connection can tell the client
            await error_response(*describe(error))(scope, receive, send_named)
        finally:
            record.answered(scope, status, cut_off=cut_off)
            self._statistics.in_flight -= 1
            self._statistics.answered(record)
            self._recent.end(record)
            if self._access_log:
                log_access(record)
            if self._tracer is not None:
                self._tracer.tell(record)


def ignored_fields(scope: Scope) -> str:
    """What a header says of the fields of a request's body that nobody knows: the first of them, as ASCII.

    Each is logged once.
    """
    unknown: UnknownFields | None = scope.get(UNKNOWN_FIELDS)
    paths = () if unknown is None else unknown.paths
    new = [path for path in paths if path not in _logged]
    if new and len(_logged) < _MAX_LOGGED:
        _logged.update(new)
        logger.warning(
            "ignored, as nobody here knows: %s in a body for %s (--strict-fields refuses such; each is told once)",
            printable(", ".join(new[:_MAX_IGNORED])), quote(scope["path"]),
        )  # fmt: skip
    shown = [quote(path, safe="[]$@ ") for path in paths[:_MAX_IGNORED]]
    return ", ".join([*shown, "..."] if len(paths) > _MAX_IGNORED else shown)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
