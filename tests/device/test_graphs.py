"""CUDA graphs that cannot be captured, on a machine that pretends to capture them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.device.inputs import Layout
from ingle.device.torch.device import TorchDevice
from ingle.device.torch.graphs import CapturedForward, StepGraphs
from ingle.engine.engine import Engine
from ingle.kernels.sampling import Features
from ingle.request import EngineRequest, SamplingParams
from tests.engine.test_steps import Alternating
from tests.support import engine_for, greedy, random_prompt, run, save_checkpoint

CAPTURES = ("_capture", "_capture_forward", "_capture_draw")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Its device is one that would capture graphs."""
    for name in ("graph_pool_handle", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    engine = engine_for(save_checkpoint(tmp_path), cpu_kernels="torch", max_num_batched_tokens=256, max_num_seqs=8)
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    device.graphs = StepGraphs(device, device.tables, engine.scheduler.limits)
    return engine


def no_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")


def graphs_of(engine: Engine) -> StepGraphs:
    assert isinstance(engine.worker.device, TorchDevice) and engine.worker.device.graphs is not None
    return engine.worker.device.graphs


def test_a_graph_that_does_not_fit_memory_is_given_up_while_the_engine_idles(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captured, graphs = [], graphs_of(engine)

    def capture(layout: Layout, features: Features) -> Any:
        if layout.num_tokens > 100:
            no_memory()
        captured.append(layout.num_tokens)
        graphs._wholes[layout, features] = None  # type: ignore[assignment]
        return True

    monkeypatch.setattr(graphs, "_capture", capture)
    num_calls = 1
    while engine.worker.device.capture_next():
        num_calls += 1
    assert captured == [1, 2, 4, 8, 64] and num_calls == 7
    (line,) = caplog.messages
    assert "steps of 128 tokens could not be captured" in line and line.endswith("Tried to allocate 2.00 GiB.")


def test_steps_run_without_graphs_that_could_not_be_captured(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    requests = [EngineRequest(str(i), random_prompt(i, 20 + i), params) for i in range(4)]
    graphs = graphs_of(engine)
    engine.worker.device.graphs = None  # type: ignore[attr-defined]
    expected = run(engine, requests)
    engine.worker.device.graphs = graphs  # type: ignore[attr-defined]
    for name in CAPTURES:
        monkeypatch.setattr(graphs, name, no_memory)
    assert run(engine, requests) == expected
    for request in requests:
        engine.add(request, Alternating())
    while engine.has_work:
        assert not any(output.error for output in engine.step())
    assert len(caplog.messages) == len(graphs._given_up) > 1, "each is told once"


def test_what_the_first_try_left_in_the_cache_is_given_back_for_the_second(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, free = graphs_of(engine), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(True))
    monkeypatch.setattr(graphs, "_capture", lambda layout, features: True if free else no_memory())
    assert engine.worker.device.capture_next() and not caplog.messages


def test_a_lost_device_is_told(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(graphs_of(engine), "_capture", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        engine.worker.device.capture_next()


@pytest.mark.parametrize("in_halves", [False, True])
def test_no_rank_has_a_graph_that_another_lacks(
    engine: Engine, in_halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here captures go well, and on another rank they do not."""

    class Ranks:
        def all_agree(self, well: bool, *, in_stage: bool) -> bool:
            assert well
            return False

    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    graphs = device.graphs = StepGraphs(device, device.tables, engine.scheduler.limits, Ranks(), in_halves=in_halves)
    for name in CAPTURES:
        monkeypatch.setattr(graphs, name, lambda *key: key)
    assert device.capture_next() and not graphs._wholes and not graphs._forwards
    assert greedy(engine, random_prompt(1, 20), 4), "no graph is replayed"


def test_draws_apart_are_captured_while_the_engine_idles(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once one was: who is not in a pipeline's last stage has none. What could not be captured is not tried again."""
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    graphs = StepGraphs(device, device.tables, engine.scheduler.limits, in_halves=True)
    tried: list[int] = []

    def capture_forward(layout: Layout) -> Any:
        return CapturedForward(layout, *[None] * 5, {})  # type: ignore[arg-type]

    def capture_draw(forward: CapturedForward, features: Features) -> Any:
        tried.append(forward.layout.num_tokens)
        return True if forward.layout.num_tokens < 100 else no_memory()

    monkeypatch.setattr(graphs, "_capture_forward", capture_forward)
    monkeypatch.setattr(graphs, "_capture_draw", capture_draw)
    sizes = [1, 2, 4, 8, 64, 128, 192, 256]
    for _ in sizes:
        assert graphs.capture_next()
    assert not graphs.capture_next() and not tried
    graphs._drawn[Features()] = None
    while graphs.capture_next():
        pass
    assert sorted(set(tried)) == sizes and [tried.count(size) for size in sizes] == [1] * 5 + [2] * 3
