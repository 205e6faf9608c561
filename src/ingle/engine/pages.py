"""The pool of KV pages: reference counts, and full pages kept findable by their content after their owners left.

Every page but the reserved one is in exactly one state:

    free     no owner, no content worth keeping
    cached   no owner, findable by its hash until it is evicted, least recently used first
    owned    `refs[page] >= 1` sequences hold it; it may be findable by its hash as well
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ingle.step import RESERVED_PAGE


class PagePool:
    """`num_pages` pages, of which page 0 is reserved and the rest are handed out."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"a pool needs a reserved page and at least one more, got {num_pages}")
        self.num_pages = num_pages
        self.refs = [0] * num_pages
        self._free = list(range(num_pages - 1, RESERVED_PAGE, -1))
        self._cached: dict[int, None] = {}  # insertion order is eviction order
        self._page_of_hash: dict[bytes, int] = {}
        self._hash_of_page: dict[int, bytes] = {}
        self.watched: dict[int, object] = {}
        """Pages whose content somebody copies, in a thread; those that lose it are taken out."""

    @property
    def capacity(self) -> int:
        """Pages that sequences can own."""
        return self.num_pages - 1

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can hand out now: free ones, then cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each. Cached content is evicted only when no page is free."""
        if count > self.num_available:
            raise ValueError(f"{count} pages asked for, {self.num_available} available")
        page_ids = []
        for _ in range(count):
            page_id = self._free.pop() if self._free else self._evict()
            self.refs[page_id] = 1
            page_ids.append(page_id)
        return page_ids

    def share(self, page_id: int) -> None:
        """One more reference to a page that is cached or owned."""
        if self.refs[page_id] == 0:
            del self._cached[page_id]
        self.refs[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """Drops one reference of each. Last page first, so that a prefix outlives what was built on it."""
        for page_id in reversed(page_ids):
            if self.refs[page_id] < 1:
                raise ValueError(f"page {page_id} is released but nobody owns it")
            self.refs[page_id] -= 1
            if self.refs[page_id] == 0:
                if page_id in self._hash_of_page:
                    self._cached[page_id] = None
                else:
                    self._free.append(page_id)

    def find(self, content_hash: bytes) -> int | None:
        """The page that holds this content, if any does."""
        return self._page_of_hash.get(content_hash)

    def register(self, page_id: int, content_hash: bytes) -> None:
        """Makes an owned, full page findable. Content that another owned page already holds is left with that page.

        A cached page of the same content, which would be evicted sooner, is free from now on.
        """
        if page_id in self._hash_of_page:
            return
        holder = self._page_of_hash.get(content_hash)
        if holder in self._cached:
            self.forget([holder])
        elif holder is not None:
            return
        self._page_of_hash[content_hash] = page_id
        self._hash_of_page[page_id] = content_hash

    def forget(self, page_ids: Iterable[int]) -> None:
        """Makes pages unfindable, because their content turned out to be unusable."""
        for page_id in page_ids:
            content_hash = self._hash_of_page.pop(page_id, None)
            if content_hash is not None:
                del self._page_of_hash[content_hash]
                self.watched.pop(page_id, None)
                if page_id in self._cached:
                    del self._cached[page_id]
                    self._free.append(page_id)

    def _evict(self) -> int:
        page_id = next(iter(self._cached))
        del self._cached[page_id]
        del self._page_of_hash[self._hash_of_page.pop(page_id)]
        self.watched.pop(page_id, None)  # last: whoever watches a page makes sure after that it can still be found
        return page_id

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Proves that every page is free, cached or owned exactly as often as counted. Raises `AssertionError`."""
        owned = Counter(page_id for page_ids in owners for page_id in page_ids)
        free = Counter(self._free)
        assert all(count == 1 for count in free.values()), "a page is free twice"
        for page_id in range(self.num_pages):
            states = (page_id in free) + (page_id in self._cached) + (owned[page_id] > 0)
            expected = 0 if page_id == RESERVED_PAGE else 1
            assert states == expected, f"page {page_id} is in {states} states, not {expected}"
            assert self.refs[page_id] == owned[page_id], (
                f"page {page_id} counts {self.refs[page_id]} references and has {owned[page_id]} owners"
            )
        assert self._page_of_hash == {h: p for p, h in self._hash_of_page.items()}, "the two hash tables disagree"
        assert all(page_id in self._hash_of_page for page_id in self._cached), "a cached page cannot be found"
        assert not any(page_id in self._hash_of_page for page_id in free), "a free page can still be found"
