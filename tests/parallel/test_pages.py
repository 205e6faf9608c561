"""Pages of all ranks as pages of one device: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ingle.device.pages import Bytes, HostPages
from ingle.parallel.messages import Copied, CopyPages, SharePages, ToRanks
from ingle.parallel.pages import RankPages, RankPart

SIDE_BYTES = (64, 8, 24)
"""Of a page, what each rank has of one side of one place: they have different layers."""
NUM_PAGES = 6


class Fails(HostPages):
    """Such as a GPU without memory to gather pages in."""

    fails = False

    def read(self, page_ids: Sequence[int], out: Bytes) -> None:
        if self.fails:
            raise MemoryError("no room")
        super().read(page_ids, out)


class Team:
    """Ranks 1 and up, in this process."""

    num_ranks = len(SIDE_BYTES)

    def __init__(self, others: Sequence[HostPages]) -> None:
        self.told: list[ToRanks] = []
        self.hear: Callable[[Copied], None] = lambda message: None
        self.parts = [RankPart(pages, rank, lambda said: self.hear(said)) for rank, pages in enumerate(others, 1)]

    def on_copied(self, hear: Callable[[Copied], None]) -> None:
        self.hear = hear

    def check(self) -> None: ...

    def tell(self, message: ToRanks) -> None:
        self.told.append(message)
        for part in self.parts:
            if isinstance(message, SharePages):
                part.share(message)
            elif isinstance(message, CopyPages):
                part.copy(message)


def ranks() -> tuple[list[Bytes], list[Fails], RankPages, Team]:
    generator = np.random.default_rng(0)
    memories = [generator.integers(0, 256, (2, 2, NUM_PAGES, side), np.uint8) for side in SIDE_BYTES]
    own, *others = every = [Fails(memory) for memory in memories]
    team = Team(others)
    waits = lambda: team.told.append("waited")  # type: ignore[arg-type]  # noqa: E731
    return memories, every, RankPages(own, team, [4 * side for side in SIDE_BYTES], waits), team  # type: ignore[arg-type]


def test_pages_come_back_as_they_were() -> None:
    memories, _, pages, team = ranks()
    before = [memory.copy() for memory in memories]
    buffers = [pages.buffer(3), pages.buffer(2)]
    assert buffers[0].shape == (3, 4 * sum(SIDE_BYTES))
    rows = [[4, 1, 3], [5, 2]]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(pages.read, rows, buffers))
    for memory in memories:
        memory[:] = 0
    pages.write([1], buffers[0][:1])
    for memory, old in zip(memories, before, strict=True):
        np.testing.assert_array_equal(memory[:, :, 1], old[:, :, 4])
        assert not memory[:, :, [0, 2, 3, 4, 5]].any()
    assert team.told[-2] == "waited", "steps that were told come first"
    pages.write([5, 2], buffers[1])
    for memory, old in zip(memories, before, strict=True):
        np.testing.assert_array_equal(memory[:, :, [5, 2]], old[:, :, [5, 2]])


@pytest.mark.parametrize("fails", range(len(SIDE_BYTES)))
def test_where_one_rank_fails_all_have_ended(fails: int) -> None:
    _, every, pages, _ = ranks()
    buffer = pages.buffer(2)
    every[fails].fails = True
    with pytest.raises((RuntimeError, MemoryError), match="no room"):
        pages.read([1, 2], buffer)
    every[fails].fails = False
    pages.read([1, 2], buffer)
    assert not pages._asked
