"""When a new engine may follow one that has died, and how long that waits."""

from __future__ import annotations

import time

_MAX_DELAY_S = 30.0


class Restarts:
    """At most `most` in a row. The first comes at once; each of those that follow waits twice as long."""

    def __init__(self, most: int, well_s: float) -> None:
        """`well_s`: an engine that has run for so long begins the count anew."""
        self.most = most
        self.num = 0
        """In a row, so far."""
        self._well_s = well_s
        self._ready_s = time.monotonic()

    def ready(self) -> None:
        """An engine takes requests."""
        self._ready_s = time.monotonic()

    def next_delay_s(self) -> float | None:
        """Before one more, which is counted; None when there were too many."""
        if time.monotonic() - self._ready_s >= self._well_s:
            self.num = 0
        if self.num >= self.most:
            return None
        self._ready_s = float("inf")  # until it is
        self.num += 1
        return min(2.0 ** (self.num - 2), _MAX_DELAY_S) if self.num > 1 else 0.0
