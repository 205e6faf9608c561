"""The plan: pure Python, so it is tried by the hundred thousand against a device that only pretends."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.engine.arrivals import LowerTiers
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Drafter, Scheduler
from ingle.engine.sequence import Plan
from ingle.kv import pages_held
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.step import RESERVED_PAGE, Chunk, Limits, StepResult
from tests.support import expect_short_answers

EOS = 7


def limits(**overrides: Any) -> Limits:
    return Limits(**{"max_num_seqs": 4, "max_num_batched_tokens": 12, "max_model_len": 40, "page_size": 4, **overrides})


def request(name: str, length: int, max_tokens: int = 4, **options: object) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, **options)
    return EngineRequest(name, [100 + i for i in range(length)], params, (EOS,))


def next_token(seed: int, position: int) -> int:
    """What the pretended model says at a position; it ends a text one time in twelve."""
    return random.Random(f"{seed}-{position}").choice([EOS, *range(20, 31)])


class Fault(Exception):
    """A step that failed."""


class Device:
    """Stands in for the worker: keeps what each page holds, and checks every read a real step would make.

    In each group of layers a token reads what its window shows it, and nothing before.
    """

    def __init__(self, page_size: int, windows: tuple[int | None, ...] = (None,)) -> None:
        self.faulty: dict[int, int] = {}
        """Of sequences, by their seeds: the position whose token a step cannot give."""
        self.most_chunks = 1 << 30
        """A step of more fails."""
        self.page_size = page_size
        self.windows = windows
        self.tokens: dict[int, list[int]] = {}
        self.tables: dict[int, list[list[int]]] = {}
        """Of each group."""
        self.seeds: dict[int, int] = {}
        self.written: dict[tuple[int, int], tuple[int, ...]] = {}
        """The group, and the tokens up to this one."""
        self.told: dict[int, list[int]] = {}
        """Of each slot, the tokens that came with an admission or a chunk: all that a pipeline's first stage knows."""
        self.in_turns = False

    def launch(self, plan: Plan) -> StepResult:
        for group, slot, index, page in plan.step.page_entries:
            table = self.tables[slot][group]
            table += [RESERVED_PAGE] * (index + 1 - len(table))
            table[index] = page
        for admission in plan.step.admissions:
            self.tokens[admission.slot] = list(admission.token_ids)
            assert len(admission.page_ids) == len(self.windows)
            self.told[admission.slot] = list(admission.token_ids)
            self.tables[admission.slot] = [list(page_ids) for page_ids in admission.page_ids]
            self.seeds[admission.slot] = admission.seed
        assert sum(chunk.count for chunk in plan.step.chunks) == plan.step.num_tokens
        for chunk in plan.step.chunks:
            self.tokens[chunk.slot] += chunk.drafts
            if self.in_turns:
                self.told[chunk.slot][chunk.end - len(chunk.told) : chunk.end] = chunk.told
                known = self.told[chunk.slot][chunk.start : chunk.end]
                assert known == self.tokens[chunk.slot][chunk.start : chunk.end], "the first stage lacks a token"
        for chunk in plan.step.chunks:  # a layer writes all keys and values of the step, then attends
            for group, position in self._written_by(chunk):
                place = self._place(group, chunk.slot, position)
                self.written[place] = (group, *self.tokens[chunk.slot][: position + 1])
        if len(plan.step.chunks) > self.most_chunks or any(map(self._fails, plan.step.chunks)):
            self.spoil(plan)
            raise Fault
        drawn = []
        for index, chunk in enumerate(plan.step.chunks):
            assert index >= plan.step.num_decodes or chunk.count == 1
            end = chunk.start + chunk.count
            for group, window in enumerate(self.windows):
                for position in range(0 if window is None else max(chunk.start - window + 1, 0), end):
                    held = self.written[self._place(group, chunk.slot, position)]
                    assert held == (group, *self.tokens[chunk.slot][: position + 1]), "a page holds another prefix"
            if chunk.samples:
                assert end == len(self.tokens[chunk.slot])
                taken = self._draw(chunk)
                self.tokens[chunk.slot][end - len(chunk.drafts) :] = taken
                drawn.append(taken)
        return StepResult(drawn, [True] * len(drawn))

    def _draw(self, chunk: Chunk) -> list[int]:
        """The drafts that are right, and the token after them."""
        taken = []
        for index in range(chunk.num_samples):
            position = chunk.end - len(chunk.drafts) + index
            taken.append(next_token(self.seeds[chunk.slot], position))
            if chunk.drafts[index : index + 1] != taken[-1:]:
                break
        return taken

    def spoil(self, plan: Plan) -> None:
        """What a failed step was to write may be anything."""
        for chunk in plan.step.chunks:
            for group, position in self._written_by(chunk):
                self.written[self._place(group, chunk.slot, position)] = (-1,)

    def _fails(self, chunk: Chunk) -> bool:
        """Whether it gives the token that a step cannot give."""
        first, faulty = chunk.end - len(chunk.drafts), self.faulty.get(self.seeds[chunk.slot])
        return chunk.samples and faulty is not None and first <= faulty < first + len(self._draw(chunk))

    def _written_by(self, chunk: Chunk) -> Iterator[tuple[int, int]]:
        """Group and position."""
        return product(range(len(self.windows)), range(chunk.start, chunk.end))

    def _place(self, group: int, slot: int, position: int) -> tuple[int, int]:
        page_id = self.tables[slot][group][position // self.page_size]
        assert page_id != RESERVED_PAGE, "a page is not there"
        return page_id, position % self.page_size


class Driver:
    """Steps a scheduler over the pretended device, `depth` launched steps ahead of the retired ones."""

    def __init__(
        self,
        num_pages: int,
        depth: int,
        bounds: Limits,
        drafter: Drafter | None = None,
        tiers: Callable[[PagePool, Device], LowerTiers] | None = None,
    ) -> None:
        pool, self.device = PagePool(num_pages), Device(bounds.page_size, bounds.windows)
        self.scheduler = Scheduler(pool, bounds, drafter, None if tiers is None else tiers(pool, self.device))
        self.depth = depth
        self.device.in_turns = bounds.num_turns > 1
        self.launched: deque[tuple[Plan, StepResult]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}

    def add(self, new: EngineRequest, seed: int) -> None:
        self.scheduler.add(new, seed)
        self.outputs[new.id] = []

    def step(self) -> None:
        plan = self.scheduler.plan()
        if plan is not None:
            assert plan.step.num_tokens <= self.scheduler.limits.max_num_batched_tokens
            self.check_windows()
            self.check_turns(plan)
            try:
                self.launched.append((plan, self.device.launch(plan)))
            except Fault:
                self.recover(plan)
                return
        while len(self.launched) > (self.depth if plan is not None else 0):
            self.take(self.scheduler.retire(*self.launched.popleft()))

    def check_windows(self) -> None:
        """A sequence holds the pages that it, and the steps in flight, read; and one more for where a page begins."""
        limits = self.scheduler.limits
        in_flight = (self.depth + 1) * limits.max_num_batched_tokens
        for seq in self.scheduler.running:
            most = pages_held(limits.windows, len(seq.token_ids) + 8, limits.page_size, in_flight)
            assert len(list(seq.pages.held)) <= most

    def check_turns(self, plan: Plan) -> None:
        """A sequence whose next token is drawn comes again once that is known; all others take their turn meanwhile."""
        limits, decodes = self.scheduler.limits, plan.sequences[: plan.step.num_decodes]
        if limits.num_turns == 1:
            return
        drawn = [
            seq
            for before, _ in self.launched
            for seq, chunk in zip(before.sequences, before.step.chunks, strict=True)
            if chunk.samples
        ]
        assert not {id(seq) for seq in plan.sequences} & {id(seq) for seq in drawn}
        assert len(decodes) <= -(-len(self.scheduler.running) // limits.num_turns)

    def recover(self, *failed: Plan) -> None:
        """As the engine does: all that is in flight is taken back."""
        plans = [*(plan for plan, _ in self.launched), *failed]
        for plan in plans:
            self.device.spoil(plan)
        self.launched.clear()
        sequences = self.scheduler.revoke(plans)
        self.scheduler.check()
        self.take(self.scheduler.blame(sequences, "a fault"))

    def take(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            assert output.id not in self.reasons, "a finished request speaks"
            self.outputs[output.id] += output.token_ids
            if output.finish_reason is not None:
                self.reasons[output.id] = output.finish_reason

    def drain(self) -> None:
        for _ in range(10_000):
            if not self.scheduler.has_work and not self.launched:
                return
            self.step()
        raise AssertionError("the scheduler makes no progress")


def expected(seed: int, prompt_length: int, max_tokens: int, max_model_len: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens and prompt_length + len(tokens) < max_model_len:
        tokens.append(next_token(seed, prompt_length + len(tokens)))
        if tokens[-1] == EOS:
            break
    return tokens


@dataclass
class Played:
    operations: int
    preemptions: int
    cached_pages: int


def play(
    rng: random.Random,
    depth: int,
    prefix_caching: bool,
    num_requests: int,
    *,
    faults: bool = False,
    windowed: bool = False,
    turns: bool = False,
    drafter: Drafter | None = None,
    tiers: Callable[[PagePool, Device], LowerTiers] | None = None,
) -> Played:
    """Arrivals with shared prefixes, aborts, preemptions, chunks, under tight budgets; checks every page and token.

    With `faults`, one step fails for no reason, or all that give a certain token of certain sequences.
    """
    at_random = faults and rng.random() < 0.3
    page_size = rng.choice([1, 2, 4])
    max_model_len = rng.randint(page_size * 3, 30)
    windows = tuple(rng.choice([None, *range(1, 12)]) for _ in range(rng.randint(1, 4))) if windowed else (None,)
    target_s, least = rng.choice([None, 0.01]), rng.randint(1, 8)
    bounds = Limits(
        rng.randint(1, 5), rng.randint(5, 20), max_model_len, page_size, prefix_caching, windows, target_s, least
    )
    bounds = dataclasses.replace(bounds, num_turns=depth + 1 if turns else 1)
    num_pages = 1 + pages_held(windows, max_model_len, page_size, bounds.max_num_batched_tokens)
    num_pages += rng.randint(0, 6) * len(windows)
    driver = Driver(num_pages, depth, bounds, drafter, tiers)
    operations, wanted, faulty = 0, {}, set()
    for number in range(num_requests):
        max_tokens = rng.randint(0, 12)
        length = rng.randint(1, max_model_len - (max_tokens > 0))
        prompt = [rng.choice([1, 1, 1, 2]) for _ in range(length)]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        name, seed = str(number), rng.randint(0, 1 << 30) * num_requests + number
        priority, salt = rng.choice([0, 0, 0, -3, 5]), rng.choice(["", "", "s"])
        request = EngineRequest(
            name, prompt, params, (EOS,), priority=priority, cache_salt=salt, client=rng.choice("aab")
        )
        driver.add(request, seed)
        driver.scheduler.pace.learn(rng.randint(1, 20), rng.random() / 10)
        wanted[name] = expected(seed, length, params.max_tokens or 0, max_model_len)
        if faults and not at_random and wanted[name] and len(faulty) < 2 and rng.randint(0, 4) == 0:
            last = rng.randint(0, len(wanted[name]) - 1)
            driver.device.faulty[seed] = length + last
            wanted[name] = wanted[name][:last]
            faulty.add(name)
        for _ in range(rng.choice([0, 0, 1, 3])):
            driver.step()
            operations += (1 + len(driver.scheduler.running)) * len(windows)
            if at_random and driver.launched and rng.randint(0, 9) == 0:
                driver.recover()
                at_random = False
        victim = str(rng.randint(0, number))
        if rng.randint(0, 4) == 0 and driver.scheduler.abort(victim):
            assert driver.outputs[victim] == wanted.pop(victim)[: len(driver.outputs[victim])]
        if number % 7 == 0:
            driver.scheduler.check()
    driver.drain()
    driver.scheduler.check()
    assert driver.scheduler.pages.num_available == num_pages - 1
    assert {name: driver.outputs[name] for name in wanted} == wanted
    assert {name for name, reason in driver.reasons.items() if reason == "error"} == faulty & set(wanted)
    return Played(operations, driver.scheduler.num_preemptions, driver.scheduler.pages.num_cached)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 1, 2]), st.booleans(), st.integers(1, 14), st.booleans())
def test_no_page_is_lost_and_no_token_wrong(
    rng: random.Random, depth: int, prefix_caching: bool, count: int, windowed: bool
) -> None:
    play(rng, depth, prefix_caching, count, windowed=windowed)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 1, 2]), st.integers(1, 14), st.booleans(), st.booleans())
