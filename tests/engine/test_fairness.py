"""Who gets the tokens of steps: short prompts beside long ones, clients beside each other, answers beside prompts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.forecast import Forecast
from ingle.engine.pace import Pace
from ingle.engine.shares import Shares
from ingle.request import EngineRequest, SamplingParams
from ingle.step import Limits
from tests.engine.test_scheduler import Driver, limits, shares
from tests.support import save_checkpoint


def driver(step: int = 100, num_pages: int = 12_000, **overrides: Any) -> Driver:
    bounds = {"max_num_seqs": 64, "max_num_batched_tokens": step, "max_model_len": 10_000, **overrides}
    return Driver(num_pages, 0, limits(**bounds))


def add(to: Driver, name: str, length: int, *, client: str = "", max_tokens: int = 1, priority: int = 0) -> None:
    """A request whose prompt nobody shares."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    number = len(to.outputs)
    prompt = [number] * length
    to.add(EngineRequest(name, prompt, params, client=client, priority=priority), number)


# ---- the time of steps

PACED = Limits(8, 512, 10_000, 16, target_itl_s=0.1, least_portion=64)


@pytest.mark.parametrize(
    ("token_ms", "beside", "alone"), [(0.1, 512, 512), (0.3, 256, 512), (0.7, 128, 512), (1.5, 64, 256), (50, 64, 64)]
)
def test_a_step_that_somebody_waits_for_is_as_long_as_the_target(token_ms: float, beside: int, alone: int) -> None:
    pace = Pace(PACED)
    assert pace.beside(1) == pace.alone() == 512, "nothing is known"
    pace.learn(100, 100 * token_ms / 1e3)
    assert (pace.beside(1), pace.alone()) == (beside, alone)


def test_one_step_that_took_long_changes_little_and_many_do() -> None:
    pace = Pace(PACED)
    pace.learn(512, 0.05)
    pace.learn(512, 30.0)  # kernels were compiled
    assert pace.beside(1) == 512
    for _ in range(30):
        pace.learn(512, 1.0)
    assert pace.beside(1) == 64
    pace.learn(3, 1.0)  # as long as the weights take
    for _ in range(8):
        pace.learn(64, 0.006)
    assert pace.beside(1) == 512


def test_without_a_target_steps_are_as_large_as_can_be() -> None:
    pace = Pace(limits(max_num_batched_tokens=512, least_portion=64))
    pace.learn(512, 60.0)
    assert pace.beside(3) == pace.alone() == 512


def test_memory_that_ran_out_bounds_steps_for_a_while() -> None:
    pace = Pace(PACED)
    assert pace.shrink(300) == 256 and pace.alone() == 256
    assert pace.shrink(256) == 128 and pace.shrink(100) == 64 and pace.shrink(64) is None
    for _ in range(3000):
        pace.learn(64, 0.0001)
    assert pace.alone() == 512


def test_whoever_gets_a_token_waits_for_a_short_step() -> None:
    to = driver(512, target_itl_s=0.1, least_portion=64)
    to.scheduler.pace.learn(512, 0.512)
    add(to, "long", 4000)
    assert shares(to) == {"long": 256}, "nobody gets a token"
    add(to, "short", 50, max_tokens=3)
    assert shares(to) == {"short": 50, "long": 14}
    assert shares(to) == {"short": 1, "long": 63}


def test_an_idle_server_reads_a_prompt_at_once() -> None:
    to = driver(512, target_itl_s=0.1, least_portion=64)
    to.scheduler.pace.learn(512, 0.4)
    add(to, "only", 500)
    assert shares(to) == {"only": 500}


# ---- clients


def test_a_single_request_does_not_wait_behind_the_many_of_another_client() -> None:
    to = driver(max_num_seqs=8)
    for number in range(200):
        add(to, f"many-{number}", 60, client="many", max_tokens=50)
    for _ in range(20):
        to.step()
    assert len(to.scheduler.running) == 8, "every slot is taken"
    add(to, "one", 60, client="one", max_tokens=50)
    for _ in range(3):
        to.step()
    assert to.outputs["one"], "it took the place of one of them"
    for _ in range(50):
        to.step()
    assert "one" in to.reasons and to.scheduler.num_preemptions == 1
    to.drain()
    assert set(to.reasons) == set(to.outputs) and to.scheduler.num_preemptions == 1


def test_a_client_that_has_something_running_takes_no_place() -> None:
    to = driver(max_num_seqs=4)
    for client in ("a", "b"):
        for number in range(20):
            add(to, f"{client}-{number}", 10, client=client, max_tokens=30)
    to.drain()
    assert to.scheduler.num_preemptions == 0


def test_pages_that_run_out_are_those_of_the_client_who_has_most() -> None:
    to = driver(num_pages=60, max_model_len=200, enable_prefix_caching=False)
    for _ in range(200):
        to.scheduler.forecast.ended(1)
    for number in range(6):
        add(to, f"many-{number}", 20, client="many", max_tokens=100)
    for _ in range(3):
        to.step()
    add(to, "one", 20, client="one", max_tokens=100)
    ended_after = 0
    while "one" not in to.reasons:
        to.step()
        ended_after += 1
    assert to.scheduler.num_preemptions and ended_after <= 110, "it was never computed again"


