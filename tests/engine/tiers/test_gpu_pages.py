"""Pages of a GPU, copied beside its steps and beside captures of CUDA graphs."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.device.torch.pages import GpuPages
from ingle.engine.engine import Engine
from tests.engine.test_engine import mixed_requests, run_at_random_moments
from tests.engine.tiers.test_kept_pages import check_read, contents, engine_with, names_read, request
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, greedy, random_prompt, save_checkpoint

pytestmark = pytest.mark.gpu


def gpu_engine(folder: Path, memory: int | None = None, **options: object) -> Engine:
    given = {
        "device": "cuda",
        "dtype": "bfloat16",
        "kv_cache_memory": "64MiB",
        "max_num_batched_tokens": 256,
        **options,
    }
    return engine_with(folder, memory, **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_pages_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    pages = torch.randn(3, 2, 40, 8, 2, 24, device="cuda").to(dtype)
    before, copies = pages.clone(), GpuPages(pages, threading.Lock())
    chosen = random.Random(0).sample(range(40), 12)
    out = copies.buffer(12)
    copies.read(chosen, out)
    for page_id, row in zip(chosen, out, strict=True):
        expected = pages[:, :, page_id].contiguous().view(torch.uint8).flatten().cpu().numpy()
        assert np.array_equal(row, expected)
    pages[:, :, chosen] = 0
    copies.write(chosen, out)
    assert torch.equal(pages, before)


def test_a_page_that_a_launched_step_is_to_zero_is_written_after_that() -> None:
    pages = torch.ones(2, 2, 8, 8, 2, 16, device="cuda")
    copies = GpuPages(pages, threading.Lock())
    data = copies.buffer(1)
    data[:] = 7
    torch.cuda._sleep(200_000_000)
    pages[:, :, [3]] = 0
    copies.write([3], data)
    assert (pages[:, :, 3].contiguous().view(torch.uint8) == 7).all()


@pytest.mark.parametrize("name", ["gqa", "gemma3", "deepseek-v3", "mistral-window"])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_what_is_read_back_is_what_was_computed(tmp_path: Path, name: str, enforce_eager: bool) -> None:
    model_type, overrides = CHECKPOINTS[name]
    folder, memory = save_checkpoint(tmp_path / "model", model_type, **overrides), os.memfd_create("test")
    options = {"host_cache": "64MiB", "enforce_eager": enforce_eager}
    before = gpu_engine(folder, memory, **options)
    prompt = random_prompt(5, 200)
    greedy(before, prompt, 20)
    computed = contents(before)
    before.close(30)
    after = gpu_engine(folder, memory, **options)
    names = names_read(after)
    output = collect(after, [request("b", prompt)])["b"][0]
    assert output.num_cached_tokens >= 192
    check_read(after, names, computed, 5)
    os.close(memory)


@pytest.mark.parametrize("overlap", [True, False])
def test_batched_equals_alone_while_pages_go_and_come_and_graphs_are_captured(tmp_path: Path, overlap: bool) -> None:
    """A pool that is too small: pages are evicted and read back all the time, and no graph is there at first."""
    folder = save_checkpoint(tmp_path / "model", num_attention_heads=4, num_key_value_heads=2)
    options = {"dtype": "float32", "overlap": overlap}
    alone = gpu_engine(folder, host_cache="64MiB", **options)
    expected = {each.id: run_at_random_moments(alone, [each])[each.id] for each in mixed_requests(24)}
    engine = gpu_engine(folder, host_cache="64MiB", num_gpu_blocks_override=70, **options)
    assert isinstance(engine.worker.device, TorchDevice)
    for _ in range(4):
        assert run_at_random_moments(engine, mixed_requests(24)) == expected
        engine.worker.device.capture_next()
    assert engine.keeper is not None
    assert engine.keeper.counters["host"].num_pages_read > 50
    engine.scheduler.check()
