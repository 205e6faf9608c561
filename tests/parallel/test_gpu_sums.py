"""Sums by way of the GPUs' inboxes, on as many GPUs as there are: see `tests.parallel.sums_worker`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.engine.test_engine import mixed_requests
from tests.parallel.test_gpu_ranks import crew_answers, options_of
from tests.parallel.test_gpu_ranks import folder as folder
from tests.support import engine_for, run

pytestmark = pytest.mark.gpu


def needs(size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")


@pytest.mark.parametrize("size", [2, 4])
def test_sums(size: int) -> None:
    needs(size)
    command = [sys.executable, "-m", "tests.parallel.sums_worker", str(size), "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("size", [2, 4])
def test_a_model(folder: Path, size: int) -> None:
    needs(size)
    whole = engine_for(folder, **options_of())
    assert crew_answers(folder, [f"cuda:{index}" for index in range(size)]) == run(whole, mixed_requests(8))
