"""Who may reach the server: the Host check and API keys, as pure ASGI middleware."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ingle.server.errors import error_body, error_response

LIVE_PATH = "/health/live"
HEALTH_PATHS = ("/health", LIVE_PATH, "/health/ready", "/ping")
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """The same for all models that a server hands out."""

    api_keys: tuple[str, ...] = ()
    """Of which a request must bring one; empty asks for none."""
    allowed_hosts: tuple[str, ...] = ()
    """Names accepted in the Host header, besides localhost and the server's own address; empty accepts any."""


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
    """Asks for `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send it, on every path but those
    that say whether all is well. Whether there is a server at all, which `HEAD /` asks, is told to everybody.
    """

    def __init__(self, app: ASGIApp, api_keys: Iterable[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] in ("http", "websocket") and scope["path"] not in HEALTH_PATHS
        asks = asks and (scope.get("method"), scope["path"]) != ("HEAD", "/")
        if asks and not self._authorized(scope):
            message = "Missing or wrong API key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
            body = error_body(401, message, code="invalid_api_key")
            await error_response(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _authorized(self, scope: Scope) -> bool:
        # uvicorn hands header bytes through; latin-1 is how Headers decodes them.
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        bearer = key if scheme.lower() == "bearer" else ""
        # Every key is compared, in constant time, so that the time taken tells nothing about any of them.
        given = [each.strip().encode("latin-1") for each in (bearer, headers.get("x-api-key", ""))]
        matches = [hmac.compare_digest(each, known) for each in given for known in self._keys]
        return any(matches)


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
