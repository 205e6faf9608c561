"""Steps as messages: serialized, any number in flight, with drafts, and with masks between forward and draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ingle.engine.engine import Engine
from ingle.engine.masks import TokenMask, Words, pack_mask
from ingle.engine.worker import RunningStep, Worker
from ingle.request import EngineRequest, SamplingParams, decode_token_ids, encode_token_ids
from ingle.step import Masks, Step, StepResult
from tests.support import collect, engine_for, random_prompt, restrict, run, save_checkpoint

VOCAB = 256
END = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=["native", "torch", "torch-overlap"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    dtype = "bfloat16" if request.param == "native" else "float32"
    return engine_for(folder, dtype=dtype, block_size=8, overlap=request.param == "torch-overlap")


def requests(count: int, **options: object) -> list[EngineRequest]:
    """Half of them greedy, one of three penalized, some that share a prefix."""
    return [
        EngineRequest(
            str(i),
            random_prompt(i % 4, 20 + i),
            SamplingParams(
                temperature=i % 2,
                seed=i,
                max_tokens=12,
                repetition_penalty=1.3 if i % 3 == 0 else 1.0,
                **{"ignore_eos": True, **options},
            ),
        )
        for i in range(count)
    ]


class Mailed(Worker):
    """A worker that is told of steps, masks and results by mail."""

    def forward(self, step: Step) -> RunningStep:
        return super().forward(mailed(step))

    def sample(self, running: RunningStep, masks: Masks) -> None:
        super().sample(running, msgspec.msgpack.decode(msgspec.msgpack.encode(masks), type=Masks))

    def result(self, running: RunningStep) -> StepResult:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(super().result(running)), type=StepResult)


def mailed(step: Step) -> Step:
    body = msgspec.msgpack.encode(step, enc_hook=encode_token_ids)
    return msgspec.msgpack.decode(body, type=Step, dec_hook=decode_token_ids)


def test_a_step_crosses_processes(engine: Engine) -> None:
    wanted = requests(6, logprobs=2, prompt_logprobs=1, logit_bias={7: 3.0}, stop_token_ids=(9,), min_tokens=3)
    here = collect(engine, wanted)
    engine.worker = Mailed(engine.worker.device)
    assert collect(engine, wanted) == here


@pytest.mark.parametrize("max_in_flight", [1, 2, 3, 4])
def test_any_number_of_steps_in_flight(engine: Engine, max_in_flight: int) -> None:
    expected = {r.id: run(engine, [r])[r.id] for r in requests(8)}
    engine._max_in_flight = max_in_flight
    assert run(engine, requests(8)) == expected


@pytest.mark.parametrize("share_right", [0.0, 0.6, 1.0])
def test_drafts_change_no_token_and_save_steps(engine: Engine, share_right: float) -> None:
    wanted = requests(8, logprobs=1)
    expected = collect(engine, wanted)
    answers = {r.id: [*r.prompt_token_ids, *(t for o in expected[r.id] for t in o.token_ids)] for r in wanted}
    generator = np.random.default_rng(0)

    def guess(token_ids: Sequence[int], most: int) -> list[int]:
        whole = next(answer for answer in answers.values() if answer[: len(token_ids)] == list(token_ids))
        following = whole[len(token_ids) :][: min(most, 3)]
        return [token if generator.random() < share_right else (token + 1) % VOCAB for token in following]

    steps = engine.stats().num_steps
    engine.scheduler.drafter = guess
    found = collect(engine, wanted)
    for r in wanted:
        ours, theirs = ([t for o in outputs[r.id] for t in o.token_ids] for outputs in (found, expected))
        assert ours == theirs
        one, two = ([e for o in outputs[r.id] for e in o.logprobs or ()] for outputs in (found, expected))
        assert [entry.token_ids for entry in one] == [entry.token_ids for entry in two]
    unpenalized = [r for r in wanted if not r.sampling.penalized]
    num_steps = sum(len(found[r.id]) for r in unpenalized) / len(unpenalized)
    assert (num_steps <= 7) if share_right == 1.0 else (num_steps == 12) if share_right == 0.0 else (num_steps < 12)
    assert engine.stats().num_steps - steps >= 12  # those with penalties have no drafts


class Alternating:
    """Even tokens and odd ones take turns; after eight tokens the answer has to end."""

    ended = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def allowed(self) -> Words | None:
        if len(self.taken) == 3:
            return None
        if len(self.taken) == 8:
            return pack_mask(np.arange(VOCAB) == END)
        return pack_mask(np.arange(VOCAB) % 2 == len(self.taken) % 2)

    def forced(self) -> Sequence[int]:
        return []

    def take(self, token_ids: Sequence[int]) -> None:
        self.taken += token_ids


@pytest.mark.parametrize("max_in_flight", [1, 2, 3])
def test_an_answer_follows_its_mask_and_the_others_do_not_notice(engine: Engine, max_in_flight: int) -> None:
    wanted = [msgspec.structs.replace(r, eos_token_ids=(END,)) for r in requests(8, ignore_eos=False)]
    free = {r.id: run(engine, [r])[r.id] for r in wanted}
    engine._max_in_flight = max_in_flight
    masks = {r.id: Alternating() for r in wanted[::2]}
    for r in wanted:
        engine.add(r, masks.get(r.id))
    answers: dict[str, list[int]] = {r.id: [] for r in wanted}
    reasons: dict[str, str | None] = {}
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.token_ids
            reasons[output.id] = output.finish_reason
    engine.scheduler.check()
    for name, tokens in answers.items():
        if name in masks:
            assert masks[name].taken == tokens and reasons[name] == "stop" and tokens[-1] == END
            assert len(tokens) <= 9
            assert all(t % 2 == i % 2 for i, t in enumerate(tokens[:8]) if i != 3)
        else:
            assert tokens == free[name]
    assert not engine._masks


@pytest.mark.parametrize("max_in_flight", [1, 3])
def test_masks_outlast_preemption(engine: Engine, max_in_flight: int) -> None:
    wanted = requests(8)
    alone = {r.id: answers_of(engine, [r], {r.id: Alternating()})[r.id] for r in wanted}
    scarce = restrict(engine, num_pages=18, max_model_len=48, max_num_seqs=6)
    scarce._max_in_flight = max_in_flight
    masks = {r.id: Alternating() for r in wanted}
    assert answers_of(scarce, wanted, masks) == alone == {name: mask.taken for name, mask in masks.items()}
    assert scarce.scheduler.num_preemptions


def answers_of(engine: Engine, wanted: Sequence[EngineRequest], masks: Mapping[str, TokenMask]) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {r.id: [] for r in wanted}
    for r in wanted:
        engine.add(r, masks.get(r.id))
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.token_ids
    engine.scheduler.check()
    return answers


def test_a_mask_that_raises_on_a_token_ends_its_own_request(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Alternating):
        def take(self, token_ids: Sequence[int]) -> None:
            super().take(token_ids)
            if len(self.taken) == 2:
                raise ValueError("no such rule")

    wanted = requests(4)
    alone = {r.id: run(engine, [r])[r.id] for r in wanted}
    masks = {"1": Broken(), "3": Alternating()}
    for r in wanted:
        engine.add(r, masks.get(r.id))
    answers: dict[str, list[int]] = {r.id: [] for r in wanted}
    errors = {}
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.token_ids
            errors[output.id] = output.error
    assert answers["1"] == masks["1"].taken and len(answers["1"]) == 2
    assert errors["1"] is not None and "the server's log says why" in errors["1"] and "no such rule" in caplog.text
    assert errors["3"] is None and answers["3"] == masks["3"].taken
    assert (answers["0"], answers["2"]) == (alone["0"], alone["2"])
    assert not engine._masks


@pytest.mark.parametrize("kind", ["raises", "none", "short"])
def test_a_mask_that_cannot_be_followed_ends_its_own_request(
    engine: Engine, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Alternating):
        def allowed(self) -> Words | None:
            if len(self.taken) < 2:
                return super().allowed()
            if kind == "raises":
                raise ValueError("no such rule")
            return pack_mask(np.zeros(VOCAB, np.bool_) if kind == "none" else np.ones(VOCAB - 32, np.bool_))

    wanted = requests(4)
    alone = {r.id: run(engine, [r])[r.id] for r in wanted}
    for r in wanted:
        engine.add(r, Broken() if r.id == "1" else None)
    answers: dict[str, list[int]] = {r.id: [] for r in wanted}
    errors = {}
    while engine.has_work:
        for output in engine.step():
            answers[output.id] += output.token_ids
            errors[output.id] = output.error
    assert errors["1"] is not None and "the server's log says why" in errors["1"] and len(answers["1"]) == 2
    assert "request 1: what its answer has to follow failed" in caplog.text
    assert {name: tokens for name, tokens in answers.items() if name != "1"} == {
        name: tokens for name, tokens in alone.items() if name != "1"
    }
