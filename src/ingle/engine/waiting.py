"""The queue of sequences that wait for a slot: in their order, and by how much of their prompts is to be computed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingQueue(Generic[T]):
    """First come, first served, with a look at the shortest; whichever leaves, the rest stays as it is."""

    def __init__(self) -> None:
        self._keys: OrderedDict[T, tuple[int, int]] = OrderedDict()  # number of tokens, then number of arrival
        self._by_length: list[tuple[tuple[int, int], T]] = []
        self._numbers = count()

    def append(self, item: T, num_tokens: int) -> None:
        key = self._keys[item] = (num_tokens, next(self._numbers))
        insort(self._by_length, (key, item))

    def prepend(self, item: T, num_tokens: int) -> None:
        self.append(item, num_tokens)
        self._keys.move_to_end(item, last=False)

    def sort(self, key: Callable[[T], int]) -> None:
        """Puts all in another order."""
        for item in sorted(self._keys, key=key):
            self._keys.move_to_end(item)

    def remove(self, item: T) -> None:
        """Takes out an item, wherever it stands."""
        key = self._keys.pop(item)
        del self._by_length[bisect_left(self._by_length, key, key=lambda entry: entry[0])]

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

    def __iter__(self) -> Iterator[T]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
