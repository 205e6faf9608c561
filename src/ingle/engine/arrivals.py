"""Sequences that come in, while pages of theirs are read from a tier below the device's: host memory, or a disk.

    reading   has a slot and all of its pages, of which some are being written: nothing takes them away before that ends
    ready     has a slot and all of its pages
    parked    has neither: somebody else reads what it needs

A page is made findable once it is read. What cannot be read is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, Protocol, TypeVar

from ingle.engine.pages import PagePool

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Load:
    """Pages to be read, for one sequence."""

    entries: list[tuple[bytes, int]]
    """Name of the content, and page."""
    tainted: list[int]
    """Of these pages those that were to be zeroed, which is not needed once they are read."""
    cancelled: bool = False
    """Nobody waits for it: what is not being read already need not be."""
    failed: set[bytes] = field(default_factory=set)
    """Names whose content was not there, or not whole: their pages are as they were."""


class LowerTiers(Protocol):
    """Keeps the content of full pages when the device does not, and works beside steps."""

    def __contains__(self, name: object) -> bool:
        """Whether it is likely to have the content of this name."""
        ...

    def save(self, name: bytes, page_id: int) -> None:
        """Copies a page that is written, soon, if the pool still has that content in it then."""
        ...

    def load(self, load: Load) -> None:
        """Begins to read."""
        ...

    def loaded(self) -> list[Load]:
        """Those that have ended since this was last asked."""
        ...


class NoTiers:
    """There is nothing below the device."""

    def __contains__(self, name: object) -> bool:
        return False

    def save(self, name: bytes, page_id: int) -> None:
        raise AssertionError("nobody keeps pages")

    def load(self, load: Load) -> None:
        raise AssertionError("nobody has pages")

    def loaded(self) -> list[Load]:
        return []


class Arrivals(Generic[T]):
    """Who reads, who has read, and who waits for what others read."""

    def __init__(self, pages: PagePool) -> None:
        self._pages = pages
        self._reading: dict[Load, T] = {}
        self._gone: dict[Load, T] = {}
        """Sequences that ended meanwhile."""
        self._ready: dict[T, None] = {}
        self._parked: dict[T, None] = {}
        self._names: dict[bytes, Load] = {}
        """That are being read."""

    @property
    def is_reading(self) -> bool:
        return bool(self._reading) or bool(self._gone)

    @property
    def ready(self) -> Sequence[T]:
        return list(self._ready)

    @property
    def with_slots(self) -> Iterator[T]:
        """All that hold slots and pages."""
        return chain(self._reading.values(), self._gone.values(), self._ready)

    @property
    def parked(self) -> Iterable[T]:
        return self._parked

    def __len__(self) -> int:
        """Of those that are to run."""
        return len(self._reading) + len(self._ready) + len(self._parked)

    def is_read(self, names: Iterable[bytes]) -> bool:
        """Whether any of this is being read."""
        return any(name in self._names for name in names)

    def park(self, item: T) -> None:
        self._parked[item] = None

    def begin(self, load: Load, item: T) -> None:
        self._reading[load] = item
        self._names |= dict.fromkeys((name for name, _ in load.entries), load)

    def cancel(self) -> None:
        """Whoever reads shall do so later."""
        for load in self._reading:
            load.cancelled = True

    def end(self, load: Load) -> T | None:
        """Makes findable what was read. Returns the sequence if it has to give its pages back: it ended meanwhile, or
        not all was read."""
        self._pages_read(load)
        if load in self._gone:
            return self._gone.pop(load)
        item = self._reading.pop(load)
        if load.failed:
            return item
        self._ready[item] = None
        return None

    def _pages_read(self, load: Load) -> None:
        for name, page_id in load.entries:
            del self._names[name]
            if name not in load.failed:
                self._pages.register(page_id, name)

    def unpark(self) -> list[T]:
        """Whoever waits for what others read may look again."""
        items = list(self._parked)
        self._parked.clear()
        return items

    def take(self, item: T) -> None:
        """One that is ready: it runs from now on, or waits again."""
        del self._ready[item]

    def leave(self, item: T) -> bool:
        """Takes out a sequence that ends. True: its pages are being written, and `end` will tell when it can go."""
        for load, other in self._reading.items():
            if other is item:
                load.cancelled = True
                self._gone[load] = self._reading.pop(load)
                return True
        self._ready.pop(item, None)
        self._parked.pop(item, None)
        return False

    def __contains__(self, item: T) -> bool:
        return item in self._ready or item in self._parked or item in self._reading.values()
