"""Threads of a CPU engine: no thread is kept on a processor, PyTorch's least of all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.kernels.cpu import library
from ingle.model.decoder import Decoder
from tests.model.checkpoints import CHECKPOINTS
from tests.support import engine_for, greedy, random_prompt, save_checkpoint

SCRIPT = """
import os, pathlib, torch
from ingle.kernels.cpu import library, threads

assert library.start(threads.default_count()) is None
torch.ones(1 << 22).exp()
mine = os.sched_getaffinity(0)
tasks = [int(task.name) for task in pathlib.Path("/proc/self/task").iterdir()]
print(len(mine), sum(os.sched_getaffinity(task) == mine for task in tasks))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are kept in place on Linux only")
def test_pytorchs_threads_are_not_kept_on_the_processor_of_the_main_thread() -> None:
    """Two threads that wait for each other on one processor take ten times as long."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor is all there is")
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    if "AssertionError" in done.stderr:
        pytest.skip("ingle's CPU kernels cannot be had here")
    assert done.returncode == 0, done.stderr
    num_processors, num_threads = map(int, done.stdout.split())
    assert num_processors > 1 or num_threads == 1, f"{num_threads} threads share the main thread's only processor"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pytorch_has_one_thread_within_a_step_of_ingles_kernels(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its others would spin on the processors that the kernels want; what multiplies by PyTorch needs them all."""
    model_type, latent_attention = CHECKPOINTS["deepseek-v2-lite"]
    engine = engine_for(save_checkpoint(tmp_path, model_type, **latent_attention), dtype=dtype, threads=2)
    if not library.started():
        pytest.skip("ingle's CPU kernels cannot be had here")
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    forward, seen = Decoder.forward, []

    def watched(*args: Any) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(Decoder, "forward", watched)
    greedy(engine, random_prompt(1, 20), 3)
    assert set(seen) == {1 if dtype == "bfloat16" else 2}
    assert torch.get_num_threads() == 2
