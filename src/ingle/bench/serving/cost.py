"""What the client costs: its processor time, and how late its event loop is for what is due."""

from __future__ import annotations

import asyncio
import gc
import time
from types import TracebackType

import numpy as np

from ingle.bench.serving.results import ClientCost

_EVERY_S = 0.01
BUSY = 0.8
"""Share of a processor from which the client may be what is waited for."""
_LATE_S = 0.005


class CostMeter:
    """Around a level."""

    def __enter__(self) -> CostMeter:
        gc.disable()  # so that it does not come between two tokens
        self._late_s: list[float] = []
        self._loop = asyncio.get_running_loop()
        self._cpu_s, self._began_s = time.process_time(), time.perf_counter()
        self._wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._timer.cancel()
        gc.enable()
        self._cpu_s = time.process_time() - self._cpu_s
        self._wall_s = time.perf_counter() - self._began_s

    def cost(self, median_gap_s: float | None) -> ClientCost:
        """`median_gap_s`: between events of one answer; what is late by less than a part of it does not show."""
        late, gap = np.array(self._late_s or [0.0]), median_gap_s or 0.0
        share, mean, p99 = self._cpu_s / self._wall_s, float(late.mean()), float(np.percentile(late, 99))
        limited = share > BUSY or mean > max(_LATE_S, 0.2 * gap) or p99 > max(2 * _LATE_S, gap)
        return ClientCost(self._cpu_s, share, mean, p99, float(late.max()), limited)

    def _wait(self) -> None:
        self._due_s = time.perf_counter() + _EVERY_S  # the loop's own clock may count milliseconds
        self._timer = self._loop.call_later(_EVERY_S, self._came)

    def _came(self) -> None:
        self._late_s.append(max(time.perf_counter() - self._due_s, 0.0))
        self._wait()
