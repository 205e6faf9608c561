"""Where a server is: http, https, or a socket in the file system."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from ingle.errors import ConfigError

_API = "/v1"


class Address(NamedTuple):
    host: str
    port: int
    root: str
    """What comes before `/v1` in paths; mostly nothing."""
    tls: bool = False
    socket: str | None = None
    """Path of a Unix socket, which is then what is connected to."""

    def __str__(self) -> str:
        if self.socket is not None:
            return f"unix:{self.socket}"
        return f"http{'s' * self.tls}://{self.authority}{self.root}"

    @property
    def authority(self) -> str:
        """For the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"

    @property
    def is_local(self) -> bool:
        return self.socket is not None or self.host in ("localhost", "127.0.0.1", "::1")

    def path(self, of_api: str) -> str:
        """Such as /v1/models of "models"."""
        return f"{self.root}{_API}/{of_api}"


def parse_address(text: str) -> Address:
    """Of what people write: with or without a scheme, `/v1`, or the endpoint. Raises `ConfigError`."""
    if text.startswith(("unix:", "http+unix:")):
        path = unquote(text.partition(":")[2])
        path = "/" + path.lstrip("/") if path.startswith("//") else path
        if not path:
            raise ConfigError(f"--base-url {text}: the path of a socket is missing, such as unix:/run/ingle.sock")
        return Address("localhost", 80, "", socket=path)
    parts = urlsplit(text if "://" in text else f"http://{text}")
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"--base-url {text}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--base-url {text}: give a server's address, such as http://127.0.0.1:8000")
    if parts.username is not None or parts.query:
        raise ConfigError("--base-url: a user, a password and a query have no place there; --api-key is for keys")
    tls, root = parts.scheme == "https", parts.path.rstrip("/")
    for end in ("/chat/completions", "/completions", _API):
        root = root.removesuffix(end)
    return Address(parts.hostname, port or (443 if tls else 80), root.rstrip("/"), tls)
