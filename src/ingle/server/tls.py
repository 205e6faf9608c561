"""TLS: a server's certificate, read anew when it changes, and handshakes within limits."""

from __future__ import annotations

import asyncio
import logging
import ssl
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from ingle.config.access import ListenConfig
from ingle.errors import ConfigError
from ingle.server.http_limits import OpenConnections

logger = logging.getLogger("ingle.server")

_HANDSHAKE_S = 15.0
"""For a client to agree on keys. What it sends before is nobody's request yet."""
_SHUTDOWN_S = 5.0
_LOOK_S = 60.0
"""Between two looks whether a certificate has changed."""
_ASKED = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class Certificate:
    """What the server shows, and asks clients to show."""

    def __init__(self, config: ListenConfig) -> None:
        """Raises `ConfigError` for files that cannot be used."""
        self._config = config
        self._state = self._files_state()
        self.context = _context(config)
        """For the next connection."""

    @property
    def asks_clients(self) -> bool:
        """Whether nobody gets in without a certificate of an authority that was named."""
        return self.context.verify_mode == ssl.CERT_REQUIRED

    async def follow(self) -> None:
        """Takes up what replaces a certificate that runs out, until it is cancelled. One that cannot be used is not
        taken up."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        if (state := self._files_state()) == self._state:
            return
        self._state = state
        try:
            self.context = _context(self._config)
        except ConfigError as error:
            logger.error("the certificate has changed, and stays as it was for new connections: %s", error.what)
        else:
            logger.info("the certificate has changed: new connections get the one of %s", self._config.ssl_certfile)

    def _files_state(self) -> list[tuple[int, int, int] | None]:
        return [_state(path) for path in _files(self._config)]


class Handshake(asyncio.Protocol):
    """A connection before it is one. It counts among those that are open, so that half-open ones are bounded too."""

    def __init__(self, connection: asyncio.Protocol, certificate: Certificate, counted: OpenConnections) -> None:
        self._connection = connection
        self._certificate = certificate
        self._open = counted

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        client = transport.get_extra_info("peername")
        address = client[0] if client else ""
        raw = cast(asyncio.Transport, transport)
        if not self._open.enter(address):
            raw.abort()
            return
        loop = asyncio.get_running_loop()
        self._shaking = loop.create_task(self._shake_hands(loop, raw, address))

    async def _shake_hands(self, loop: asyncio.AbstractEventLoop, raw: asyncio.Transport, address: str) -> None:
        early = _Early()
        try:
            secured = await loop.start_tls(
                raw,
                early,
                self._certificate.context,
                server_side=True,
                ssl_handshake_timeout=_HANDSHAKE_S,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:  # nobody's request: not even a line in the log
            logger.debug("no TLS with %s: %s", address, error)
            raw.abort()
            return
        finally:
            self._open.leave(address)
        assert secured is not None
        early.hand_over(secured, self._connection)


class _Early(asyncio.Protocol):
    """Keeps what comes right behind a handshake, until there is a connection to take it."""

    def __init__(self) -> None:
        self._calls: list[Callable[[asyncio.Protocol], object]] = []

    def data_received(self, data: bytes) -> None:
        self._calls.append(lambda connection: connection.data_received(data))

    def eof_received(self) -> bool:
        self._calls.append(lambda connection: connection.eof_received())
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._calls.append(lambda connection: connection.connection_lost(error))

    def hand_over(self, transport: asyncio.Transport, connection: asyncio.Protocol) -> None:
        transport.set_protocol(connection)
        connection.connection_made(transport)
        for call in self._calls:
            call(connection)


def _files(config: ListenConfig) -> Sequence[tuple[str, str]]:
    """Each file, behind its flag."""
    given = (("--ssl-certfile", config.ssl_certfile), ("--ssl-keyfile", config.ssl_keyfile))
    return [(flag, path) for flag, path in (*given, ("--ssl-ca-certs", config.ssl_ca_certs)) if path is not None]


def _state(file: tuple[str, str]) -> tuple[int, int, int] | None:
    """What changes with a file's content."""
    try:
        found = Path(file[1]).expanduser().stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def key_notice(config: ListenConfig) -> str | None:
    """What to say of a private key that others can read."""
    path = config.ssl_keyfile or config.ssl_certfile
    if path is not None and stat.S_IMODE(Path(path).expanduser().stat().st_mode) & 0o007:
        return f"everybody on this machine can read the private key in {path}: `chmod o= {path}` keeps it"
    return None


def _context(config: ListenConfig) -> ssl.SSLContext:
    for flag, path in _files(config):
        try:
            with Path(path).expanduser().open("rb"):
                pass
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"{flag} {path}: {getattr(error, 'strerror', None) or error}") from None
    assert config.ssl_certfile is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    _load(context, config, config.ssl_certfile)
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(Path(config.ssl_ca_certs).expanduser())
        except ssl.SSLError:
            raise ConfigError(f"--ssl-ca-certs {config.ssl_ca_certs}: no certificate in PEM is in it") from None
    context.verify_mode = _ASKED[config.client_certificates]
    return context


def _load(context: ssl.SSLContext, config: ListenConfig, certfile: str) -> None:
    key = config.ssl_keyfile or certfile
    flag = "--ssl-keyfile" if config.ssl_keyfile is not None else "--ssl-certfile"
    password = config.ssl_keyfile_password

    def told() -> str:  # without this, OpenSSL would ask the terminal
        if password is None:
            raise ConfigError(
                f"{flag} {key}: the key is encrypted: give INGLE_SSL_KEYFILE_PASSWORD or --ssl-keyfile-password"
            )
        return password

    try:
        context.load_cert_chain(Path(certfile).expanduser(), Path(key).expanduser(), told)
    except ssl.SSLError as error:
        raise ConfigError(_why_not(error, flag, key, certfile, password is not None)) from None


def _why_not(error: ssl.SSLError, flag: str, key: str, certfile: str, has_password: bool) -> str:
    reason = (error.reason or "").replace("_", " ").lower()
    if "key values mismatch" in reason or "key type mismatch" in reason:
        return f"{flag} {key}: the key is not that of the certificate in --ssl-certfile {certfile}"
    if has_password and any(word in reason for word in ("bad decrypt", "bad password", "decrypt")):
        return f"{flag} {key}: --ssl-keyfile-password does not decrypt the key"
    if not _has(certfile, b"CERTIFICATE"):
        return f"--ssl-certfile {certfile}: no certificate in PEM is in it"
    if not _has(key, b"PRIVATE KEY"):
        where = "" if flag == "--ssl-keyfile" else ": name its file by --ssl-keyfile"
        return f"{flag} {key}: no private key in PEM is in it{where}"
    return f"--ssl-certfile {certfile} and its key cannot be used: {reason or error}"


def _has(path: str, kind: bytes) -> bool:
    with Path(path).expanduser().open("rb") as file:
        return kind + b"-----" in file.read(1 << 20)
