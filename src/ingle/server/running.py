"""Which servers of this user run: a file for each, which its server holds locked as long as it lives.

A lock ends with its process, however that ends, and a process id that another program got later is never taken for a
server's. The files lie in ingle's home, are for their owner alone, and hold no secrets.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ingle.channel import EngineInfo
from ingle.home import home

UNIX = "unix:"
"""Before the path of a Unix socket, in place of a URL."""
_MAX_BYTES = 1 << 16
logger = logging.getLogger("ingle")


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A server that takes requests."""

    pid: int
    models: list[str]
    """Names under which it serves its model, the first of which is in its answers."""
    url: str
    """Such as http://127.0.0.1:8000; of a Unix socket, unix: and its path."""
    size: int
    """Bytes of weights and of room for keys and values."""
    device: str
    context: int
    """Tokens of the longest sequence."""
    started: float
    """Unix seconds at which it was ready."""
    shutdown_timeout: float = 5.0
    """Seconds that its answers have to end."""

    @property
    def port(self) -> int | None:
        """None of a server that listens on a Unix socket."""
        port = self.url.rpartition(":")[2]
        return int(port) if port.isdecimal() else None

    @property
    def place(self) -> str:
        """Where it listens, in a sentence."""
        return self.url if self.port is None else f"port {self.port}"


def folder() -> Path:
    return home() / "running"


@contextlib.contextmanager
def announced(names: Sequence[str], info: EngineInfo, url: str, shutdown_timeout: float = 5.0) -> Iterator[None]:
    """While this process serves the model there. A home that cannot be written to is a notice, and no more."""
    record = Running(
        pid=os.getpid(),
        models=list(names),
        url=url,
        size=info.weight_bytes + info.kv_cache_bytes,
        device=info.device,
        context=info.max_model_len,
        started=time.time(),
        shutdown_timeout=shutdown_timeout,
    )
    path, part = folder() / f"{record.pid}.json", folder() / f"{record.pid}.part"
    try:
        folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(file, msgspec.json.encode(record))
        part.replace(path)  # locked already: nobody finds one that looks left over
    except OSError as error:
        logger.warning("notice: `ingle ps` will not show this server: %s: %s", folder(), error.strerror)
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def url_of(sock: socket.socket, scheme: str = "http") -> str:
    """Where this machine reaches a server: one on every interface by the machine's own name for itself."""
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return f"{UNIX}{name}"
    host, port = name[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def servers() -> list[Running]:
    """Those that run now, the oldest first. What servers left behind that were killed is taken away."""
    found = []
    for path in sorted(folder().glob("*.json")):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            if (server := _read(path)) is not None:
                found.append(server)
    return sorted(found, key=lambda server: server.started)


def _read(path: Path) -> Running | None:
    """Raises `OSError` and `msgspec.DecodeError` for what is no record of ours."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if os.fstat(file).st_uid != os.getuid():
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return msgspec.json.decode(os.read(file, _MAX_BYTES), type=Running)
        path.unlink(missing_ok=True)
        return None
    finally:
        os.close(file)


def runs(server: Running) -> bool:
    try:
        return _read(folder() / f"{server.pid}.json") is not None
    except FileNotFoundError:
        return False


def is_called(model: str, name: str) -> bool:
    """Whether people who say `name` mean the model that is served as `model`."""
    return name in (model, model.rstrip("/").rpartition("/")[2], model.removesuffix(":latest")) or (
        name.removesuffix(":latest") == model
    )
