"""The address and the port that a server listens on."""

from __future__ import annotations

import errno
import re
import socket

from ingle.errors import ConfigError

_SEND_BYTES = 256 * 1024
"""That the kernel holds of an answer for one client. By itself it holds megabytes for one that reads nothing."""


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises `ConfigError` when the port is taken or the address is not this machine's."""
    _check_host(host)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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
    """Raises `ConfigError` for a URL, or for an address with its port."""
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