def test_drafts_change_no_token(rng: random.Random, depth: int, count: int, faults: bool, windowed: bool) -> None:
    """Guesses as good as one in three, of any number."""

    def guess(token_ids: Sequence[int], most: int) -> list[int]:
        return [rng.choice([20, 21, 22]) for _ in range(rng.randint(0, most + 1))]

    def most_likely(seed: int, position: int) -> int:
        return random.Random(f"{seed}-{position}").choice([20, 20, 21, 22, EOS])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "next_token", most_likely)
        play(rng, depth, True, count, faults=faults, windowed=windowed, drafter=guess)


@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 14), st.booleans(), st.booleans())
def test_sequences_take_turns_in_a_pipeline(
    rng: random.Random, depth: int, count: int, faults: bool, windowed: bool
) -> None:
    play(rng, depth, True, count, faults=faults, windowed=windowed, turns=True)


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([0, 1]), st.booleans(), st.integers(1, 14), st.booleans())
def test_a_step_that_fails_costs_the_request_at_fault_alone(
    rng: random.Random, depth: int, prefix_caching: bool, count: int, windowed: bool
) -> None:
    play(rng, depth, prefix_caching, count, faults=True, windowed=windowed)


@pytest.mark.parametrize("depth", [0, 1])
def test_where_nobody_alone_is_at_fault_the_newest_gives_way(depth: int) -> None:
    """A step of all four fails, of any three it does not: as where memory runs out."""
    driver = Driver(40, depth, limits(max_num_batched_tokens=40))
    driver.device.most_chunks = 3
    for number, name in enumerate("abcd"):
        driver.add(request(name, 5, max_tokens=9, ignore_eos=True), number)
    driver.drain()
    assert driver.reasons == {"a": "length", "b": "length", "c": "length", "d": "error"}
    assert [driver.outputs[name] for name in "abc"] == [[next_token(i, 5 + n) for n in range(9)] for i in range(3)]


