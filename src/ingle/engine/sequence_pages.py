"""The pages of one sequence: for each group of layers a list, which grows, and begins later where layers look back no
further than a window.

In each group, pages by their index, which is that of their tokens divided by the size of a page:

    [0, first)                  given back, or never held: nothing reads them any more; listed as the reserved page
    [first, len(page_ids))      held: written, being written, or to be written
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from ingle.engine.pages import PagePool
from ingle.engine.prefix import ROOT, extend_hashes, name_in_group
from ingle.kv import first_page_seen
from ingle.step import RESERVED_PAGE


@dataclass(frozen=True, slots=True)
class Paging:
    """What all sequences' pages have in common."""

    pool: PagePool
    windows: tuple[int | None, ...]
    """Of each group."""
    page_size: int

    @property
    def has_windows(self) -> bool:
        return any(window is not None for window in self.windows)


class SequencePages:
    """What one sequence holds of the pool. The names of its pages' contents outlast a preemption."""

    __slots__ = (
        "_hashes",
        "_leaves_at",
        "_num_kept",
        "_num_registered",
        "_paging",
        "_root",
        "given_back",
        "num_tokens",
        "page_ids",
        "unread",
    )

    def __init__(self, paging: Paging, root: bytes = ROOT) -> None:
        self._paging = paging
        self._root = root
        self._hashes: list[bytes] = []
        """Of the first full pages; grows as they are asked for."""
        self._num_registered = 0
        """The first pages, which the prefix cache knows."""
        self.page_ids: list[list[int]] = [[] for _ in paging.windows]
        """Of each group."""
        self.num_tokens = 0
        """For which there are pages in every group."""
        self._leaves_at = 0
        """Before this position no page falls out of a window."""
        self.given_back: list[int] = []
        """While the sequence goes on, since whoever reads this last cleared it."""
        self.unread: list[tuple[bytes, int]] = []
        """Pages whose content a lower tier has, by its name."""
        self._num_kept = 0
        """The first pages, which lower tiers were told of."""

    @property
    def held(self) -> Iterator[int]:
        """Pages of all groups, the last tokens' last."""
        for index in range(max(map(len, self.page_ids))):
            for pages in self.page_ids:
                if index < len(pages) and pages[index] != RESERVED_PAGE:
                    yield pages[index]

    # ---- the prefix cache

    def num_cached(self, token_ids: Sequence[int], lower: Container[bytes] = ()) -> int:
        """Tokens, in whole pages, that the prefix cache has; one at least is left to compute, for its logits.

        It has them if it has all pages of groups without a window, and of others those that the next token reads. So
        count those that only a `lower` tier has.
        """
        windows, most = self._paging.windows, (len(token_ids) - 1) // self._paging.page_size
        full = [group for group, window in enumerate(windows) if window is None]
        num_pages = 0 if full else most
        while num_pages < most and all(self._is_known(group, num_pages, token_ids, lower) for group in full):
            num_pages += 1
        while (
            self._paging.has_windows
            and num_pages
            and (missing := self._missing(num_pages, token_ids, lower)) is not None
        ):
            num_pages = missing  # whoever begins behind it, within a window, reads it
        return num_pages * self._paging.page_size

    def _missing(self, num_pages: int, token_ids: Sequence[int], lower: Container[bytes]) -> int | None:
        """The last page that the token after so many pages reads in a group with a window, and that is not cached."""
        firsts = {
            group: first_page_seen(window, num_pages * self._paging.page_size, self._paging.page_size)
            for group, window in enumerate(self._paging.windows)
            if window is not None
        }
        for index in range(num_pages - 1, min(firsts.values()) - 1, -1):
            if any(
                first <= index and not self._is_known(group, index, token_ids, lower) for group, first in firsts.items()
            ):
                return index
        return None

    def absent(self, token_ids: Sequence[int], num_cached: int) -> Iterator[tuple[int, int, bytes]]:
        """Of the pages that hold the first `num_cached` tokens, those that have to be read from a lower tier: group,
        index and name."""
        size = self._paging.page_size
        for group, window in enumerate(self._paging.windows):
            for index in range(first_page_seen(window, num_cached, size), num_cached // size):
                name = self._name(group, index, token_ids)
                if self._paging.pool.find(name) is None:
                    yield group, index, name

    def _name(self, group: int, index: int, token_ids: Sequence[int]) -> bytes:
        extend_hashes(self._hashes, token_ids, self._paging.page_size, index + 1, self._root)
        return name_in_group(self._hashes[index], group)

    def _find(self, group: int, index: int, token_ids: Sequence[int]) -> int | None:
        return self._paging.pool.find(self._name(group, index, token_ids))

    def _is_known(self, group: int, index: int, token_ids: Sequence[int], lower: Container[bytes]) -> bool:
        name = self._name(group, index, token_ids)
        return self._paging.pool.find(name) is not None or name in lower

    def register(self, token_ids: Sequence[int], num_tokens: int) -> None:
        """Makes findable the full pages of the first `num_tokens` tokens, which are known and (being) written."""
        num_full = num_tokens // self._paging.page_size
        if num_full > self._num_registered:
            extend_hashes(self._hashes, token_ids, self._paging.page_size, num_full, self._root)
            for group, pages in enumerate(self.page_ids):
                for index in range(self._num_registered, num_full):
                    self._paging.pool.register(pages[index], name_in_group(self._hashes[index], group))
            self._num_registered = num_full

    def newly_full(self, token_ids: Sequence[int], num_tokens: int) -> Iterator[tuple[bytes, int]]:
        """Names and pages of what became full since this was last asked, of the first `num_tokens` tokens, which are
        written. What a window left behind, or another page holds as well, is not among them."""
        num_full = num_tokens // self._paging.page_size
        for index in range(self._num_kept, num_full):
            for group, pages in enumerate(self.page_ids):
                name = self._name(group, index, token_ids)
                if pages[index] != RESERVED_PAGE and self._paging.pool.find(name) == pages[index]:
                    yield name, pages[index]
        self._num_kept = max(self._num_kept, num_full)

    # ---- growth

    def start(self, token_ids: Sequence[int], num_cached: int, end: int, num_kept: int) -> bool:
        """Takes the `num_cached` first tokens from the prefix cache, and pages for the rest.

        Groups without a window get pages for all tokens; others for those up to `end`, and at least for a window of
        them, which is what they will hold. Pages of cached tokens that are not there are `unread`. False, with nothing
        taken, where then less than `num_kept` pages are left.
        """
        pool, size = self._paging.pool, self._paging.page_size
        absent, ends = list(self.absent(token_ids, num_cached)), []
        for group, window in enumerate(self._paging.windows):
            first = first_page_seen(window, num_cached, size)
            shared = [self._find(group, index, token_ids) for index in range(first, num_cached // size)]
            for page_id in shared:
                if page_id is not None:
                    pool.share(page_id)
            self.page_ids[group] = [RESERVED_PAGE] * first + [page_id or RESERVED_PAGE for page_id in shared]
            held_from = 0 if window is None else max(num_cached - window + 1, 0)
            ends.append(len(token_ids) if window is None else min(max(end, held_from + window), len(token_ids)))
        wanted = [max(-(-end // size) - len(pages), 0) for end, pages in zip(ends, self.page_ids, strict=True)]
        if sum(wanted) + len(absent) + num_kept > pool.num_available:
            self.give_back()
            return False
        for (group, index, name), page_id in zip(absent, pool.allocate(len(absent)), strict=True):
            self.page_ids[group][index] = page_id
            self.unread.append((name, page_id))
        for pages, count in zip(self.page_ids, wanted, strict=True):
            pages += pool.allocate(count)
        self._num_registered = num_cached // size
        self._count()
        return True

    def num_lacking(self, end: int) -> int:
        """Pages to be taken before the first `end` tokens have all of theirs."""
        if end <= self.num_tokens:
            return 0
        num_pages = -(-end // self._paging.page_size)
        return sum(max(num_pages - len(pages), 0) for pages in self.page_ids)

    def reach(self, end: int) -> int:
        """How many tokens can have pages now, up to `end`."""
        while (lacking := self.num_lacking(end)) > self._paging.pool.num_available:
            # A page of tokens takes at most as many as there are groups.
            too_many = -(-(lacking - self._paging.pool.num_available) // len(self.page_ids))
            end = (-(-end // self._paging.page_size) - too_many) * self._paging.page_size
        return end

    def grow(self, end: int) -> list[tuple[int, int, int]]:
        """Takes the pages that the first `end` tokens lack: (group, index, page) of each."""
        if end <= self.num_tokens:
            return []
        num_pages, taken = -(-end // self._paging.page_size), []
        for group, pages in enumerate(self.page_ids):
            for page_id in self._paging.pool.allocate(max(num_pages - len(pages), 0)):
                taken.append((group, len(pages), page_id))
                pages.append(page_id)
        self._count()
        return taken

    def _count(self) -> None:
        self.num_tokens = min(map(len, self.page_ids)) * self._paging.page_size

    # ---- what is not read any more

    def leave_behind(self, position: int) -> list[tuple[int, int]]:
        """Gives back the pages that nobody reads who computes the token at `position` or a later one.

        Returns (group, index) of each. No launched step may compute a token before `position`.
        """
        left: list[tuple[int, int]] = []
        if position < self._leaves_at:
            return left
        firsts = [first_page_seen(window, position, self._paging.page_size) for window in self._paging.windows]
        self._leaves_at = min(
            (first + 1) * self._paging.page_size + window - 1
            for first, window in zip(firsts, self._paging.windows, strict=True)
            if window is not None
        )
        for group, (first, pages) in enumerate(zip(firsts, self.page_ids, strict=True)):
            index = first - 1
            while index >= 0 and pages[index] != RESERVED_PAGE:
                self._paging.pool.release(pages[index : index + 1])
                self.given_back.append(pages[index])
                pages[index] = RESERVED_PAGE
                left.append((group, index))
                index -= 1
        return left

    def written_from(self, position: int) -> Iterator[int]:
        """Pages of the token at `position` and of later ones."""
        for pages in self.page_ids:
            yield from (page_id for page_id in pages[position // self._paging.page_size :] if page_id != RESERVED_PAGE)

    def give_back(self) -> None:
        """All of them."""
        self._paging.pool.release(list(self.held))
        self.page_ids = [[] for _ in self._paging.windows]
        self.num_tokens = self._num_registered = self._num_kept = self._leaves_at = 0
        self.given_back = []
        self.unread = []

    def exclusive(self) -> list[int]:
        """Pages with what this sequence wrote and nobody else has: held, or given back and still without an owner."""
        refs = self._paging.pool.refs
        return [page_id for page_id in self.held if refs[page_id] == 1] + [
            page_id for page_id in dict.fromkeys(self.given_back) if refs[page_id] == 0
        ]
