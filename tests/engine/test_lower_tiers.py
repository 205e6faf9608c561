"""Pages kept below the device: what is read back is what was computed, whoever goes, fails or waits meanwhile."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.engine.arrivals import Load
from ingle.engine.pages import PagePool
from ingle.request import EngineRequest, SamplingParams
from ingle.step import Limits
from tests.engine.test_scheduler import EOS, Device, Driver, next_token, play

Content = tuple[tuple[int, ...] | None, ...]
"""What a page holds, by offset."""
GARBAGE = (-2,)


@dataclass
class Saving:
    """A page that a thread copies: half of it now, half of it later."""

    name: bytes
    page_id: int
    begun: Content


@dataclass
class PretendedTiers:
    """Holds a few contents, forgets and fails as it likes, and takes its time, as threads do."""

    pool: PagePool
    device: Device
    rng: random.Random
    capacity: int
    fails: bool
    kept: OrderedDict[bytes, Content] = field(default_factory=OrderedDict)
    queue: deque[tuple[bytes, int]] = field(default_factory=deque)
    saving: Saving | None = None
    reading: list[Load] = field(default_factory=list)
    num_read: int = 0

    def __contains__(self, name: bytes) -> bool:
        return name in self.kept

    def save(self, name: bytes, page_id: int) -> None:
        self.queue.append((name, page_id))

    def load(self, load: Load) -> None:
        assert load.entries
        for _, page_id in load.entries:  # from now on these are written
            self._write(page_id, (GARBAGE,) * self.device.page_size)
        self.reading.append(load)

    def loaded(self) -> list[Load]:
        while self.rng.random() < 0.6:
            self._save()
        ended = [load for load in self.reading if self.rng.random() < 0.4]
        self.reading = [load for load in self.reading if load not in ended]
        for load in ended:
            self._end(load)
        return ended

    def _end(self, load: Load) -> None:
        for name, page_id in load.entries:
            content = self.kept.get(name)
            if content is None or (load.cancelled and self.rng.random() < 0.5):
                load.failed.add(name)
            elif self.fails and self.rng.random() < 0.1:
                load.failed.add(name)
                del self.kept[name]
            else:
                self.num_read += 1
                self._write(page_id, content)

    def _save(self) -> None:
        """A page is copied in two halves; what lost its content in between is not kept."""
        if self.saving is not None:
            saved, self.saving = self.saving, None
            end = self._content(saved.page_id)
            if self.pool.watched.get(saved.page_id) is saved:
                half = len(end) // 2
                self.kept[saved.name] = saved.begun[:half] + end[half:]
                del self.pool.watched[saved.page_id]
            while len(self.kept) > self.capacity:
                self.kept.popitem(last=False)
        elif self.queue:
            name, page_id = self.queue.popleft()
            if self.pool.find(name) == page_id:
                self.saving = Saving(name, page_id, self._content(page_id))
                self.pool.watched[page_id] = self.saving

    def _content(self, page_id: int) -> Content:
        return tuple(self.device.written.get((page_id, offset)) for offset in range(self.device.page_size))

    def _write(self, page_id: int, content: Content) -> None:
        for offset, tokens in enumerate(content):
            self.device.written.pop((page_id, offset), None)
            if tokens is not None:
                self.device.written[page_id, offset] = tokens


@settings(max_examples=120, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from([0, 1, 2]),
    st.integers(1, 14),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_page_is_lost_and_no_token_wrong(
    rng: random.Random, depth: int, count: int, windowed: bool, faults: bool, fails: bool
) -> None:
    """Every read that a real step would make is checked, after aborts, preemptions and failing steps in mid-load."""

    def tiers(pool: PagePool, device: Device) -> PretendedTiers:
        return PretendedTiers(pool, device, rng, rng.choice([2, 10, 1000]), fails)

    play(rng, depth, True, count, windowed=windowed, faults=faults, tiers=tiers)


def test_twenty_thousand_random_operations() -> None:
    operations = num_read = 0
    found: list[PretendedTiers] = []
    while operations < 20_000:
        rng = random.Random(f"tiers-{len(found)}")

        def tiers(pool: PagePool, device: Device, rng: random.Random = rng) -> PretendedTiers:
            found.append(PretendedTiers(pool, device, rng, 200, fails=len(found) % 3 == 0))
            return found[-1]

        windowed, faults = len(found) % 2 == 1, len(found) % 4 > 1
        operations += play(rng, len(found) % 3, True, 60, windowed=windowed, faults=faults, tiers=tiers).operations
        num_read += found[-1].num_read
    assert num_read > 300, "hardly anything was read back"


class Reader:
    """A driver over tiers that end a load when they are told to."""

    def __init__(self, num_pages: int = 30) -> None:
        self.tiers: PretendedTiers | None = None
        bounds = Limits(4, 12, 60, 4)
        self.driver = Driver(num_pages, 0, bounds, tiers=self._tiers)
        self.params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)

    def _tiers(self, pool: PagePool, device: Device) -> PretendedTiers:
        self.tiers = PretendedTiers(pool, device, random.Random(0), 1000, fails=False)
        return self.tiers

    def run(self, name: str, prompt: list[int]) -> None:
        self.add(name, prompt)
        self.driver.drain()

    def add(self, name: str, prompt: list[int]) -> None:
        self.driver.add(EngineRequest(name, prompt, self.params, (EOS,)), 5)

    def forget(self) -> None:
        """As a restart does: the device has nothing any more."""
        assert self.tiers is not None
        while self.tiers.queue or self.tiers.saving:
            self.tiers._save()
        pool = self.driver.scheduler.pages
        pool.forget(list(pool._hash_of_page))
        self.driver.device.written.clear()


def test_a_prompt_that_lower_tiers_have_is_read_and_counts_as_cached() -> None:
    reader = Reader()
    reader.run("first", [1] * 30)
    reader.forget()
    reader.add("second", [1] * 30)
    cached = None
    for _ in range(100):
        plan = reader.driver.scheduler.plan()
        if plan is not None:
            (chunk,) = plan.step.chunks
            assert (chunk.start, chunk.count) == (28, 2), "all that was kept is computed again"
            (output,) = reader.driver.scheduler.retire(plan, reader.driver.device.launch(plan))
            cached = output.num_cached_tokens
            break
    assert cached == 28
    scheduler = reader.driver.scheduler
    assert (scheduler.num_queried_tokens, scheduler.num_hit_tokens) == (60, 0)
    assert (scheduler.num_lower_queried_tokens, scheduler.num_lower_hit_tokens) == (60, 28)


def test_others_go_on_while_a_prompt_is_read() -> None:
    reader = Reader()
    reader.run("first", [1] * 30)
    reader.forget()
    scheduler, tiers = reader.driver.scheduler, reader.tiers
    assert tiers is not None
    reader.add("again", [1] * 30)
    tiers.rng = Never()
    assert scheduler.plan() is None
    assert scheduler.arrivals.is_reading
    reader.add("other", [2] * 10)
    for _ in range(3):
        reader.driver.step()
    assert reader.driver.outputs["other"] == [next_token(5, 10 + n) for n in range(3)]
    assert reader.driver.outputs["again"] == []
    scheduler.check()
    tiers.rng = random.Random(1)
    reader.driver.drain()
    assert reader.driver.outputs["again"] == [next_token(5, 30 + n) for n in range(3)]


class Never(random.Random):
    """Nothing happens."""

    def random(self) -> float:
        return 1.0


def test_several_of_one_prompt_read_it_once() -> None:
    reader = Reader(num_pages=60)
    reader.run("first", [1] * 30)
    reader.forget()
    assert reader.tiers is not None
    for name in "abcd":
        reader.add(name, [1] * 30)
    reader.driver.drain()
    assert reader.tiers.num_read == 7
    assert all(reader.driver.outputs[name] == reader.driver.outputs["first"] for name in "abcd")


def test_pages_are_whole_after_an_abort_in_the_midst_of_a_load() -> None:
    reader = Reader()
    reader.run("first", [1] * 30)
    reader.forget()
    scheduler, tiers = reader.driver.scheduler, reader.tiers
    assert tiers is not None
    tiers.rng = Never()
    reader.add("again", [1] * 30)
    reader.add("beside", [1] * 30)
    assert scheduler.plan() is None
    assert scheduler.abort("again")
    scheduler.check()
    assert scheduler.pages.num_available < scheduler.pages.capacity, "pages that are written may be taken"
    assert scheduler.abort("beside")
    assert not scheduler.has_work
    tiers.rng = random.Random(1)
    while scheduler.arrivals.is_reading:
        assert scheduler.plan() is None
    scheduler.check()
    assert scheduler.pages.num_available == scheduler.pages.capacity


def test_users_with_another_salt_read_nothing_of_it() -> None:
    reader = Reader()
    reader.run("first", [1] * 30)
    reader.forget()
    reader.driver.add(EngineRequest("other", [1] * 30, reader.params, (EOS,), cache_salt="other"), 5)
    plan = reader.driver.scheduler.plan()
    assert plan is not None
    assert plan.step.chunks[0].start == 0


def test_what_holds_nan_is_not_kept() -> None:
    reader = Reader()
    scheduler = reader.driver.scheduler
    reader.add("nan", [1] * 30)
    for _ in range(3):
        plan = scheduler.plan()
        assert plan is not None
        result = reader.driver.device.launch(plan)
        result.finite = [False] * len(result.finite)
        scheduler.retire(plan, result)
    assert not scheduler.has_work
    assert reader.tiers is not None
    assert not reader.tiers.queue
    assert reader.tiers.saving is None
    assert not reader.tiers.kept
