"""Stages of a pipeline on GPUs: the same ranks load a model after the other, each of which is asked in every way."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.engine import ranks
from ingle.engine.engine import Engine
from ingle.engine.ranks import Crew
from ingle.engine.startup import Startup
from ingle.parallel.device import RanksDevice
from ingle.parallel.layout import Layout
from tests.parallel.test_ranks import load, requests
from tests.support import engine_for, greedy, random_prompt, run, save_checkpoint

pytestmark = pytest.mark.gpu
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 5},
    "gemma2": {"head_dim": 16, "sliding_window": 30, "num_key_value_heads": 4, "num_hidden_layers": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "num_key_value_heads": 4,
                  "num_hidden_layers": 4},
}  # fmt: skip
SIZES = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
LIMITS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
"""So few that there are five graphs, whose kernels take long to compile."""
BEGUN_S = time.monotonic()


def tell(stage: str) -> None:
    print(f"{time.monotonic() - BEGUN_S:6.1f} s: {stage}", file=sys.stderr, flush=True)


@pytest.fixture(params=[Layout(1, 2), Layout(1, 4), Layout(2, 2)], ids=str, scope="module")
def crew(request: pytest.FixtureRequest) -> Iterator[Crew]:
    layout: Layout = request.param
    if torch.cuda.device_count() < layout.num_ranks:
        pytest.skip(f"needs {layout.num_ranks} GPUs")
    crew = ranks.assemble(layout, [f"cuda:{rank}" for rank in range(layout.num_ranks)], Startup(tell))
    with crew.team:
        yield crew
    tell("ranks have ended")


def captured(engine: Engine) -> Engine:
    """With all its graphs, as one that idled for a while."""
    while engine.worker.device.capture_next():
        pass
    return engine


def forget(engine: Engine) -> None:
    """Its graphs, of which NCCL's groups would wait at the end."""
    device = engine.worker.device
    assert isinstance(device, RanksDevice)
    device.own.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_give_what_one_gpu_gives(crew: Crew, family: str, tmp_path: Path) -> None:
    """Greedy and sampled, masked, with log probabilities of prompts, which leave graphs; long and cached prompts; one
    at a time and batched."""
    folder = save_checkpoint(tmp_path, family, **{**SIZES, **FAMILIES[family]})
    options = {"device": "cuda", "dtype": "float32", **LIMITS}
    tell(f"{family} on one GPU")
    alone = captured(engine_for(folder, num_gpu_blocks_override=200, **options))
    right, prompt = run(alone, requests()), random_prompt(1, 150)
    longer = greedy(alone, prompt, 24)
    tell(f"{family} in stages")
    engine = captured(load(crew, folder, overlap=True, **options))
    tell("captured")
    assert run(engine, requests()) == right
    tell("the same")
    for _ in range(2):
        assert greedy(engine, prompt, 24) == longer
    assert engine.scheduler.num_hit_tokens > 0
    forget(engine)


def test_in_bfloat16(crew: Crew, tmp_path: Path) -> None:
    """By the kernels of large models, with many in flight at once."""
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4}
    folder = save_checkpoint(tmp_path, "llama", **sizes)
    engine = captured(load(crew, folder, overlap=True, device="cuda", **{**LIMITS, "dtype": "bfloat16"}))
    answers, prompt = run(engine, requests()), random_prompt(1, 100)
    assert sum(map(len, answers.values())) > len(requests())
    greedy(engine, prompt, 24)
    assert greedy(engine, prompt, 24) == greedy(engine, prompt, 24), "with the same pages cached"
    forget(engine)


def test_without_graphs(crew: Crew, tmp_path: Path) -> None:
    folder, asked = save_checkpoint(tmp_path, "qwen2", **{**SIZES, **FAMILIES["qwen2"]}), requests()[:4]
    options = {"device": "cuda", "dtype": "float32", "enforce_eager": True, **LIMITS}
    right = run(engine_for(folder, num_gpu_blocks_override=200, **options), asked)
    assert run(load(crew, folder, overlap=True, **options), asked) == right
    tell("without graphs, the same")
