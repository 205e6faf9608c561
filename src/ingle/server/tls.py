"""TLS: a server's certificate, and handshakes within limits."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from ingle.config.access import ListenConfig
from ingle.errors import ConfigError
from ingle.server.followed import FollowedFiles
from ingle.server.http_limits import Counted, OpenConnections

logger = logging.getLogger("ingle.server")

_HANDSHAKE_S = 15.0
"""For a client to agree on keys. What it sends before is nobody's request yet."""
_MAX_ACCEPTED = 64
"""Connections at a time, so that those that are open get their turn."""
_PAUSE_S = 1.0
_ASKED = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


class Certificate:
    """What the server shows, and asks clients to show."""

    def __init__(self, config: ListenConfig) -> None:
        """Raises `ConfigError` for files that cannot be used."""
        self._config = config
        self.context = _context(config)
        """For the next connection."""
        self.files = FollowedFiles("the certificate", [path for _, path in _files(config)], self._read)

    @property
    def asks_clients(self) -> bool:
        """Whether nobody gets in without a certificate of an authority that was named."""
        return self.context.verify_mode == ssl.CERT_REQUIRED

    def _read(self) -> None:
        self.context = _context(self._config)


class TlsListener:
    """Accepts connections, and hands them on once their handshake is done.

    A connection counts as open from its first moment: asyncio's own listener knows no bound for those that say nothing.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[Counted], asyncio.Protocol],
        certificate: Certificate,
        counted: OpenConnections,
    ) -> None:
        self.sockets = (sock,)
        self._sock = sock
        self._make = make
        self._certificate = certificate
        self._counted = counted
        self._loop = asyncio.get_running_loop()
        self._shaking: set[asyncio.Task[None]] = set()
        sock.setblocking(False)
        self._loop.add_reader(sock, self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._sock)
        for task in self._shaking:
            task.cancel()

    async def wait_closed(self) -> None:
        if self._shaking:
            await asyncio.wait(self._shaking)

    def _accept(self) -> None:
        for _ in range(_MAX_ACCEPTED):
            try:
                sock, client = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left
                logger.error("no connection is accepted for %g s: %s", _PAUSE_S, error.strerror)
                self._loop.remove_reader(self._sock)
                self._loop.call_later(_PAUSE_S, self._accept_again)
                return
            address = client[0] if isinstance(client, tuple) else ""
            if not self._counted.enter(address):
                sock.close()
                continue
            task = self._loop.create_task(self._shake_hands(sock, _Place(self._counted, address)))
            self._shaking.add(task)
            task.add_done_callback(self._shaking.discard)

    def _accept_again(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    async def _shake_hands(self, sock: socket.socket, place: _Place) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make(place),
                sock,
                ssl=self._certificate.context,
                ssl_handshake_timeout=_HANDSHAKE_S,
            )
        except (OSError, asyncio.TimeoutError) as error:  # nobody's request: worth no line in the log
            logger.debug("no TLS with %s: %s", place.address, error)
        finally:
            if not place.taken:
                sock.close()
                self._counted.leave(place.address)


class _Place:
    """That of a connection among those that are open: taken by its handshake, and given up by what comes of that."""

    def __init__(self, counted: OpenConnections, address: str) -> None:
        self.address = address
        self.taken = False
        self._counted = counted

    def enter(self, address: str) -> bool:
        self.taken = True
        return True

    def leave(self, address: str) -> None:
        self._counted.leave(self.address)


def _files(config: ListenConfig) -> Sequence[tuple[str, str]]:
    """Each file, behind its flag."""
    given = (("--ssl-certfile", config.ssl_certfile), ("--ssl-keyfile", config.ssl_keyfile))
    return [(flag, path) for flag, path in (*given, ("--ssl-ca-certs", config.ssl_ca_certs)) if path is not None]


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
    if reason in ("key values mismatch", "key type mismatch", "no certificate assigned"):
        return f"{flag} {key}: the key is not that of the certificate in --ssl-certfile {certfile}"
    if has_password and _has(key, b"ENCRYPTED"):
        return f"{flag} {key}: --ssl-keyfile-password does not decrypt the key"
    if not _has(certfile, b"CERTIFICATE-----"):
        return f"--ssl-certfile {certfile}: no certificate in PEM is in it"
    if not _has(key, b"PRIVATE KEY-----"):
        where = "" if flag == "--ssl-keyfile" else ": name its file by --ssl-keyfile"
        return f"{flag} {key}: no private key in PEM is in it{where}"
    return f"--ssl-certfile {certfile} and its key cannot be used: {reason or error}"


def _has(path: str, kind: bytes) -> bool:
    with Path(path).expanduser().open("rb") as file:
        return kind in file.read(1 << 20)
