"""By which names, and from the pages of which sites, the server may be reached: what stands between it and the browsers
of people who can reach it, as pure ASGI middleware."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ingle.server.errors import error_body, error_response

_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_LOCAL_DOMAINS = (".local", ".internal", ".home.arpa", ".localhost")
"""Which no public name server answers for: those of mDNS and clusters, and those kept for private networks."""
_PORTS = {"http": 80, "https": 443}
_METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "POST")
_RATES = tuple(f"X-RateLimit-{what}-{of}" for what in ("Limit", "Remaining", "Reset") for of in ("Requests", "Tokens"))
_EXPOSED = ("X-Request-Id", "X-Ingle-Ignored-Fields", "Retry-After", *_RATES)
"""Headers of answers that a page may read, beside those that any may."""
_LOOKS = ("GET", "HEAD")


class HostGuard:
    """Refuses other names in the Host header, so that no web page reaches a local server by DNS rebinding.

    Such a page has a name of its own, which it cannot hide: the address that a request came in on is no such name, nor
    is `localhost`, and a request without the header, as HTTP/1.0 allows, comes from no browser.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: Iterable[str], local_names: bool = False) -> None:
        self._app = app
        self._local_names = local_names
        names = {_split(host)[0] for host in (*_LOOPBACK_NAMES, *allowed_hosts)}
        self._allowed = frozenset(names)
        self._allowed_ends = tuple(name[1:] for name in names if name.startswith("*."))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for host in Headers(scope=scope).getlist("host"):
                if not self._is_allowed(_split(host)[0], scope):
                    message = f"This server does not answer to the host name {host!r}: --allowed-hosts names others."
                    await _refuse(message, "host_not_allowed", scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_allowed(self, name: str, scope: Scope) -> bool:
        own = scope.get("server")
        is_own = own is not None and name == _split(f"[{own[0]}]" if ":" in own[0] else own[0])[0]
        if is_own or name in self._allowed or (bool(self._allowed_ends) and name.endswith(self._allowed_ends)):
            return True
        return self._local_names and _is_local(name)


class OriginGuard:
    """Refuses what a browser sends for a page of another site, unless that site was named.

    A browser says so of each request with which a page could change something or learn something: in `Origin`, or where
    that header is not sent, as for images, in `Sec-Fetch-Site`. Following a link to the server is no such request.
    Programs send neither. Keys are no answer to this: a server on loopback needs none, and its pages come from
    everywhere.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._allowed = _pattern(origins)
        self._all = "*" in origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if (whose := self._foreign(scope["method"], headers)) is not None:
                message = f"This server takes no requests from pages of {whose}: --cors-origin names sites that may."
                await _refuse(message, "origin_not_allowed", scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _foreign(self, method: str, headers: Headers) -> str | None:
        """The site that may not; None where nothing is wrong."""
        for origin in headers.getlist("origin"):
            if not _is_own(origin, headers.get("host", "")) and not self._allowed.fullmatch(origin):
                return repr(origin)
        if "origin" not in headers and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            follows_link = method in _LOOKS and headers.get("sec-fetch-mode") == "navigate"
            if not follows_link and not self._all:
                return "another site"
        return None


def cors(app: ASGIApp, origins: Sequence[str]) -> CORSMiddleware:
    """Tells browsers that pages of these sites may read answers, and answers what browsers ask before: without a key,
    which such a question never carries."""
    return CORSMiddleware(
        app,
        allow_origin_regex=None if "*" in origins else _pattern(origins).pattern,
        allow_origins=["*"] if "*" in origins else [],
        allow_methods=_METHODS,
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=_EXPOSED,
    )


def _is_local(name: str) -> bool:
    """Whether nobody can have the name on the internet: an address, a word without a dot, or below a local domain."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(_LOCAL_DOMAINS)
    return True


def _pattern(origins: Sequence[str]) -> re.Pattern[str]:
    """Of all that is allowed. `*` within one stands for a word of a name or for a port, alone for everything."""
    if "*" in origins:
        return re.compile(r".*", re.DOTALL)
    each = (re.escape(origin).replace(r":\*", r"(?::\d+)?").replace(r"\*", r"[^/:@\s]+") for origin in origins)
    return re.compile("|".join(each) or r"(?!)")


def _is_own(origin: str, host: str) -> bool:
    """Whether a page of that origin came from the very server that it now calls, by the name that it calls it."""
    try:
        parts = urlsplit(origin)
        port = parts.port
    except ValueError:
        return False
    if parts.scheme not in _PORTS or not parts.hostname or not host:
        return False
    default = _PORTS[parts.scheme]  # behind a proxy, the browser's scheme is not ours
    name, given = _split(host)
    return (_split(parts.netloc)[0], port or default) == (name, given or default)


def _split(host: str) -> tuple[str, int | None]:
    """`Example.com.:80` and `[0::1]:80` as others spell the names, `example.com` and `::1`, and their port."""
    port = ""
    if host.startswith("[") and "]" in host:
        host, _, port = host[1:].partition("]")
        port = port.removeprefix(":")
    elif host.count(":") < 2:
        host, _, port = host.partition(":")
    number = int(port) if len(port) <= 5 and port.isascii() and port.isdecimal() else None
    try:
        return str(ipaddress.ip_address(host.partition("%")[0])), number
    except ValueError:
        return host.lower().removesuffix("."), number


async def _refuse(message: str, code: str, scope: Scope, receive: Receive, send: Send) -> None:
    await error_response(403, error_body(403, message, code=code))(scope, receive, send)
