"""Files that are read again when they change, so that a server need not be started anew for a certificate or a key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ingle.errors import ConfigError

logger = logging.getLogger("ingle.server")

_LOOK_S = 10.0
"""Between two looks."""


class FollowedFiles:
    """What cannot be used is not taken up: what was read before stays."""

    def __init__(self, what: str, paths: Sequence[str], read: Callable[[], None]) -> None:
        """`read` is called after a change, from any thread, and raises `ConfigError` for files that cannot be used."""
        self._what = what
        self._paths = [Path(path).expanduser() for path in paths]
        self._read = read
        self._state = self._look()

    async def follow(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        if (state := self._look()) == self._state:
            return
        self._state = state
        try:
            self._read()
        except (ConfigError, OSError) as error:  # a file may be gone by now
            logger.error("%s changed, and what was read before holds on: %s", self._what, error)
        else:
            logger.info("%s changed: what comes now meets the new", self._what)

    def _look(self) -> list[tuple[int, int, int] | None]:
        """What changes with the files' content."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
            except OSError:
                found.append(None)
            else:
                found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return found
