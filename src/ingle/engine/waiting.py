"""The queue of sequences that wait for a slot: by priority, by arrival, and by how much is to be computed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, count
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST = -(2**64)
"""Goes before every priority that a request can have."""


class WaitingQueue(Generic[T]):
    """The lowest priority goes first, and whoever came first of one priority, with a look at the shortest of those that
    the head is among; whichever leaves, the rest stays as it is."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line[T]] = {}
        """By priority; none is empty."""
        self._priorities: list[int] = []
        self._priority_of: dict[T, int] = {}
        self._numbers = count()

    def append(self, item: T, num_tokens: int, priority: int = 0) -> None:
        if priority not in self._lines:
            self._lines[priority] = _Line()
            insort(self._priorities, priority)
        self._lines[priority].append(item, (num_tokens, next(self._numbers)))
        self._priority_of[item] = priority

    def prepend(self, item: T, num_tokens: int, priority: int = 0) -> None:
        """Before all others of this priority."""
        self.append(item, num_tokens, priority)
        self._lines[priority].keys.move_to_end(item, last=False)

    def sort(self, key: Callable[[T], int]) -> None:
        """Puts those of each priority in another order."""
        for line in self._lines.values():
            for item in sorted(line.keys, key=key):
                line.keys.move_to_end(item)

    def remove(self, item: T) -> None:
        """Takes out an item, wherever it stands."""
        priority = self._priority_of.pop(item)
        self._lines[priority].remove(item)
        if not self._lines[priority].keys:
            del self._lines[priority]
            self._priorities.remove(priority)

    @property
    def head(self) -> T:
        return next(iter(self._first.keys))

    @property
    def shortest(self) -> T:
        """Of those of the head's priority; of several, the one that came first."""
        return self._first.by_length[0][1]

    @property
    def _first(self) -> _Line[T]:
        return self._lines[self._priorities[0]]

    def num_tokens(self, item: T) -> int:
        """As it was given."""
        return self._lines[self._priority_of[item]].keys[item][0]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._lines[priority].keys for priority in self._priorities)

    def __len__(self) -> int:
        return len(self._priority_of)


class _Line(Generic[T]):
    """Those of one priority."""

    def __init__(self) -> None:
        self.keys: OrderedDict[T, tuple[int, int]] = OrderedDict()
        """Number of tokens, then number of arrival."""
        self.by_length: list[tuple[tuple[int, int], T]] = []

    def append(self, item: T, key: tuple[int, int]) -> None:
        self.keys[item] = key
        insort(self.by_length, (key, item))

    def remove(self, item: T) -> None:
        key = self.keys.pop(item)
        del self.by_length[bisect_left(self.by_length, key, key=lambda entry: entry[0])]
