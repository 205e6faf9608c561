"""Pure ASGI middleware: request ids and the access log, the Host check, API keys.

Starlette's `BaseHTTPMiddleware` is not used: it pipes every streamed chunk through another task.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Iterable
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingle.errors import EngineError
from ingle.server.errors import current_request_id, describe, error_body, error_response
from ingle.server.stopping import STOPPED

access_logger = logging.getLogger("ingle.access")

CLIENT_CLOSED_REQUEST = 499
"""What the access log says of a client that left before its answer; nginx's number."""
SERVER_STOPPED = 503
"""What it says of an answer that the server's own end cut off."""

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestScope:
    """Outermost: names the request, logs it, and answers what failed unforeseen."""

    def __init__(self, app: ASGIApp, access_log: bool) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        current_request_id.set(request_id)
        status = 0
        started_s = time.perf_counter()

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except ClientDisconnect:
            status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:  # the server gives up on answers that outlast its grace; this task ends here
            if not status:
                await error_response(*describe(EngineError(STOPPED)))(scope, receive, send_named)
            status = SERVER_STOPPED
        except Exception as error:
            if status:
                raise  # part of the answer is out: only the closed connection can tell the client
            await error_response(*describe(error))(scope, receive, send_named)
        finally:
            if self._access_log:
                _log_access(scope, status, time.perf_counter() - started_s, request_id)


class HostGuard:
    """Refuses other names in the Host header, so that no web page reaches a local server by DNS rebinding.

    Such a page has a name of its own, which it cannot hide: the address that a request came in on is no such name, nor
    is `localhost`, and a request without the header, as HTTP/1.0 allows, comes from no browser.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str]) -> None:
        self._app = app
        names = {_host_name(host) for host in (*_LOOPBACK_NAMES, *allowed_hosts)}
        self._allowed = frozenset(names)
        self._allowed_ends = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for host in Headers(scope=scope).getlist("host"):
                if not self._is_allowed(_host_name(host), scope):
                    message = f"This server does not answer to the host name {host!r}: --allowed-hosts names others."
                    await error_response(403, error_body(403, message, code="host_not_allowed"))(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_allowed(self, name: str, scope: Scope) -> bool:
        own = scope.get("server")
        is_own = own is not None and name == _host_name(f"[{own[0]}]" if ":" in own[0] else own[0])
        return is_own or name in self._allowed or (bool(self._allowed_ends) and name.endswith(self._allowed_ends))


class ApiKeyGuard:
    """Asks for `Authorization: Bearer KEY` on every path but /health."""

    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] in ("http", "websocket") and scope["path"] != "/health"
        if asks and not self._authorized(scope):
            body = error_body(
                401, "Missing or wrong API key: send the header 'Authorization: Bearer KEY'.", code="invalid_api_key"
            )
            await error_response(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        # uvicorn hands header bytes through; latin-1 is how Headers decodes them.
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1")
        # Every key is compared, in constant time, so that the time taken tells nothing about any of them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _request_id(scope: Scope) -> str:
    given = Headers(scope=scope).get("x-request-id", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _host_name(host: str) -> str:
    """`Example.com.:80` and `[0::1]:80` without their port and as others spell them, `example.com` and `::1`."""
    if host.startswith("["):
        host = host[1 : host.find("]")]
    elif host.count(":") < 2:
        host = host.partition(":")[0]
    try:
        return str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        return host.lower().removesuffix(".")


def _log_access(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    client = scope.get("client") or ("-", 0)
    access_logger.info(
        '%s "%s %s" %d %.0f ms %s',
        client[0],
        scope["method"],
        quote(scope["path"]),
        status,
        seconds * 1000,
        request_id,
    )
