"""Workloads are what they say, and the roofline counts what it claims to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ingle.bench.cli import main
from ingle.bench.roofline import Ceilings, Stored, least
from ingle.bench.workloads import WORKLOADS, Workload, select
from ingle.engine.scheduler import Limits
from ingle.errors import ConfigError
from ingle.model.registry import decoder_config
from tests.support import save_checkpoint

SHAPE = decoder_config({"model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16,
                        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64})  # fmt: skip


def test_workloads_are_the_named_lengths() -> None:
    assert WORKLOADS["c36"].lengths == ((128, 256),) * 36
    nano = WORKLOADS["nano256"].lengths
    assert len(nano) == 256 and nano[:2] == ((964, 494), (876, 1011))
    assert WORKLOADS["nano256"].prompts(50) == WORKLOADS["nano256"].prompts(50)
    with pytest.raises(ConfigError, match="no workload 'c3'"):
        select(("c3",))


def test_the_roofline_counts_bytes_by_hand() -> None:
    """Two tokens after a prompt of 4, at a bandwidth of 1 byte/s and free matrix work."""
    head, body = 100 * 8 * 2, 5000
    kv = SHAPE.kv_elements_per_token * 2
    stored = Stored(body, body // 2, head, head // 2, kv)
    limits = Limits(4, 16, 64, 16)
    limit = least(Workload("x", ((4, 3),)), SHAPE, stored, limits, Ceilings(1.0, 1e30))
    assert limit.num_steps == 3
    assert limit.num_bytes == 3 * (body + head) + (5 + 6) * kv
    assert limit.seconds == pytest.approx(limit.num_bytes)


def test_throughput_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "figures.json"
    main(["throughput", str(folder), "--workload", "cpu-c2", "--num-runs", "1", "--device", "cpu", "--kv-cache-memory",
          "32MiB", "--max-model-len", "512", "--output", str(output)])  # fmt: skip
    (result,) = json.loads(output.read_text())["results"]
    assert result["workload"] == "cpu-c2" and result["num_output_tokens"] == 128
    assert result["output_tokens_per_s"] > 0 and 0 < result["share_of_limit"] < 1
    assert "cpu-c2" in capsys.readouterr().out