def test_clients_read_long_prompts_by_turns() -> None:
    to = driver()
    for number in range(9):
        add(to, f"a-{number}", 1000, client="a")
    to.step()
    add(to, "b", 1000, client="b")
    read = {"a": 0, "b": 0}
    for _ in range(18):
        for name, count in shares(to).items():
            read[name[0]] += count
    assert abs(read["a"] - read["b"]) <= 100


def test_short_prompts_of_one_client_take_no_more_than_their_share_from_another() -> None:
    to = driver()
    add(to, "long", 2000, client="b")
    num_steps = 0
    while "long" not in to.reasons:
        for number in range(4):
            add(to, f"short-{num_steps}-{number}", 30, client="a")
        to.step()
        num_steps += 1
    assert num_steps <= 2 * 2000 // 100 + 4


def test_a_client_that_comes_back_has_saved_nothing_up() -> None:
    of = Shares()
    of.join("a")
    of.charge("a", 1000)
    of.join("b")
    assert of.num_read("b") == 1000
    of.charge("b", 10)
    of.leave("b")
    of.charge("a", 5)
    of.join("b")
    assert of.num_read("b") == 1010, "who leaves and comes back keeps what it had"
    of.leave("b")
    of.charge("a", 50)
    of.join("b")
    assert of.num_read("b") == of.num_read("a")
    for client in "ab":
        of.leave(client)
    assert not of._num_read and not of._num_live, "nothing is kept of those who left"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 3), st.sampled_from("abc")), min_size=1, max_size=50),
    st.sampled_from([7, 32]),
)
def test_what_others_ask_delays_a_client_by_their_number_alone(arrivals: list[tuple[int, int, str]], step: int) -> None:
    """Each prompt ends within the steps that its own client's take, times the clients, twice: short ones go ahead."""
    to, bounds, num_steps, num_clients = driver(step, enable_prefix_caching=False), {}, 0, 3

    def run(count: int) -> None:
        nonlocal num_steps
        for _ in range(count):
            num_steps += 1
            to.step()
            for name in [name for name in bounds if name in to.reasons]:
                assert num_steps <= bounds.pop(name), f"{name} came too late"

    for number, (length, steps_before, client) in enumerate(arrivals):
        run(steps_before)
        own = [seq for seq in to.scheduler._by_id.values() if seq.client == client]
        unread = sum(seq.num_to_compute for seq in own) + length
        bounds[str(number)] = num_steps + 2 * num_clients * unread // step + len(to.scheduler._by_id) + 8
        add(to, str(number), length, client=client)
    while to.scheduler.has_work:
        run(1)


# ---- priorities


def test_a_prompt_of_the_background_gives_way_to_all_that_come() -> None:
    to = driver()
    add(to, "batch", 1000, priority=9)
    assert shares(to) == {"batch": 100}
    add(to, "chat", 150)
    assert shares(to) == {"chat": 100}
    assert shares(to) == {"chat": 50, "batch": 50}


# ---- pages


@pytest.mark.parametrize(("num_pages", "length", "answer", "slots"), [(401, 50, 400, 64), (1201, 50, 400, 256)])
def test_long_answers_that_outgrow_the_pages_are_seldom_computed_twice(
    num_pages: int, length: int, answer: int, slots: int
) -> None:
    """Where pages are not reckoned with, each is preempted twice, and half of all is computed again."""
    rng = random.Random(0)
    to = Driver(num_pages, 0, Limits(slots, 8192, 4096, 16))
    to.device.launch = lambda plan: _drawn(plan)  # type: ignore[method-assign]
    lengths = [int(answer * rng.uniform(0.5, 1.5)) for _ in range(100)]
    for number, max_tokens in enumerate(lengths):
        add(to, str(number), length, max_tokens=max_tokens)
    num_computed = 0
    retire = to.scheduler.retire

    def counted(plan: Any, result: Any) -> Any:
        nonlocal num_computed
        num_computed += plan.step.num_tokens
        return retire(plan, result)

    to.scheduler.retire = counted  # type: ignore[method-assign]
    to.drain()
    assert len(to.reasons) == 100 and to.scheduler.num_preemptions <= 60
    assert num_computed <= 1.25 * (100 * length + sum(lengths))


def _drawn(plan: Any) -> Any:
    from ingle.step import StepResult

    count = sum(chunk.samples for chunk in plan.step.chunks)
    return StepResult([[1]] * count, [True] * count)


def test_a_forecast_counts_what_is_held_at_once() -> None:
    """Two answers that end one after the other hold less than both at their ends."""
    to = driver(num_pages=200, max_model_len=400, enable_prefix_caching=False)
    forecast = Forecast(to.scheduler.limits)
    for number, max_tokens in enumerate((40, 200)):
        add(to, str(number), 40, max_tokens=max_tokens)
    to.step()
    running = to.scheduler.running
    held = to.scheduler.pages.capacity - to.scheduler.pages.num_available
    assert held == 20
    assert forecast.fits(running, held, 60) and not forecast.fits(running, held, 58)


def test_only_a_server_reads_in_portions_unless_told_otherwise(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    for beside_server, flags, expected in (
        (False, {}, None),
        (True, {}, 0.1),
        (True, {"target_itl_ms": 0}, None),
        (False, {"target_itl_ms": 40}, 0.04),
    ):
        config = EngineConfig.of(str(folder), device="cpu", kv_cache_memory="4MiB", **flags)
        engine, _ = build_engine(config, folder, beside_server=beside_server)
        assert engine.scheduler.limits.target_itl_s == expected