@pytest.mark.parametrize("least", [10_000, pytest.param(250_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_very_many_random_operations(depth: int, prefix_caching: bool, least: int) -> None:
    """The same without the search for the smallest failure: in all, a million operations."""
    rounds: list[Played] = []
    while sum(played.operations for played in rounds) < least:
        rng = random.Random(f"{depth}-{prefix_caching}-{len(rounds)}")
        rounds.append(play(rng, depth, prefix_caching, 60, windowed=len(rounds) % 2 == 1))
    assert sum(played.preemptions for played in rounds) > least // 2500, "the budget was never tight"
    assert any(played.cached_pages for played in rounds) == prefix_caching


def test_decodes_come_first_and_prompts_take_what_is_left() -> None:
    driver = Driver(40, 0, limits())
    driver.add(request("short", 3, max_tokens=9, ignore_eos=True), 1)
    driver.step()
    driver.add(request("long", 30, ignore_eos=True), 2)
    plan = driver.scheduler.plan()
    assert plan is not None
    assert [(chunk.start, chunk.count, chunk.samples) for chunk in plan.step.chunks] == [(3, 1, True), (0, 11, False)]
    assert plan.step.num_decodes == 1


@pytest.mark.parametrize(
    ("max_num_seqs", "num_decodes", "num_tokens"),
    [(64, 63, 3_000), (256, 200, 3_000), (256, 224, 512), (320, 300, 600)],
)
def test_prompts_are_read_in_small_portions_beside_many_decodes(
    max_num_seqs: int, num_decodes: int, num_tokens: int
) -> None:
    bounds = limits(max_num_seqs=max_num_seqs, max_num_batched_tokens=3_000, max_model_len=5_000)
    driver = Driver(8_000, 0, bounds)
    for index in range(num_decodes):
        driver.add(request(f"decode-{index}", 2, max_tokens=40, ignore_eos=True), index)
    while driver.scheduler.num_waiting:
        driver.step()
    driver.add(request("long", 4_000), 1)
    plan = driver.scheduler.plan()
    assert plan is not None
    assert (plan.step.num_decodes, plan.step.num_tokens) == (num_decodes, num_tokens)


def prompts(driver: Driver, **lengths: int) -> None:
    """Adds requests for one token each, whose prompts share nothing."""
    for name, length in lengths.items():
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        driver.add(EngineRequest(name, [len(driver.outputs)] * length, params, ()), 0)


def shares(driver: Driver) -> dict[str, int]:
    """Tokens of each request in the next step."""
    plan = driver.scheduler.plan()
    assert plan is not None
    found = {seq.id: chunk.count for seq, chunk in zip(plan.sequences, plan.step.chunks, strict=True)}
    driver.take(driver.scheduler.retire(plan, driver.device.launch(plan)))
    return found


def prefill_driver(step: int = 100, **overrides: int | bool) -> Driver:
    bounds = limits(**{"max_num_seqs": 64, "max_num_batched_tokens": step, "max_model_len": 10_000, **overrides})
    return Driver(12_000, 0, bounds)


@pytest.mark.parametrize("ahead", [{"long": 800}, {"long": 800, "longer": 900}, {"long": 800, "half": 420}])
def test_a_short_prompt_does_not_wait_for_long_ones_that_came_before(ahead: dict[str, int]) -> None:
    driver = prefill_driver()
    prompts(driver, **ahead)
    assert shares(driver) == {"long": 100}
    prompts(driver, short=20, middle=40)
    assert shares(driver) == {"short": 20, "middle": 30, "long": 50}
    assert shares(driver) == {"middle": 10, "long": 90}


def test_prompts_of_like_lengths_are_read_one_after_the_other() -> None:
    driver = prefill_driver()
    prompts(driver, first=150, second=140, third=150)
    assert [shares(driver) for _ in range(4)] == [
        {"first": 100},
        {"first": 50, "second": 50},
        {"second": 90, "third": 10},
        {"third": 100},
    ]


def test_what_the_oldest_prompt_leaves_goes_to_others() -> None:
    driver = prefill_driver()
    prompts(driver, first=30, tiny=10, next=60, last=60)
    assert shares(driver) == {"tiny": 10, "first": 30, "next": 60}


def test_a_prompt_whose_beginning_is_cached_counts_as_what_is_left_of_it() -> None:
    driver = prefill_driver()
    conversation = [7] * 400
    driver.add(EngineRequest("turn 1", conversation, SamplingParams(temperature=0.0, max_tokens=1), ()), 0)
    driver.drain()
    prompts(driver, long=800)
    shares(driver)
    driver.add(EngineRequest("turn 2", [*conversation, 1, 2, 3], SamplingParams(temperature=0.0, max_tokens=1), ()), 0)
    assert shares(driver) == {"turn 2": 3, "long": 97}


def test_a_long_prompt_is_read_at_half_speed_beside_any_number_of_short_ones() -> None:
    driver = prefill_driver()
    prompts(driver, long=1000, next=1000)
    for step in range(40):
        prompts(driver, **{f"{step}-{index}": 30 for index in range(4)})
        driver.step()
    assert "next" in driver.reasons, "two of 1,000 tokens take at most 40 steps of 100"


@pytest.mark.parametrize("scarce", ["slots", "pages"])
def test_short_prompts_take_no_slot_or_page_that_the_head_of_the_queue_needs(scarce: str) -> None:
    bounds = limits(max_num_seqs=2 if scarce == "slots" else 64, max_num_batched_tokens=100, max_model_len=1000)
    driver = Driver(1 + 250 + 110, 0, bounds)
    prompts(driver, first=600)
    driver.step()
    prompts(driver, head=700 if scarce == "pages" else 300)
    for step in range(30):
        prompts(driver, **{f"short {step}": 20})
        driver.step()
    assert "head" in driver.reasons


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 3)), min_size=1, max_size=60), st.sampled_from([1, 7, 32])
)
def test_no_prompt_starves(arrivals: list[tuple[int, int]], step: int) -> None:
    """Each ends within about twice the steps that it would take were only those read that came before it."""
    driver, bounds = prefill_driver(step, enable_prefix_caching=False), {}
    num_steps = 0

    def run(count: int) -> None:
        nonlocal num_steps
        for _ in range(count):
            num_steps += 1
            driver.step()
            for name in [name for name in bounds if name in driver.reasons]:
                assert num_steps <= bounds.pop(name), f"{name} came too late"

    for number, (length, steps_before) in enumerate(arrivals):
        run(steps_before)
        unread = sum(seq.num_to_compute for seq in driver.scheduler._by_id.values())
        bounds[str(number)] = num_steps + 2 * (unread + length) // step + len(driver.scheduler._by_id) + 8
        prompts(driver, **{str(number): length})
    while driver.scheduler.has_work:
        run(1)


