"""The page pool and the hash chain."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ingle.engine.pages import PagePool
from ingle.engine.prefix import extend_hashes, page_hash


def test_cached_pages_are_found_and_evicted_least_recently_used_first() -> None:
    pool = PagePool(4)
    first, second, third = pool.allocate(3)
    for page, name in ((first, b"a"), (second, b"b")):
        pool.register(page, name)
    pool.release([first])
    pool.release([second])
    pool.release([third])
    assert (pool.num_available, pool.num_cached) == (3, 2)
    assert pool.allocate(1) == [third], "a free page goes before cached content"
    assert pool.allocate(1) == [first]
    assert pool.find(b"a") is None and pool.find(b"b") == second
    pool.check([[first, third]])


def test_a_sequence_gives_back_its_tail_before_its_prefix() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    for page, name in zip(pages, (b"a", b"b"), strict=True):
        pool.register(page, name)
    pool.release(pages)
    assert pool.allocate(1) == [pages[1]]


def test_content_that_is_already_cached_stays_where_it_is() -> None:
    pool = PagePool(3)
    one, two = pool.allocate(2)
    pool.register(one, b"same")
    pool.register(two, b"same")
    assert pool.find(b"same") == one
    pool.release([two])
    assert pool.num_cached == 0
    pool.check([[one]])


def test_content_moves_to_a_page_that_is_in_use() -> None:
    """Which keeps it for longer than one that may be evicted."""
    pool = PagePool(3)
    one, two = pool.allocate(2)
    pool.register(one, b"same")
    pool.release([one])
    pool.register(two, b"same")
    assert pool.find(b"same") == two and pool.num_cached == 0
    assert pool.allocate(1) == [one] and pool.find(b"same") == two
    pool.check([[one], [two]])


def test_misuse_is_refused() -> None:
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(ValueError, match="1 pages asked for, 0 available"):
        pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match="nobody owns it"):
        pool.release([page])


@pytest.mark.parametrize("damage", ["lost", "twice", "count"])
def test_check_sees_damage(damage: str) -> None:
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.check([[page]])
    owners = {"lost": [[]], "twice": [[page], [page]], "count": [[page]]}[damage]
    if damage == "count":
        pool.refs[page] = 2
    with pytest.raises(AssertionError):
        pool.check(owners)


@given(st.lists(st.integers(0, 5), min_size=8, max_size=8), st.lists(st.integers(0, 5), min_size=8, max_size=8))
def test_equal_hashes_mean_equal_prefixes(left: list[int], right: list[int]) -> None:
    hashes: list[list[bytes]] = [[], []]
    for tokens, out in zip((left, right), hashes, strict=True):
        extend_hashes(out, tokens, 2, 2)
        extend_hashes(out, tokens, 2, 4)  # in two goes, as a sequence that grows
    for index in range(4):
        assert (hashes[0][index] == hashes[1][index]) == (left[: 2 * index + 2] == right[: 2 * index + 2])


def test_a_page_hash_depends_on_its_parent() -> None:
    assert page_hash(b"", [1, 2]) != page_hash(page_hash(b"", [0, 0]), [1, 2])


class PoolMachine(RuleBasedStateMachine):
    """Owners take, share, register and release pages in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(9)
        self.owners: list[list[int]] = []
        self.names: dict[bytes, int] = {}

    @rule(count=st.integers(0, 4))
    def take(self, count: int) -> None:
        if count <= self.pool.num_available:
            self.owners.append(self.pool.allocate(count))

    @precondition(lambda self: any(self.owners))
    @rule(data=st.data(), name=st.integers(0, 5))
    def register(self, data: st.DataObject, name: int) -> None:
        owner = data.draw(st.sampled_from([o for o in self.owners if o]))
        self.pool.register(data.draw(st.sampled_from(owner)), bytes([name]))

    @rule(name=st.integers(0, 5))
    def share(self, name: int) -> None:
        page = self.pool.find(bytes([name]))
        if page is not None:
            self.pool.share(page)
            self.owners.append([page])

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data: st.DataObject, forget: bool) -> None:
        owner = self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1)))
        if forget:
            self.pool.forget(owner)
        self.pool.release(owner)

    @invariant()
    def holds(self) -> None:
        self.pool.check(self.owners)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
