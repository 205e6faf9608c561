"""How much may wait: 429 beyond it, and room again when requests get a token, end, or lose their client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from ingle.errors import RequestError
from ingle.request import EngineRequest, Sampling, token_ids
from ingle.server.models import ServedModel
from ingle.server.queue import RequestQueue

from .fakes import ScriptedEngine, app_for, assert_error, served, until

pytestmark = pytest.mark.anyio

PATH = "/v1/completions"


@pytest.fixture
async def held(model: ServedModel, engine: ScriptedEngine) -> AsyncIterator[Callable[..., Any]]:
    """A real server with small bounds, whose engine gives no token until told to."""
    engine.step_s = 60.0
    queue = RequestQueue(max_requests=4, max_tokens=40)
    async with (
        served(app_for(model, queue=queue)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=20) as client,
    ):

        def ask(**body: Any) -> asyncio.Task[httpx.Response]:
            return asyncio.ensure_future(client.post(PATH, json={"prompt": "aa", "max_tokens": 2} | body))

        yield ask


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("waiting", "more"),
    [
        ({"n": 4}, {}),
        ({"n": 2}, {"n": 3}),
        ({"prompt": ["a"] * 3}, {"prompt": ["a", "b"]}),
        ({"prompt": "a" * 30}, {"prompt": "a" * 10}),
        ({"prompt": "a" * 90}, {}),
        ({"prompt": ["a"] * 9}, {}),
    ],
)
async def test_what_does_not_fit_is_refused_until_there_is_room(
    held: Callable[..., Any], engine: ScriptedEngine, waiting: dict[str, Any], more: dict[str, Any], stream: bool
) -> None:
    first = held(**waiting, stream=stream)
    await until(lambda: engine.running > 0, within_s=5.0)
    running = engine.running
    refused = await held(**more, stream=stream)
    assert_error(refused, 429, "The queue is full", "--max-num-queued-reqs", "number")
    assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["retry-after"]) > 0
    assert engine.running == running
    first.cancel()
    await until(lambda: engine.running == 0, within_s=5.0)
    engine.step_s = 0.0
    assert (await held(**more, stream=stream)).status_code == 200


async def test_requests_that_have_a_token_wait_no_more(held: Callable[..., Any], engine: ScriptedEngine) -> None:
    engine.step_s = 0.05
    first = held(n=4, max_tokens=60, ignore_eos=True)
    await until(lambda: engine.num_steps >= 4, within_s=5.0)
    assert (await held(n=4)).status_code == 200
    assert not first.done()
    assert (await first).status_code == 200


@pytest.mark.parametrize("failing", ["fail_after", "die_after"])
async def test_failed_requests_leave(held: Callable[..., Any], engine: ScriptedEngine, failing: str) -> None:
    engine.step_s = 0.0
    setattr(engine, failing, 0)
    for _ in range(3):
        assert (await held(n=4)).status_code >= 500
    setattr(engine, failing, None)
    assert (await held(n=4)).status_code == 200


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asked(name: str, num_tokens: int) -> EngineRequest:
    return EngineRequest(name, token_ids([1] * num_tokens), Sampling())


def refused_by(queue: RequestQueue, *requests: EngineRequest) -> RequestError:
    with pytest.raises(RequestError) as error:
        queue.enter(requests)
    assert error.value.status == 429 and error.value.code == "queue_full"
    return error.value


def test_nobody_is_told_what_nobody_knows() -> None:
    queue = RequestQueue(max_requests=1, clock=Clock())
    queue.enter([asked("a", 10)])
    error = refused_by(queue, asked("b", 10))
    assert "nobody knows yet how long" in str(error) and "number 2;" in str(error)
    assert error.headers == {"Retry-After": "5", "X-Ingle-Queue-Position": "2"}


def test_an_estimate_is_made_of_the_speed() -> None:
    clock = Clock()
    queue = RequestQueue(max_requests=10, clock=clock)
    queue.enter([asked(str(index), 100) for index in range(10)])
    for index in range(40):  # one each 2 s, and another takes its place
        clock.now += 2.0
        queue.begun(str(index))
        queue.enter([asked(str(index + 10), 100)])
    error = refused_by(queue, *(asked(f"x{index}", 100) for index in range(3)))
    assert error.headers["X-Ingle-Queue-Position"] == "11"
    assert 18 <= int(error.headers["X-Ingle-Queue-Seconds"]) <= 26
    assert 5 <= int(error.headers["Retry-After"]) <= 7
    assert "--max-num-queued-reqs" in str(error) and "0.512 requests with 51.2 prompt tokens" in str(error)


def test_a_queue_that_stands_still_is_not_promised_to_move() -> None:
    clock = Clock()
    queue = RequestQueue(max_requests=2, clock=clock)
    queue.enter([asked("a", 1), asked("b", 1)])
    clock.now += 1.0
    queue.begun("a")
    queue.enter([asked("c", 1)])
    assert queue.expected_s() == pytest.approx(2.5, rel=0.3)
    clock.now += 3600.0
    assert "nobody knows" in str(refused_by(queue, asked("d", 1)))


def test_time_in_which_nobody_waits_says_nothing_of_the_speed() -> None:
    clock = Clock()
    queue = RequestQueue(max_requests=2, clock=clock)
    for index in range(20):
        clock.now += 1000.0
        queue.enter([asked(str(index), 10)])
        clock.now += 0.5
        queue.begun(str(index))
    assert queue.expected_s() == pytest.approx(0.5, rel=0.2)


def test_those_that_are_aborted_say_nothing_of_the_speed() -> None:
    clock = Clock()
    queue = RequestQueue(clock=clock)
    for index in range(20):
        queue.enter([asked(str(index), 10)])
        clock.now += 0.1
        queue.leave(str(index))
        queue.begun(str(index))
    assert queue.expected_s() is None and queue.num_requests == queue.num_tokens == 0


def test_one_prompt_is_taken_whatever_its_size_but_not_many_times() -> None:
    queue = RequestQueue(max_tokens=100)
    queue.enter([asked("a", 1000)])
    with pytest.raises(RequestError, match=r"2000 tokens together, at most 100 .*--max-num-queued-tokens") as error:
        queue.enter([asked("b", 1000), asked("c", 1000)])
    assert error.value.status == 400