def test_a_prefix_is_computed_once_even_within_a_step() -> None:
    driver = Driver(40, 0, limits(max_num_batched_tokens=40))
    for name in ("a", "b"):
        driver.add(request(name, 10), 1)
    plan = driver.scheduler.plan()
    assert plan is not None
    assert [(chunk.start, chunk.count) for chunk in plan.step.chunks] == [(0, 10), (8, 2)]


def test_the_newest_gives_way_and_is_computed_again() -> None:
    driver = Driver(7, 0, limits(max_model_len=24, enable_prefix_caching=False))
    expect_short_answers(driver.scheduler)
    for name in ("old", "new"):
        driver.add(request(name, 6, max_tokens=16, ignore_eos=True), ord(name[0]))
    driver.drain()
    assert driver.scheduler.num_preemptions > 0
    assert [len(tokens) for tokens in driver.outputs.values()] == [16, 16]


@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_request_is_in_no_later_plan(depth: int) -> None:
    driver = Driver(40, depth, limits())
    for name in ("stays", "goes"):
        driver.add(request(name, 5, max_tokens=20, ignore_eos=True), 1)
    driver.step()
    slot = next(seq.slot for seq in driver.scheduler.running if seq.id == "goes")
    assert driver.scheduler.abort("goes") and not driver.scheduler.abort("goes")
    plan = driver.scheduler.plan()
    assert plan is not None and all(chunk.slot != slot for chunk in plan.step.chunks)


