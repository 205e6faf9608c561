"""Sequences that come in, while pages of theirs are read from a tier below the device's: host memory, or a disk.

    reading   has a slot and all of its pages, of which some are being written: nothing takes them away before that ends
    parked    has neither: somebody else reads what it needs

A page is made findable once it is read. What cannot be read is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
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
    """Who reads, and who waits for what others read."""

    def __init__(self, pages: PagePool) -> None:
        self._pages = pages
        self._reading: dict[T, Load] = {}
        self._gone: dict[Load, T] = {}
        """Sequences that ended meanwhile."""
        self._parked: dict[T, None] = {}
        self._names: set[bytes] = set()
        """That are being read."""

    @property
    def is_reading(self) -> bool:
        return bool(self._reading) or bool(self._gone)

    @property
    def reading(self) -> Collection[T]:
        return self._reading.keys()

    @property
    def with_slots(self) -> Iterator[T]:
        """All that hold slots and pages."""
        return chain(self._reading, self._gone.values())

    @property
    def to_run(self) -> Iterator[T]:
        """All that have not ended."""
        return chain(self._reading, self._parked)

    def __len__(self) -> int:
        """Of those that have not ended."""
        return len(self._reading) + len(self._parked)

    def __contains__(self, item: T) -> bool:
        return item in self._reading or item in self._parked

    def is_read(self, names: Iterable[bytes]) -> bool:
        """Whether any of this is being read."""
        return not self._names.isdisjoint(names)

    def begin(self, load: Load, item: T) -> None:
        self._reading[item] = load
        self._names.update(name for name, _ in load.entries)

    def park(self, item: T) -> None:
        self._parked[item] = None

    def unpark(self) -> list[T]:
        """Whoever waits for what others read may look again."""
        items = list(self._parked)
        self._parked.clear()
        return items

    def cancel(self) -> None:
        """Whoever reads shall do so later."""
        for load in self._reading.values():
            load.cancelled = True

    def leave(self, item: T) -> bool:
        """Takes out a sequence that ends. True: its pages are being written, and `end` will tell when they may go."""
        load = self._reading.pop(item, None)
        if load is None:
            del self._parked[item]
            return False
        load.cancelled = True
        self._gone[load] = item
        return True

    def end(self, load: Load) -> T:
        """Makes findable what was read. Returns the sequence that it was read for."""
        for name, page_id in load.entries:
            self._names.discard(name)
            if name not in load.failed:
                self._pages.register(page_id, name)
        item = self._gone.pop(load, None)
        if item is None:
            item = next(item for item, other in self._reading.items() if other is load)
            del self._reading[item]
        return item
