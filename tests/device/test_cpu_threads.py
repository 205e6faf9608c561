"""Threads of a CPU engine: no thread is kept on a processor, PyTorch's least of all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
    num_sms, num_threads = map(int, done.stdout.split())
    assert num_sms > 1 or num_threads == 1, f"{num_threads} threads share the main thread's only processor"