def test_nothing_a_launched_step_touches_is_given_back() -> None:
    driver = Driver(12, 1, limits(enable_prefix_caching=False))
    driver.add(request("a", 5, max_tokens=20, ignore_eos=True), 1)
    driver.step()
    before = driver.scheduler.pages.num_available
    driver.scheduler.abort("a")
    assert driver.scheduler.pages.num_available == before
    driver.drain()
    assert driver.scheduler.pages.num_available == driver.scheduler.pages.capacity


def test_a_request_with_broken_logits_fails_alone_and_leaves_clean_pages() -> None:
    driver = Driver(40, 0, limits())
    for name in ("good", "bad"):
        driver.add(request(name, 6, ignore_eos=True), 1)
    plan = driver.scheduler.plan()
    assert plan is not None
    outputs = driver.scheduler.retire(plan, StepResult([[1], [0]], [True, False]))
    assert [(output.id, output.finish_reason) for output in outputs] == [("good", None), ("bad", "error")]
    assert "NaN" in (outputs[1].error or "")
    after = driver.scheduler.plan()
    assert after is not None and len(after.step.scrubbed) == 1, "its own page is zeroed, the shared prefix is not"
    driver.scheduler.check()


def test_a_request_id_cannot_be_used_twice_at_once() -> None:
    driver = Driver(40, 0, limits())
    driver.add(request("a", 3), 1)
    with pytest.raises(ValueError, match="already in use"):
        driver.add(request("a", 3), 1)


