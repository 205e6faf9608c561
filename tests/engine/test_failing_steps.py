"""A step that raises an exception ends the request at fault; the others get what they get alone."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ingle.channel import LENGTH, Channel, ChannelClosed, FromEngine, StepMessage, frame, message_encoder
from ingle.device import Report
from ingle.engine.beats import Beats
from ingle.engine.engine import Engine
from ingle.engine.pace import Pace
from ingle.engine.process import serve
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.step import Masks, Step
from tests.support import collect, engine_for, random_prompt, run, save_checkpoint

POISON = 13


class FaultyStep:
    """A step whose result is an error."""

    def sample(self, masks: Masks) -> None:
        pass

    def report(self) -> Report:
        raise ValueError("index 4711 is out of bounds")


class FaultyDevice:
    """A device that cannot give the third token after a prompt that begins with `POISON`."""

    def __init__(self, device: Any, *, late: bool, error: Exception, lost: bool = False) -> None:
        self._device, self._late, self._error, self._lost = device, late, error, lost
        self._poisoned: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def usable(self) -> bool:
        return not self._lost

    def forward(self, step: Step) -> Any:
        for admission in step.admissions:
            poisoned = admission.token_ids[0] == POISON
            self._poisoned[admission.slot] = admission.num_prompt_tokens + 2 if poisoned else -1
        launched = self._device.forward(step)  # so that pages, tables and counts have changed
        if any(self._poisoned[chunk.slot] == chunk.start + chunk.count for chunk in step.chunks):
            if self._late:
                return FaultyStep()
            raise self._error
        return launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


MakeEngine = Callable[..., Engine]


@pytest.fixture(params=["native", "torch", "torch-overlap"])
def healthy(request: pytest.FixtureRequest, folder: Path) -> Engine:
    dtype, overlap = ("bfloat16", False) if request.param == "native" else ("float32", request.param == "torch-overlap")
    return engine_for(folder, dtype=dtype, block_size=8, overlap=overlap)


@pytest.fixture
def faulty(healthy: Engine) -> MakeEngine:
    def make(late: bool = False, error: Exception | None = None, lost: bool = False) -> Engine:
        error = error or IndexError("index 4711 is out of bounds")
        healthy.worker.device = FaultyDevice(healthy.worker.device, late=late, error=error, lost=lost)
        return healthy

    return make


def requests(count: int, poisoned: set[int]) -> list[EngineRequest]:
    """Some share a prefix, some are sampled, some penalized."""
    made = []
    for i in range(count):
        prompt = [POISON] * (i in poisoned) + random_prompt(i % 4, 20 + i)
        penalty = 1.3 if i % 3 == 0 else 1.0
        params = SamplingParams(temperature=i % 2, seed=i, max_tokens=9, ignore_eos=True, repetition_penalty=penalty)
        made.append(EngineRequest(str(i), prompt, params))
    return made


@pytest.mark.parametrize("poisoned", [{0}, {7}, {3, 4}], ids=str)
@pytest.mark.parametrize("late", [False, True], ids=["at launch", "in its result"])
def test_the_others_get_their_tokens(healthy: Engine, faulty: MakeEngine, late: bool, poisoned: set[int]) -> None:
    alone = {r.id: run(healthy, [r])[r.id] for r in requests(8, poisoned)}
    outputs = collect(faulty(late=late), requests(8, poisoned))
    for i, (name, parts) in enumerate(outputs.items()):
        tokens = [token for part in parts for token in part.token_ids]
        assert parts[-1].finish_reason == ("error" if i in poisoned else "length")
        assert tokens == alone[name][: 2 if i in poisoned else 9]


def test_what_the_client_is_told_and_what_the_log_says(faulty: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="ingle"):
        (told,) = [o.error for o in collect(faulty(), requests(2, {1}))["1"] if o.error]
    assert told == "it could not be computed: the server's log says why"
    assert "request 1 ends" in caplog.text and "index 4711 is out of bounds" in caplog.text


def test_memory_that_runs_out_is_named(faulty: MakeEngine) -> None:
    (told,) = [o.error for o in collect(faulty(error=MemoryError()), requests(1, {0}))["0"] if o.error]
    assert told is not None and told.startswith("there is not enough memory")


class NarrowDevice(FaultyDevice):
    """A device whose memory is enough for steps of so many tokens, and of so many sequences."""

    def __init__(self, device: Any, *, tokens: int = 1 << 30, sequences: int = 1 << 30) -> None:
        super().__init__(device, late=False, error=MemoryError())
        self._tokens, self._sequences = tokens, sequences
        self.num_relieved = self.num_steps = 0

    def forward(self, step: Step) -> Any:
        self.num_steps += 1
        if step.num_tokens > self._tokens or len(step.chunks) > self._sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self._device.forward(step)

    def relieve(self) -> None:
        self.num_relieved += 1


def narrow(healthy: Engine, **bounds: int) -> NarrowDevice:
    limits = dataclasses.replace(healthy.scheduler.limits, least_portion=16)
    healthy.scheduler.limits, healthy.scheduler.pace = limits, Pace(limits)
    device = NarrowDevice(healthy.worker.device, **bounds)
    healthy.worker.device = device
    return device


def salted(salt: str) -> list[EngineRequest]:
    """Requests of which the prefix cache has nothing."""
    return [msgspec.structs.replace(request, cache_salt=salt) for request in requests(8, set())]


def test_a_step_that_runs_out_of_memory_is_made_smaller(healthy: Engine, caplog: pytest.LogCaptureFixture) -> None:
    alone = {r.id: run(healthy, [r])[r.id] for r in requests(8, set())}
    device = narrow(healthy, tokens=40)
    assert run(healthy, salted("a")) == alone
    assert device.num_relieved and "the next read 32" in caplog.text
    device.num_relieved = 0
    assert run(healthy, salted("b")) == alone
    assert not device.num_relieved, "what was too large is not tried again at once"


def test_a_step_that_cannot_be_smaller_costs_its_newest_request(healthy: Engine) -> None:
    alone = {r.id: run(healthy, [r])[r.id] for r in requests(8, set())}
    device = narrow(healthy, sequences=5)
    outputs = collect(healthy, requests(8, set()))
    ends = {name: parts[-1] for name, parts in outputs.items()}
    assert [name for name, end in ends.items() if end.finish_reason == "error"] == ["5", "6", "7"]
    assert all("not enough memory" in (ends[name].error or "") for name in "567")
    for name in "01234":
        assert [token for part in outputs[name] for token in part.token_ids] == alone[name]
    assert device.num_steps < 120, "each is tried alone once, not again and again"


def test_an_error_of_a_device_that_is_lost_ends_the_engine(faulty: MakeEngine) -> None:
    with pytest.raises(IndexError, match="4711"):
        collect(faulty(lost=True), requests(2, {1}))


def test_aborted_while_on_trial(faulty: MakeEngine) -> None:
    engine = faulty()
    for request in requests(3, {2}):
        engine.add(request)
    outputs: list[EngineOutput] = []
    while not any(output.id == "0" and output.finish_reason for output in outputs):
        outputs += engine.step()
        if sum(len(output.token_ids) for output in outputs if output.id == "2") == 2:
            engine.abort("2")
    while engine.has_work:
        outputs += engine.step()
    engine.scheduler.check()
    assert not any(output.error for output in outputs)


def test_end_tokens_beyond_the_vocabulary_end_nothing(healthy: Engine) -> None:
    """A checkpoint may name any; -1 would be the last token, and 32000 an index error."""
    plain = SamplingParams(temperature=0.0, max_tokens=6, min_tokens=4)
    ends = {"0": (), "1": (32000, -1, 1 << 70)}
    made = [EngineRequest(name, random_prompt(1, 9), plain, ids) for name, ids in ends.items()]
    tokens = run(healthy, made)
    assert tokens["0"] == tokens["1"] and len(tokens["1"]) == 6


class Client:
    """The other end of the channel of an engine that serves in a thread, as it does in its process."""

    def __init__(self, engine: Engine) -> None:
        self._socket, theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, args=(engine, theirs))
        self._thread.start()

    def _serve(self, engine: Engine, theirs: socket.socket) -> None:
        with theirs, contextlib.suppress(ChannelClosed):
            channel = Channel(theirs)
            serve(engine, channel, Beats(channel))

    def answer(self, request: EngineRequest) -> EngineOutput:
        """The last output of a request."""
        self._socket.sendall(frame(message_encoder(), request))
        while True:
            (length,) = LENGTH.unpack(self._read(LENGTH.size))
            message = msgspec.msgpack.decode(self._read(length), type=FromEngine)
            for output in message.outputs if isinstance(message, StepMessage) else ():
                if output.finish_reason is not None:
                    return output

    def _read(self, count: int) -> bytes:
        self._socket.settimeout(20)
        data = self._socket.recv(count, socket.MSG_WAITALL)
        assert len(data) == count, "the engine has gone"
        return data

    def close(self) -> None:
        self._socket.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


def test_the_process_serves_the_next(faulty: MakeEngine) -> None:
    with contextlib.closing(Client(faulty())) as client:
        for number, poisoned in enumerate([set(), {0}, set()]):
            (request,) = requests(1, poisoned)
            request = EngineRequest(str(number), request.prompt_token_ids, request.sampling)
            assert client.answer(request).finish_reason == ("error" if poisoned else "length")
