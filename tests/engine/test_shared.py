"""Callers that share one engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from ingle.engine.shared import SharedEngine
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, SamplingParams


class FakeEngine:
    """Gives each request one token a step, its prompt's first; one caller at a time, or it complains."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.token: dict[str, int] = {}
        self.on_step = lambda: None
        self._inside = threading.Lock()

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    @property
    def scheduler(self) -> SimpleNamespace:
        return SimpleNamespace(has_work=self.has_work)

    def add(self, request: EngineRequest) -> None:
        with self._alone():
            if list(request.prompt_token_ids) == [0]:
                raise EngineError("no")
            self.left[request.id] = request.sampling.max_tokens or 0
            self.token[request.id] = request.prompt_token_ids[0]

    def abort(self, request_id: str) -> None:
        with self._alone():
            self.left.pop(request_id, None)

    def step(self) -> list[EngineOutput]:
        with self._alone():
            self.on_step()
            for request_id in self.left:
                self.left[request_id] -= 1
            outputs = [EngineOutput(id, [self.token[id]], None if left else "length") for id, left in self.left.items()]
            self.left = {id: left for id, left in self.left.items() if left}
            return outputs

    def _alone(self) -> threading.Lock:
        assert not self._inside.locked(), "two callers are in the engine"
        return self._inside


def request(name: str, token: int, max_tokens: int = 5) -> EngineRequest:
    return EngineRequest(name, [token], SamplingParams(max_tokens=max_tokens))


def shared() -> tuple[FakeEngine, SharedEngine]:
    engine = FakeEngine()
    return engine, SharedEngine(engine)  # type: ignore[arg-type]


def test_each_of_many_threads_gets_its_own() -> None:
    engine, together = shared()

    def run(number: int) -> list[int]:
        call = together.add([request(f"{number}-{part}", number + 1, 40) for part in range(3)])
        tokens = []
        for output in call.outputs():
            assert output.id.startswith(f"{number}-")
            tokens += output.token_ids
            if number % 3 == 0 and len(tokens) == 60:
                call.close()
        return tokens

    with ThreadPoolExecutor(12) as pool:
        for number, tokens in enumerate(pool.map(run, range(60))):
            assert tokens == [number + 1] * (60 if number % 3 == 0 else 120)
    assert not engine.has_work


def test_one_that_fails_holds_nobody_up() -> None:
    engine, together = shared()
    one, two = together.add([request("one", 1)]), together.add([request("two", 2)])

    def fail() -> None:
        raise EngineError("a step failed")

    engine.on_step = fail
    with pytest.raises(EngineError, match="a step failed"):
        next(one.outputs())
    engine.on_step = lambda: None
    assert [output.token_ids for output in two.outputs()] == [[2]] * 5
    assert [output.token_ids for output in one.outputs()] == [[1]] * 5, "nothing of it was lost"


def test_all_are_added_or_none() -> None:
    engine, together = shared()
    with pytest.raises(EngineError, match="no"):
        together.add([request("good", 1), request("bad", 0)])
    assert not engine.has_work


def test_a_generator_that_is_collected_within_a_step_ends_its_requests() -> None:
    engine, together = shared()
    left, other = together.add([request("left", 1)]), together.add([request("other", 2)])
    engine.on_step = left.close
    assert [output.token_ids for output in other.outputs()] == [[2]] * 5
    assert list(left.outputs()) == [] and not engine.has_work
