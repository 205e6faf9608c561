"""Who may reach the server: the Host check and keys, as pure ASGI middleware that every route lies behind."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ingle.config.access import ApiKey
from ingle.server.errors import error_body, error_response

LIVE_PATH = "/health/live"
HEALTH_PATHS = ("/health", LIVE_PATH, "/health/ready", "/ping")
PUBLIC = frozenset(
    [*((method, path) for path in HEALTH_PATHS for method in ("GET", "HEAD")), ("HEAD", "/")],
)
"""What asks for no key: whether all is well, and whether there is a server at all."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Client:
    """Who sent a request, in `scope["state"]["client"]`."""

    name: str = ""
    """Of its key; empty where the server asks for none, and on what asks for none."""
    is_admin: bool = False


ANONYMOUS = Client()


def client_of(scope: Scope) -> Client:
    found = scope.get("state", {}).get("client", ANONYMOUS)
    assert isinstance(found, Client)
    return found


@dataclass(frozen=True)
class Access:
    """The same for all models that a server hands out."""

    api_keys: tuple[ApiKey, ...] = ()
    """Of which a request must bring one; without any that is no administrator's, none is asked for."""
    allowed_hosts: tuple[str, ...] = ()
    """Names accepted in the Host header, besides localhost and the server's own address; empty accepts any."""

    @property
    def asks_for_key(self) -> bool:
        return any(not key.is_admin for key in self.api_keys)


class Keys:
    """Finds who a key belongs to, in a time that tells nothing of the keys there are.

    Of each is kept a digest that is keyed by a secret of this process. Whoever guesses knows the digest of no guess: by
    how far a comparison of digests gets, nothing is learned of a key.
    """

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._secret = secrets.token_bytes(32)
        self._clients = {self._digest(key.key.encode()): Client(key.name, key.is_admin) for key in keys}

    def find(self, given: bytes) -> Client | None:
        digest, found = self._digest(given), None
        for known, client in self._clients.items():  # all of them, whichever it is
            found = client if hmac.compare_digest(digest, known) else found
        return found

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


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


class KeyGuard:
    """Asks for `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send it, on all that is not
    `PUBLIC`, and says whose request it is.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._asks = access.asks_for_key
        self._keys = Keys(access.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client = self._client(scope)
        if client is None and self._asks and (scope.get("method"), scope["path"]) not in PUBLIC:
            message = "Missing or wrong API key: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
            body = error_body(401, message, code="invalid_api_key")
            await error_response(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        scope.setdefault("state", {})["client"] = client or ANONYMOUS
        await self._app(scope, receive, send)

    def _client(self, scope: Scope) -> Client | None:
        # uvicorn hands header bytes through; latin-1 is how Headers decodes them.
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        bearer = key if scheme.lower() == "bearer" else ""
        given = (bearer, headers.get("x-api-key", ""))
        found = [self._keys.find(each.strip().encode("latin-1")) for each in given]
        return found[0] or found[1]


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
