"""`ingle stop`: end a server."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.cli.flags import parse
from ingle.errors import EngineError
from ingle.server.running import UNIX, Running, is_called, runs, servers

_POLL_S = 0.05
_SAY_S = 3.0
_PATIENCE_S = 60.0
"""Beyond the time that its answers have. A server cuts off what still runs then; one that takes longer is not going to
end."""


@dataclass(frozen=True)
class Stop:
    """End a server of yours: it finishes what can be finished within seconds, and frees its memory."""

    name: str
    """The name of its model, its port or socket, its process id, or all."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Stop, argv, command="stop")
    for server in _chosen(flags.name, servers()):
        _stop(server)


def _chosen(name: str, running: Sequence[Running]) -> list[Running]:
    """Raises `EngineError` when there is no such server, or more than one."""
    if name == "all":
        if not running:
            print("no server runs")
        return list(running)
    wanted = name.removeprefix(":")
    found = [server for server in running if wanted in _names(server)]
    found = found or [server for server in running if any(is_called(model, name) for model in server.models)]
    if not found:
        names = ", ".join(f"{server.models[0]} on {server.place}" for server in running) or "none"
        raise EngineError(f"no server for {name!r} runs; running: {names}")
    if len(found) > 1:
        places = " or ".join(server.place for server in found)
        raise EngineError(f"{len(found)} servers have {name}: `ingle stop` the one on {places}, or all")
    return found


def _names(server: Running) -> tuple[str, ...]:
    """A socket goes by its path, with or without `unix:`."""
    return str(server.port), str(server.pid), server.url, server.url.removeprefix(UNIX)


def _stop(server: Running) -> None:
    """Waits until it has ended. Raises `EngineError` when it does not."""
    name = f"{server.models[0]} on {server.place}"
    started = said = time.monotonic()
    if runs(server):  # a server that has just ended leaves its process id to others
        try:
            os.kill(server.pid, signal.SIGTERM)
        except ProcessLookupError:
            pass
        except PermissionError as error:
            raise EngineError(f"{name} (process {server.pid}) is not yours to stop") from error
    patience_s = _PATIENCE_S + server.shutdown_timeout
    while runs(server):
        now = time.monotonic()
        if now - started > patience_s:
            raise EngineError(f"{name} still runs after {patience_s:.0f} s: `kill -9 {server.pid}` ends it by force")
        if now - said > _SAY_S:
            said = now
            print(f"{name} is finishing its answers: {now - started:.0f} s", file=sys.stderr)
        time.sleep(_POLL_S)
    print(f"stopped {name}")
