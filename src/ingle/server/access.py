"""Whose request it is: keys, as pure ASGI middleware that every route lies behind."""

from __future__ import annotations

import hmac
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ingle.config.access import ApiKey
from ingle.errors import ConfigError
from ingle.server.errors import error_body, error_response
from ingle.server.rates import Meter, meter_of

LIVE_PATH = "/health/live"
HEALTH_PATHS = ("/health", LIVE_PATH, "/health/ready", "/ping")
PUBLIC = frozenset(
    [*((method, path) for path in HEALTH_PATHS for method in ("GET", "HEAD")), ("HEAD", "/")],
)
"""What asks for no key: whether all is well, and whether there is a server at all."""
_PAGES = ("/docs", "/redoc")
_FILES_OF_PAGES = "/page/"

Guards = Literal["changes", "tells"] | None
"""What an endpoint does beside answering a client: it changes the server, as by loading a model, or tells about it and
its other clients, as metrics do.

With a key of an administrator, only that opens either. Without one, what tells is open to every client, what changes
to nobody, unless only this machine reaches the server and it asks for no key at all.
"""
Guarded = Mapping[str, Sequence[tuple[re.Pattern[str], Guards]]]
"""Of a method: patterns of paths, and what the endpoint there does."""
_ADMIN_ONLY = "takes the key of an administrator, whom --admin-api-key names when the server starts."
_LOOKS = ("GET", "HEAD", "OPTIONS")
"""Methods that cost little, and count as no request."""


@dataclass(frozen=True)
class Client:
    """Who sent a request, in `scope["state"]["client"]`."""

    name: str = ""
    """Of its key; empty where the server asks for none, and on what asks for none."""
    is_admin: bool = False
    owner: str = ""
    """Whose files, batches and answers it sees: its own, if its key was given a name; else those of all without one."""
    meter: Meter | None = field(default=None, compare=False, repr=False)
    """Of what it asks for, where that is limited."""

    def spend(self, tokens: int) -> None:
        """Counts those of a prompt, once it is known, and of an answer, as they come."""
        if self.meter is not None:
            self.meter.spend(tokens)


def asks_for_page(scope: Scope) -> bool:
    """Whether a browser asks for a page that comes with ingle, or for a file of one.

    None holds anything of this server's, and a browser cannot send a key before it has a page that asks for it.
    """
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    path: str = scope["path"]
    return path in _PAGES or path.startswith(_FILES_OF_PAGES) or (path == "/" and wants_html(scope))


def wants_html(scope: Scope) -> bool:
    """As browsers do, and programs do not."""
    return "text/html" in Headers(scope=scope).get("accept", "")


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
    local_names: bool = False
    """Accept in it addresses, too, and names that nobody can have on the internet."""
    cors_origins: tuple[str, ...] = ()
    """Sites whose pages may call the server, as browsers spell them."""
    root_path: str = ""
    """What a proxy may have left before all paths, such as `/llm`."""
    is_local: bool = True
    """Whether only this machine reaches the server."""

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
        self._meters: dict[tuple[str, float, float], Meter | None] = {}
        self.ask = False
        """Whether every client needs one."""
        self.take(keys)

    def take(self, keys: Sequence[ApiKey]) -> None:
        """These from now on. Whoever had spent a limit before has spent it.

        Raises `ConfigError` where a server that asks for keys would ask for none any more.
        """
        asks = any(not key.is_admin for key in keys)
        if self.ask and not asks:
            raise ConfigError("none but administrators' keys are left, and then nobody would be asked for one")
        meters = {each: self._meters.get(each) or meter_of(*each[1:]) for each in map(_limits, keys)}
        clients = {
            self._digest(key.key.encode()): Client(key.name, key.is_admin, key.owner, meters[_limits(key)])
            for key in keys
        }
        self._meters, self._clients, self.ask = meters, clients, asks
        self.have_admin = any(key.is_admin for key in keys)

    def find(self, given: bytes) -> Client | None:
        digest, found = self._digest(given), None
        for known, client in self._clients.items():  # all of them, whichever it is
            found = client if hmac.compare_digest(digest, known) else found
        return found

    def _digest(self, key: bytes) -> bytes:
        return hmac.digest(self._secret, key, "sha256")


def _limits(key: ApiKey) -> tuple[str, float, float]:
    """Keys of one name and limit share that: whoever changes keys has two for a while."""
    return key.name, key.requests_per_minute, key.tokens_per_minute


class KeyGuard:
    """Asks for `Authorization: Bearer KEY`, or `x-api-key: KEY` as Anthropic's clients send it, on all that is not
    `PUBLIC`, and says whose request it is.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        *,
        is_local: bool = True,
        guarded: Guarded = MappingProxyType({}),
        pages: bool = False,
    ) -> None:
        """`is_local`: whether only this machine reaches the server; `pages`: whether it shows some."""
        self._app = app
        self._keys = keys
        self._is_local = is_local
        self._guarded = guarded
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        client, method, path = self._client(scope), scope.get("method", "GET"), scope["path"]
        if (method, path) not in PUBLIC and not (self._pages and asks_for_page(scope)):
            guards = self._guards(method, path)
            needs_admin = not self._opens(guards, client)
            if client is None and (self._keys.ask or (needs_admin and self._keys.have_admin)):
                kind = "administrator's key" if needs_admin else "API key"
                message = f"Missing or wrong {kind}: send the header 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
                body = error_body(401, message, code="invalid_api_key")
                await error_response(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
            if needs_admin:
                body = error_body(403, f"{method} {path} {_ADMIN_ONLY}", code="admin_required")
                await error_response(403, body)(scope, receive, send)
                return
        scope.setdefault("state", {})["client"] = client or ANONYMOUS
        if client is not None and client.meter is not None and scope.get("method") not in _LOOKS:
            await self._measured(client, client.meter, scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _opens(self, guards: Guards, client: Client | None) -> bool:
        """Whether the client, who has the key that it needs anyhow, may do that."""
        if guards is None or (client is not None and client.is_admin):
            return True
        if self._keys.have_admin:
            return False
        return guards == "tells" or (self._is_local and not self._keys.ask)

    def _guards(self, method: str, path: str) -> Guards:
        known = self._guarded.get("GET" if method == "HEAD" else method, ())
        return next((guards for pattern, guards in known if pattern.match(path)), None)

    async def _measured(self, client: Client, meter: Meter, scope: Scope, receive: Receive, send: Send) -> None:
        wait_s, limit = meter.admit()
        if wait_s:
            message = f"The key {client.name} has {limit}: try again in {math.ceil(wait_s)} s."
            headers = {"Retry-After": str(math.ceil(wait_s)), **meter.headers()}
            body = error_body(429, message, code="rate_limit_exceeded")
            await error_response(429, body, headers)(scope, receive, send)
            return

        async def send_measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(meter.headers())
            await send(message)

        await self._app(scope, receive, send_measured)

    def _client(self, scope: Scope) -> Client | None:
        # uvicorn hands header bytes through; latin-1 is how Headers decodes them.
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        bearer = key if scheme.lower() == "bearer" else ""
        given = filter(None, (each.strip().encode("latin-1") for each in (bearer, headers.get("x-api-key", ""))))
        found = [self._keys.find(each) for each in given]
        return next(filter(None, found), None)