def test_the_lowest_priority_goes_first_and_the_highest_gives_way() -> None:
    driver = Driver(40, 0, limits(max_num_seqs=1))
    for number, (name, priority) in enumerate([("a", 0), ("late", 7), ("b", 0), ("urgent", -1)]):
        driver.add(msgspec.structs.replace(request(name, 3, ignore_eos=True), priority=priority), number)
    order: list[str] = []
    while driver.scheduler.has_work:
        driver.step()
        order += [name for name in driver.reasons if name not in order]
    assert order == ["urgent", "a", "b", "late"]

    driver = Driver(13, 0, limits())  # three sequences of four pages each, of which the pool has twelve
    expect_short_answers(driver.scheduler)
    for number, (name, priority) in enumerate([("low", 3), ("a", 0), ("b", 0), ("c", 0)]):
        driver.add(msgspec.structs.replace(request(name, 3, 13, ignore_eos=True), priority=priority), number)
    driver.drain()
    assert driver.scheduler.num_preemptions and list(driver.reasons)[-1] == "low"


def test_a_short_prompt_of_a_later_priority_does_not_go_ahead() -> None:
    driver = Driver(40, 0, limits())
    driver.add(msgspec.structs.replace(request("long", 30, ignore_eos=True), priority=-1), 1)
    driver.add(request("short", 2, ignore_eos=True), 2)
    driver.step()
    assert [seq.id for seq in driver.scheduler.running] == ["long"]


