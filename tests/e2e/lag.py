"""How late a server's event loop is: `python -m tests.e2e.lag serve …` serves as ingle does, and measures.

On SIGUSR1, and once at first, it writes what it has found since the last time to the file `LAG_FILE`: seconds of
lateness, one a line. The same program without a server, `python -m tests.e2e.lag idle`, tells how late the machine
itself is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from array import array
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

TICK_S = 0.005


class Probe:
    """Asks to be called each `TICK_S`, and notes by how much later that was."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._found = array("d")

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR1, self._write)
        self._write()  # now it can be asked
        self._next(loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        due_s = time.perf_counter() + TICK_S
        loop.call_later(TICK_S, self._tick, loop, due_s)

    def _tick(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self._found.append(max(time.perf_counter() - due_s, 0.0))
        self._next(loop)

    def _write(self) -> None:
        found, self._found = self._found, array("d")
        part = self._file.with_suffix(".part")
        part.write_text("\n".join(f"{each:.6f}" for each in found))
        part.replace(self._file)


async def probed(probe: Probe, main: Coroutine[Any, Any, Any]) -> Any:
    probe.start()
    return await main


def main() -> None:
    probe = Probe(Path(os.environ["LAG_FILE"]))
    if sys.argv[1] == "idle":
        asyncio.run(probed(probe, asyncio.sleep(3600)))
        return
    import uvloop

    from ingle.cli.main import main as ingle

    run = uvloop.run
    uvloop.run = lambda main, **options: run(probed(probe, main), **options)  # type: ignore[arg-type]
    sys.argv[0] = "ingle"
    ingle()


if __name__ == "__main__":
    main()
