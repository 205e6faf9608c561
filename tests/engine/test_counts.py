"""What the engine tells of its work: counted, never less than before, and rarely enough to cost nothing."""

from __future__ import annotations

import socket
import threading
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from ingle.channel import (
    LENGTH,
    Abort,
    Channel,
    ChannelClosed,
    EngineStats,
    FromEngine,
    StepMessage,
    frame,
    message_encoder,
)
from ingle.engine import process
from ingle.engine.beats import Beats
from ingle.engine.counts import Waits
from ingle.engine.engine import Engine
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from tests.support import engine_for, random_prompt, restrict, save_checkpoint

LONG = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> Engine:
    return engine_for(folder, dtype="float32", block_size=8, max_num_batched_tokens=32)


def finish(engine: Engine) -> list[EngineOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_steps_tokens_and_pages(engine: Engine) -> None:
    assert engine.stats() == EngineStats(num_pages=engine.scheduler.pages.capacity)
    engine.add(EngineRequest("a", random_prompt(1, 40), LONG))
    engine.add(EngineRequest("b", random_prompt(2, 40), LONG))
    engine.step()
    busy = engine.stats()
    assert (busy.num_running, busy.num_waiting) in ((1, 1), (2, 0)) and busy.num_used_pages >= 4
    finish(engine)
    done = engine.stats()
    assert (done.num_running, done.num_waiting, done.num_used_pages) == (0, 0, 0)
    assert done.num_prompt_tokens == done.num_queried_tokens == 80 and done.num_hit_tokens == 0
    assert done.num_step_tokens == 80 + 2 * (LONG.max_tokens or 0) - 2, "the last ones are drawn, and not computed"
    assert sum(done.step_tokens) == done.num_steps and done.num_cached_pages >= 10
    engine.add(EngineRequest("c", random_prompt(1, 40), LONG))
    finish(engine)
    assert engine.stats().num_hit_tokens == 32 and engine.stats().num_prompt_tokens == 80 + 8


def test_nothing_ever_counts_down(engine: Engine) -> None:
    scarce = restrict(engine, num_pages=18, max_model_len=64, max_num_seqs=6)
    for number in range(8):
        scarce.add(EngineRequest(str(number), random_prompt(number % 3, 30), LONG))
    before = scarce.stats()
    while scarce.has_work:
        scarce.step()
        now = scarce.stats()
        for name in ("num_steps", "num_prompt_tokens", "num_step_tokens", "num_queried_tokens", "num_hit_tokens",
                     "num_preemptions"):  # fmt: skip
            assert getattr(now, name) >= getattr(before, name)
        assert 0 <= now.num_used_pages <= now.num_pages == 17
        before = now
    assert before.num_preemptions and before.num_queried_tokens == 8 * 30, "looked for once, however often computed"


def test_how_long_a_request_waited_comes_with_its_first_output(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingle.engine import counts

    now = [100.0]
    monkeypatch.setattr(counts.time, "monotonic", lambda: now[0])
    few = restrict(engine, num_pages=64, max_model_len=64, max_num_seqs=1)
    few.waits = Waits()
    few.add(EngineRequest("a", random_prompt(1, 20), LONG))
    few.add(EngineRequest("b", random_prompt(2, 20), LONG))
    few.add(EngineRequest("gone", random_prompt(3, 20), LONG))
    outputs = []
    while few.has_work:
        now[0] += 1.0
        outputs += few.step()
        few.abort("gone")
    waited = {output.id: output.queued_s for output in outputs if output.queued_s is not None}
    assert len(waited) == 2 and waited["a"] == 1.0 and waited["b"] > 10.0
    firsts = [next(output for output in outputs if output.id == name) for name in "ab"]
    assert all(first.queued_s is not None for first in firsts)
    assert not few.waits._since_s and not few.waits._untold_s


class Peer:
    """The other end of the channel of an engine that serves in a thread, as it does in its process."""

    def __init__(self, engine: Engine) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(20)

        def serve() -> None:
            with theirs, suppress(ChannelClosed):
                channel = Channel(theirs)
                process.serve(engine, channel, Beats(channel))

        self.thread = threading.Thread(target=serve)
        self.thread.start()

    def send(self, message: msgspec.Struct) -> None:
        self.socket.sendall(frame(message_encoder(), message))

    def messages(self) -> Iterator[FromEngine]:
        while True:
            (length,) = LENGTH.unpack(self.socket.recv(LENGTH.size, socket.MSG_WAITALL))
            yield msgspec.msgpack.decode(self.socket.recv(length, socket.MSG_WAITALL), type=FromEngine)


@pytest.fixture
def peer(engine: Engine) -> Iterator[Peer]:
    peer = Peer(engine)
    yield peer
    peer.socket.close()
    peer.thread.join(20)
    assert not peer.thread.is_alive()


def test_it_reports_once_when_it_is_idle_and_rarely_while_it_steps(peer: Peer) -> None:
    messages = peer.messages()
    first = next(messages)
    assert isinstance(first, EngineStats) and first.num_steps == 0, "what there is to fill"
    for number in range(3):
        peer.send(EngineRequest(str(number), array("i", random_prompt(number, 20)), LONG))
        steps, reports = 0, []
        for message in messages:
            steps += isinstance(message, StepMessage)
            if isinstance(message, EngineStats):
                reports.append(message)
                if message.num_steps and not message.num_running and not message.num_waiting:
                    break
        assert steps >= 11 and len(reports) <= 2 + steps // 4, "twice a second, not with every step"
        assert reports[-1].num_queried_tokens == 20 * (number + 1), "the last says all"
    peer.send(Abort("nobody"))


def test_a_step_costs_less_than_some_microseconds() -> None:
    """Generous: tools of measurement say 0.4."""
    import time

    from ingle.engine.counts import StepCounts
    from ingle.step import Step

    counts, step, waits = StepCounts(), Step(num_decodes=64, num_tokens=64), Waits()
    outputs = [EngineOutput(str(number), [1]) for number in range(64)]
    best = 1.0
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(100):
            counts.launched(step)
            waits.tell(outputs)
        best = min(best, (time.perf_counter() - started) / 100)
    assert best < 20e-6