def test_only_prompts_of_one_salt_share_pages() -> None:
    driver = Driver(40, 0, limits())

    def cached(salt: str) -> int:
        name = f"{len(driver.outputs)}"
        driver.add(msgspec.structs.replace(request(name, 13), cache_salt=salt), 1)
        driver.step()
        found = next(seq.num_cached_tokens for seq in driver.scheduler.running if seq.id == name)
        driver.drain()
        return found or 0

    assert [cached(salt) for salt in ("", "", "a", "a", "b", "", "b")] == [0, 12, 0, 12, 0, 12, 12]


def test_progress_of_a_prompt_is_told_chunk_by_chunk_until_its_first_token() -> None:
    driver = Driver(40, 0, limits())
    outputs: list[EngineOutput] = []
    driver.take = outputs.extend  # type: ignore[method-assign]
    driver.add(request("a", 13), 1)
    driver.drain()
    driver.add(msgspec.structs.replace(request("b", 36), return_progress=True), 2)
    driver.drain()
    told = [(o.num_prompt_read, o.num_cached_tokens, o.token_ids) for o in outputs if o.num_prompt_read is not None]
    assert told == [(24, 12, [])]
    assert {o.id for o in outputs if o.num_prompt_read is not None} == {"b"}
    driver.add(msgspec.structs.replace(request("c", 36), return_progress=True, cache_salt="x"), 3)
    driver.drain()
    assert [o.num_prompt_read for o in outputs if o.id == "c" and o.num_prompt_read is not None] == [12, 24]
