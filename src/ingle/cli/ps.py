"""`ingle ps`: the servers that run now."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from ingle.cli.flags import parse
from ingle.cli.table import print_table
from ingle.server.running import Running, servers

_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


@dataclass(frozen=True)
class Ps:
    """List the servers of yours that run now: their model, its size in memory, device, context and address."""

    json: bool = False
    """Print a JSON array of objects."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Ps, argv, command="ps")
    found = servers()
    if flags.json:
        print(json.dumps([msgspec.to_builtins(server) for server in found], ensure_ascii=False, indent=1))
        return
    if not found:
        print("no server runs: `ingle serve MODEL` starts one")
        return
    print_table(("NAME", "SIZE", "DEVICE", "CONTEXT", "URL", "UPTIME", "PID"), [_row(server) for server in found])


def _row(server: Running) -> tuple[str, ...]:
    size = f"{server.size / 1e9:.1f} GB" if server.size >= 1e9 else f"{server.size / 1e6:.0f} MB"
    names = ", ".join(server.models)
    return names, size, server.device, str(server.context), server.url, uptime(server), str(server.pid)


def uptime(server: Running) -> str:
    """Such as 3h 5m, or 12s."""
    seconds = max(int(time.time() - server.started), 0)
    parts = []
    for unit, length in _UNITS:
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or f"{seconds}s"
