"""Keeps pages in the tiers below the device, and brings them back, in threads beside the engine's.

A page that is copied out is not held: it may be evicted meanwhile. Whoever copies it watches it (`PagePool.watched`),
and drops the copy if the pool took the page away before it was done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ingle.channel import TierStats
from ingle.device import PageCopies
from ingle.device.pages import Bytes
from ingle.engine.arrivals import Load
from ingle.engine.pages import PagePool
from ingle.engine.tiers import Tier
from ingle.errors import EngineError

logger = logging.getLogger("ingle")

_MOST_PAGES = 256
"""In one copy."""
_NICENESS = 10
"""What is kept can wait; what computes cannot."""


@dataclass
class TierCounters:
    """Since the start."""

    num_pages_read: int = 0
    num_pages_written: int = 0


@dataclass(frozen=True)
class Batch:
    """A part of a load."""

    load: Load
    entries: Sequence[tuple[bytes, int]]


class PageKeeper:
    """`LowerTiers` over real ones, the fastest first."""

    def __init__(
        self,
        pool: PagePool,
        copies: PageCopies,
        tiers: Mapping[str, Tier],
        *,
        batch_bytes: int,
        num_savers: int,
        num_loaders: int,
    ) -> None:
        self.tiers = tiers
        self.counters = {name: TierCounters() for name in tiers}
        self.num_dropped = 0
        """Pages that were not kept because they were evicted, or came, too fast."""
        self._pool = pool
        self._copies = copies
        self._saves: SimpleQueue[tuple[bytes, int] | None] = SimpleQueue()
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        self._num_left: dict[Load, int] = {}
        """Batches of each load that have not ended."""
        self._lock = threading.Lock()
        self._ended: deque[Load] = deque()
        self._bell = threading.Event()
        self._num_unsaved = 0
        page_bytes = copies.buffer(1).shape[1]
        self._batch_pages = min(max(batch_bytes // page_bytes, 1), _MOST_PAGES)
        self._num_savers, self._num_loaders = num_savers, num_loaders
        for run, count in ((self._save_all, num_savers), (self._load_all, num_loaders)):
            for _ in range(count):
                buffer = copies.buffer(self._batch_pages)
                threading.Thread(target=run, args=(buffer,), name="prompt cache", daemon=True).start()

    # ---- for the scheduler

    def __contains__(self, name: object) -> bool:
        return any(name in tier for tier in self.tiers.values())

    def save(self, name: bytes, page_id: int) -> None:
        if self._saves.qsize() > 2 * self._pool.num_pages:
            self.num_dropped += 1
            return
        with self._lock:
            self._num_unsaved += 1
        self._saves.put((name, page_id))

    def load(self, load: Load) -> None:
        size = self._batch_pages
        batches = [Batch(load, load.entries[first : first + size]) for first in range(0, len(load.entries), size)]
        self._num_left[load] = len(batches)
        for batch in batches:
            self._batches.put(batch)

    def loaded(self) -> list[Load]:
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    # ---- for the engine

    def stats(self) -> tuple[TierStats, ...]:
        counters, tiers = self.counters, self.tiers
        return tuple(
            TierStats(
                name,
                tier.num_bytes,
                counters[name].num_pages_read,
                counters[name].num_pages_written,
                tier.num_damaged,
            )
            for name, tier in tiers.items()
        )

    def wait(self, timeout_s: float) -> None:
        """Until a load has ended."""
        self._bell.wait(timeout_s)
        self._bell.clear()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all is kept that was to be. False where that takes longer."""
        deadline_s = time.monotonic() + timeout_s
        while self._num_unsaved:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.002)
        return True

    def stop(self) -> None:
        """Ends the threads, which hold the device's pages in memory. What is queued is kept and read before."""
        for _ in range(self._num_savers):
            self._saves.put(None)
        for _ in range(self._num_loaders):
            self._batches.put(None)

    # ---- threads

    def _save_all(self, buffer: Bytes) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while (first := self._saves.get()) is not None:
            entries = self._with_next(first, len(buffer))
            try:
                self._save(entries, buffer)
            except Exception as error:  # the next pages may be better off
                _log("the prompt cache could not keep %d pages", len(entries), error)
            with self._lock:
                self._num_unsaved -= len(entries)

    def _with_next(self, first: tuple[bytes, int], most: int) -> list[tuple[bytes, int]]:
        entries = [first]
        with contextlib.suppress(Empty):
            while len(entries) < most:
                entry = self._saves.get_nowait()
                if entry is None:  # the end, which may as well be another thread's
                    self._saves.put(None)
                    break
                entries.append(entry)
        return entries

    def _save(self, entries: Sequence[tuple[bytes, int]], buffer: Bytes) -> None:
        token, pool, wanted = object(), self._pool, dict[int, bytes]()
        for name, page_id in entries:
            if all(name in tier for tier in self.tiers.values()):
                for tier in self.tiers.values():
                    tier.touch(name)
                continue
            pool.watched[page_id] = token
            if pool.find(name) == page_id:  # after it is watched: what is taken away from now on is seen
                wanted[page_id] = name
            else:
                pool.watched.pop(page_id, None)
                self.num_dropped += 1
        if not wanted:
            return
        pages = buffer[: len(wanted)]
        self._copies.read(list(wanted), pages)
        for (page_id, name), page in zip(wanted.items(), pages, strict=True):
            if pool.watched.get(page_id) is not token:
                self.num_dropped += 1
                continue
            pool.watched.pop(page_id, None)
            for kind, tier in self.tiers.items():
                if name not in tier:
                    tier.write(name, page)
                    self.counters[kind].num_pages_written += name in tier

    def _load_all(self, buffer: Bytes) -> None:
        while (batch := self._batches.get()) is not None:
            names = {name for name, _ in batch.entries}
            try:
                failed = names if batch.load.cancelled else self._load(batch.entries, buffer)
            except Exception as error:  # what is not read is computed
                _log("the prompt cache could not read %d pages", len(names), error)
                failed = names
            with self._lock:
                batch.load.failed |= failed
                self._num_left[batch.load] -= 1
                if self._num_left[batch.load] == 0:
                    del self._num_left[batch.load]
                    self._ended.append(batch.load)
                    self._bell.set()

    def _load(self, entries: Sequence[tuple[bytes, int]], buffer: Bytes) -> set[bytes]:
        """Returns the names of what was not there or not whole."""
        failed, found = set[bytes](), list[int]()
        for name, page_id in entries:
            if self._read(name, buffer[len(found)]):
                found.append(page_id)
            else:
                failed.add(name)
        if found:
            self._copies.write(found, buffer[: len(found)])
        return failed

    def _read(self, name: bytes, out: Bytes) -> bool:
        """What a slower tier had is kept in the faster ones from now on."""
        faster: list[str] = []
        for kind, tier in self.tiers.items():
            if tier.read(name, out):
                self.counters[kind].num_pages_read += 1
                for other in faster:
                    self.tiers[other].write(name, out)
                return True
            faster.append(kind)
        return False


def _log(what: str, num_pages: int, error: Exception) -> None:
    if not isinstance(error, EngineError):  # where the device is lost, the engine says so
        logger.error(what, num_pages, exc_info=error)
