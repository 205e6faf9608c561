"""Fixtures that the whole suite shares."""

from __future__ import annotations

import os
import random
import signal
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # each has its share of the cores; threads that wait for others leave theirs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from tests.kernels import interpreted

# What is started in the background of a script ignores Ctrl-C, and so would all that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("patient", deadline=None)  # a busy machine is no defect
settings.load_profile("patient")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton must know before whoever comes first imports it
    with suppress(ImportError):
        interpreted.quicken()
os.environ["HF_ENDPOINT"] = os.environ["MODELSCOPE_ENDPOINT"] = "http://127.0.0.1:9"  # no test asks a hub outside


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_numbers_each_time(request: pytest.FixtureRequest) -> None:
    """A test draws what it drew before, so that one that failed fails again."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The default model's file, pulled into the local store when it is not there yet."""
    from ingle.hub.resolve import ensure_model

    return ensure_model("smollm2:135m").path


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """The file of gemma3:270m, of 253 MB, pulled into the local store when it is not there yet."""
    from ingle.hub.resolve import ensure_model

    return ensure_model("gemma3:270m").path
