"""Engines side by side on GPUs: each has its own, and says what one alone says."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle import LLM, SamplingParams
from ingle.errors import ConfigError
from ingle.server.offline import OfflineReplicas
from tests.e2e.conftest import save_byte_model

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def on_each_gpu() -> dict[int, set[str]]:
    """By process, the GPUs that it computes on, as far as the driver tells."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    found: dict[int, set[str]] = {}
    for line in subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines():
        pid, _, gpu = line.partition(", ")
        if pid.isdecimal():
            found.setdefault(int(pid), set()).add(gpu)
    return found


@pytest.mark.parametrize("size", [1, 2])
def test_replicas_on_gpus_say_what_one_engine_says(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < 2 * size:
        pytest.skip(f"needs {2 * size} GPUs")
    folder = str(save_byte_model(tmp_path, **SIZES))
    options: dict[str, Any] = {"dtype": "float32", "num_gpu_blocks_override": 200, "max_num_batched_tokens": 256}
    prompts = [[1 + number, 5, 6, 7] * 9 for number in range(10)]

    def said(llm: LLM) -> list[list[int]]:
        """One at a time: what a product is rounded to depends on how many rows it has."""
        return [llm.generate([each], PARAMS, use_tqdm=False)[0].outputs[0].token_ids for each in prompts]

    alone = said(LLM(folder, **options))
    llm = LLM(folder, data_parallel_size=2, tensor_parallel_size=size, **options)
    assert said(llm) == alone
    replicas = llm._shared._engine
    assert isinstance(replicas, OfflineReplicas)
    assert min(stats.num_steps for stats in replicas._told.stats.values()) > 0
    held = on_each_gpu()
    own = [held[engine.pid] for engine in replicas._engines if engine.pid in held]
    if len(own) == 2:  # within a container the driver may tell other numbers
        assert not own[0] & own[1]


def test_more_than_there_are_is_refused(tmp_path: Path) -> None:
    count = torch.cuda.device_count() + 1
    with pytest.raises(ConfigError, match=rf"{count} GPUs are needed|sees no GPU"):
        LLM(str(save_byte_model(tmp_path, **SIZES)), data_parallel_size=count)
