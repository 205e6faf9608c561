"""The address and the port, or the Unix socket, that a server listens on."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from ingle.config import ServerConfig
from ingle.errors import ConfigError

_SEND_BYTES = 256 * 1024
"""That the kernel holds of an answer for one client. By itself it holds megabytes for one that reads nothing."""
_CONNECT_S = 2.0


@contextlib.contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """Where the server is to listen, once it is sure that who reaches it there needs a key or may do without.

    Raises `ConfigError`.
    """
    if config.listen.uds is not None:
        path = Path(config.listen.uds).expanduser().absolute()
        with bind_path(path, config.listen.socket_mode()) as sock:
            own = path.stat().st_ino
            try:
                yield sock
            finally:
                with contextlib.suppress(OSError):
                    if path.stat().st_ino == own:
                        path.unlink()
    else:
        with bind(config.host, config.port) as sock:
            refuse_open(config, sock)
            yield sock


def refuse_open(config: ServerConfig, sock: socket.socket) -> None:
    """Raises `ConfigError` for a server that strangers reach, and that asks for nothing."""
    asks = any(not key.is_admin for key in config.access.all_keys())
    certified = config.listen.client_certificates == "required"
    if asks or certified or config.access.allow_open or is_local(sock):
        return
    raise ConfigError(
        f"--host {config.host} lets others reach this server, and it asks for no key: give INGLE_API_KEY or --api-key, "
        "or --allow-open if whoever reaches it may use it"
    )


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine reaches it: the bound address says so, not the name that was given for it."""
    name = sock.getsockname()
    if not isinstance(name, tuple):  # the path of a Unix socket
        return True
    address = ipaddress.ip_address(name[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def bind_path(path: Path, mode: int) -> socket.socket:
    """A Unix socket at the path, which nobody but those of the mode can ever connect to.

    That of a server that is gone is replaced. Raises `ConfigError`.
    """
    flag = f"--uds {path}"
    _make_way(path, flag)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(~mode & 0o777)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
        sock.bind(str(path))
        sock.listen()
    except OSError as error:
        sock.close()
        reason = {
            errno.EADDRINUSE: "another server was faster",
            errno.ENOENT: f"there is no folder {path.parent}: make it first, such as by `mkdir -m 700 {path.parent}`",
        }.get(error.errno or 0, error.strerror)
        raise ConfigError(f"{flag}: {reason}") from error
    finally:
        os.umask(before)
    return sock


def _make_way(path: Path, flag: str) -> None:
    """Takes away what a server has left that is gone."""
    try:
        found = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{flag}: there is something already that is no socket: give another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:  # a queue that is full is some living server's
            raise ConfigError(f"{flag}: there is a socket already: {error.strerror or 'its server is busy'}") from None
        else:
            raise ConfigError(f"{flag}: a server listens there already: stop it (`ingle ps`), or give another path")


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises `ConfigError` when the port is taken or the address is not this machine's."""
    _check_host(host)
    try:
        name = host.encode() if host.isascii() else host  # a str needs a codec, which is a module to import
        family, kind, protocol, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)  # of every connection: they inherit it
        sock.bind(address)
        sock.listen()  # at once: two sockets may bind one port, but only one can listen; early clients wait their turn
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {_why_not(error, port)}") from error
    return sock


def _check_host(host: str) -> None:
    """Raises `ConfigError` for a URL, for an address with its port, and for the path of a socket."""
    if host.startswith(("/", "unix:")) or host.endswith(".sock"):
        raise ConfigError(f"--host {host!r} is a path: give --uds {host.removeprefix('unix:')} in its place")
    address = re.fullmatch(r"(?:\w+://)?(\[[^\]]*\]|[^:/]*)(?::(\d+))?/?.*", host)
    if address is not None and ("/" in host or (address[2] and host.count(":") == 1) or host.startswith("[")):
        port = f" --port {address[2]}" if address[2] else ""
        raise ConfigError(f"--host {host!r} is more than an address: give --host {address[1].strip('[]')}{port}")


def _why_not(error: Exception, port: int) -> str:
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return "there is no such host; give --host 127.0.0.1, or 0.0.0.0 for every interface"
    number = error.errno if isinstance(error, OSError) else None
    return {
        errno.EADDRINUSE: f"port {port} is taken: stop what uses it, or give another --port",
        errno.EACCES: f"only root may use port {port}: give a --port above 1023, such as 8000, and let a proxy forward",
        errno.EADDRNOTAVAIL: "that is no address of this machine; give --host 127.0.0.1, or 0.0.0.0 for all it has",
    }.get(number or 0, str(error))
