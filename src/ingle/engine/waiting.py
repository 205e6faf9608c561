"""The queue of sequences that wait for a slot: by priority, client, arrival, and by how much is to be computed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Generic, TypeVar

T = TypeVar("T")

FIRST = -(2**64)
"""Goes before every priority that a request can have."""


class Line(Generic[T]):
    """What one client has of one priority, in the order in which it came; whichever leaves, the rest stays as it is."""

    def __init__(self) -> None:
        self._keys: OrderedDict[T, tuple[int, int]] = OrderedDict()
        """Number of tokens, then number of arrival."""
        self._by_length: list[tuple[tuple[int, int], T]] = []

    @property
    def head(self) -> T:
        return next(iter(self._keys))

    @property
    def shortest(self) -> T:
        """Of several, the one that came first."""
        return self._by_length[0][1]

    def num_tokens(self, item: T) -> int:
        """As it was given."""
        return self._keys[item][0]

    def append(self, item: T, key: tuple[int, int]) -> None:
        self._keys[item] = key
        insort(self._by_length, (key, item))

    def move_to_head(self, item: T) -> None:
        self._keys.move_to_end(item, last=False)

    def sort(self, key: Callable[[T], int]) -> None:
        for item in sorted(self._keys, key=key):
            self._keys.move_to_end(item)

    def remove(self, item: T) -> None:
        key = self._keys.pop(item)
        del self._by_length[bisect_left(self._by_length, key, key=lambda entry: entry[0])]

    def __iter__(self) -> Iterator[T]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class WaitingQueue(Generic[T]):
    """A line for each client of each priority."""

    def __init__(self) -> None:
        self._lines: dict[int, dict[str, Line[T]]] = {}
        """By priority, then by client; none is empty."""
        self._priorities: list[int] = []
        self._place_of: dict[T, tuple[int, str]] = {}
        self._numbers = count()

    @property
    def priorities(self) -> Sequence[int]:
        """Of those that wait, the lowest first."""
        return self._priorities

    def lines(self, priority: int) -> Mapping[str, Line[T]]:
        """By client."""
        return self._lines.get(priority, {})

    def append(self, item: T, num_tokens: int, priority: int = 0, client: str = "") -> None:
        if priority not in self._lines:
            self._lines[priority] = {}
            insort(self._priorities, priority)
        line = self._lines[priority].setdefault(client, Line())
        line.append(item, (num_tokens, next(self._numbers)))
        self._place_of[item] = priority, client

    def prepend(self, item: T, num_tokens: int, priority: int = 0, client: str = "") -> None:
        """Before all others of this client and priority."""
        self.append(item, num_tokens, priority, client)
        self._lines[priority][client].move_to_head(item)

    def sort(self, key: Callable[[T], int]) -> None:
        """Puts those of each line in another order."""
        for lines in self._lines.values():
            for line in lines.values():
                line.sort(key)

    def remove(self, item: T) -> None:
        """Takes out an item, wherever it stands."""
        priority, client = self._place_of.pop(item)
        lines = self._lines[priority]
        lines[client].remove(item)
        if not lines[client]:
            del lines[client]
        if not lines:
            del self._lines[priority]
            self._priorities.remove(priority)

    def __iter__(self) -> Iterator[T]:
        for priority in self._priorities:
            yield from chain.from_iterable(self._lines[priority].values())

    def __len__(self) -> int:
        return len(self._place_of)
