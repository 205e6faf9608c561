"""Workloads are what they say, and the roofline counts what it claims to."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ingle.bench.cli import main
from ingle.bench.throughput import run_once
from ingle.bench.workloads import GROUPS, WORKLOADS, Workload, select
from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.roofline import Ceilings, Stored, least
from ingle.errors import ConfigError, EngineError
from ingle.kernels import reference
from ingle.kernels.options import RouterConfig
from ingle.model.registry import decoder_config
from ingle.request import Sampling
from ingle.step import Limits
from ingle.weights.tensor_sources import DummySource
from tests.support import engine_for, save_checkpoint

SHAPE = decoder_config({"model_type": "llama", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16,
                        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64})  # fmt: skip


def test_workloads_are_the_named_lengths() -> None:
    assert WORKLOADS["c36"].lengths == ((128, 256),) * 36
    nano = WORKLOADS["nano256"].lengths
    assert len(nano) == 256 and nano[:2] == ((964, 494), (876, 1011))
    assert WORKLOADS["nano256"].prompts(50) == WORKLOADS["nano256"].prompts(50)
    with pytest.raises(ConfigError, match="--workload 'c3': there are gpu, replicas, cpu, c1, "):
        select(("c3",))


def test_the_roofline_counts_bytes_by_hand() -> None:
    """Two tokens after a prompt of 4, at a bandwidth of 1 byte/s and free matrix work."""
    head, body = 100 * 8 * 2, 5000
    kv = SHAPE.kv_spec("float16").token_bytes
    has = Stored(body, body // 2, head, head // 2, kv)
    limits = Limits(4, 16, 64, 16)
    limit = least(((4, 3),), SHAPE, has, limits, Ceilings(1.0, 1e30))
    assert limit.num_steps == 3
    assert limit.num_bytes == 3 * (body + head) + (5 + 6) * kv
    assert limit.seconds == pytest.approx(limit.num_bytes)


def test_the_roofline_counts_keys_within_windows() -> None:
    """Of a prompt of 9 and 5 tokens after it: all keys in one layer, the last 6 in the other."""
    shape = dataclasses.replace(SHAPE, windows=(None, 6))
    kv = shape.kv_spec("float16").token_bytes
    has = Stored(0, 0, 0, 0, kv)
    workload, limits = Workload("x", ((9, 6),)), Limits(4, 16, 64, 16)
    limit = least(workload.lengths, shape, has, limits, Ceilings(1.0, 1e30))
    assert limit.num_bytes == sum(length + 6 for length in range(10, 15)) * kv // 2
    computed = least(workload.lengths, shape, has, limits, Ceilings(1e30, 1.0))
    pairs = sum(range(1, 10)) + sum(min(count, 6) for count in range(1, 10))
    assert computed.seconds == pytest.approx(4 * shape.q_size * pairs)


def test_the_roofline_counts_experts_that_are_touched(tmp_path: Path) -> None:
    """3 of 8 experts: a step of n tokens is expected to read 1 - (5/8)^n of them, and a token is multiplied by 3/8."""
    folder = save_checkpoint(tmp_path, "qwen2_moe", num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40,
                             shared_expert_intermediate_size=48)  # fmt: skip
    engine, info = build_engine(EngineConfig.of(str(folder), dtype="float32", device="cpu", cpu_kernels="torch",
                                             kv_cache_memory="8MiB"), folder)  # fmt: skip
    has = Stored.of(engine.facts.weights, engine.facts.kv)
    experts, head = 2 * 8 * 3 * 64 * 40, 256 * 64
    dense_mlp = 3 * 64 * 48 + 64 + 8 * 64  # shared expert, its gate, router
    body = 2 * (64 * (64 + 2 * 32) + 128 + 64 * 64 + 2 * 64 + dense_mlp) + 64
    assert info.num_parameters == body + experts + 2 * head
    assert (has.body_parameters, has.body_bytes, has.head_bytes) == (body, 4 * body, 4 * head)
    assert has.token_parameters() == body + experts * 3 / 8
    assert has.step_bytes(1) == pytest.approx(4 * body + 4 * experts * 3 / 8)
    assert has.step_bytes(2) == pytest.approx(4 * body + 4 * experts * (1 - (5 / 8) ** 2))
    limit = least(((4, 2),), engine.facts.model, has, Limits(4, 16, 64, 16), Ceilings(1.0, 1e30))
    read = has.step_bytes(4) + has.step_bytes(1) + 2 * has.head_bytes + 5 * has.kv_bytes_per_token
    assert limit.seconds == pytest.approx(read)


def test_made_up_weights_route_tokens_about_evenly() -> None:
    """So that a shape's figures are those of its size: of tokens with random directions, the busiest expert is not far
    from the mean, and nearly all experts get one."""
    router = torch.empty(128, 2048)
    DummySource(0).load_into("model.layers.0.mlp.gate.weight", router)
    ids, _ = reference.route(torch.randn(2048, 2048) @ router.T, None, RouterConfig(128, 8))
    counts = ids.flatten().bincount(minlength=128)
    assert counts.min() > 0.5 * 128 and counts.max() < 1.5 * 128


def test_throughput_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "figures.json"
    main(["throughput", str(folder), "--workload", "cpu-c2", "--num-runs", "1", "--device", "cpu", "--kv-cache-memory",
          "32MiB", "--max-model-len", "512", "--output", str(output)])  # fmt: skip
    (result,) = json.loads(output.read_text())["results"]
    assert result["workload"] == "cpu-c2" and result["num_output_tokens"] == 128
    assert result["output_tokens_per_s"] > 0 and 0 < result["share_of_limit"] < 1
    assert "cpu-c2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["throughput", "m", "--thread", "1"], "unknown flag --thread; did you mean --threads"),
        (["throughput"], "MODEL"),
        (["throughput", "m", "--workload", "c3"], "--workload 'c3': there are gpu, replicas, cpu"),
        (["latncy", "m"], "did you mean `ingle bench latency`"),
        (["serv"], "did you mean `ingle bench serve`"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        main(argv)
    assert "\n" not in str(raised.value)


def test_a_request_that_fails_is_no_speed(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path)
    engine = engine_for(folder, cpu_kernels="torch")
    workload = Workload("short", ((4, 8), (4, 8)))
    assert run_once(engine, workload, 256, Sampling(temperature=0.6), seed=1).num_steps >= 8
    engine.worker.device.model.embedding.plain[:] = torch.nan
    with pytest.raises(EngineError, match="request 0 failed: the model computed NaN"):
        run_once(engine, workload, 256, Sampling(temperature=0.6), seed=1)


def test_latency_is_that_of_whole_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "figures.json"
    options = ["--device", "cpu", "--kv-cache-memory", "32MiB", "--max-model-len", "64"]
    main(["latency", str(folder), "--input-len", "20", "--output-len", "8", "--batch-size", "3", "--num-iters", "4",
          "--output", str(output), *options])  # fmt: skip
    (result,) = json.loads(output.read_text())["results"]
    assert (result["batch_size"], result["input_len"], result["output_len"], result["num_iters"]) == (3, 20, 8, 4)
    for spread in (result["ttft_s"], result["tpot_s"], result["latency_s"]):
        assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert result["ttft_s"]["mean"] + 7 * result["tpot_s"]["mean"] <= result["latency_s"]["mean"] * 1.001
    assert "whole request" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--input-len 60 and --output-len 8 are more than the context of 64"):
        main(["latency", str(folder), "--input-len", "60", "--output-len", "8", *options])


def test_the_profile_is_of_as_many_sequences_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "figures.json"
    command = ["profile", str(folder), "--device", "cpu", "--kv-cache-memory", "8MiB", "--max-model-len", "256",
               "--num-prompts", "2", "--prompt-tokens", "40", "--output", str(output)]  # fmt: skip
    main([*command, "--num-seqs", "1", "3", "--context", "100"])
    prefill, one, three = json.loads(output.read_text())
    assert prefill["num_prompt_tokens"] == 80
    assert (one["workload"], three["workload"]) == ("decode 1 x 100", "decode 3 x 100")
    assert one["num_prompt_tokens"] == three["num_prompt_tokens"] == 0 and min(one["device_us"].values()) > 0
    assert "decode 3 x 100" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"3 sequences of 100 tokens do not decode together: the engine takes 2 seq"):
        main([*command, "--num-seqs", "3", "--context", "100", "--max-num-seqs", "2"])
    with pytest.raises(ConfigError, match="2 sequences of 230 tokens do not decode together"):
        main([*command, "--num-seqs", "2", "--context", "230"])  # of 256: the first is done before 20 steps are seen


def test_help_lists_the_workloads_without_pytorch() -> None:
    code = "import sys; from ingle.cli.main import main; main(['bench', '--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    lines = [line.split() for line in out.splitlines()]
    assert ["cpu-c2", "2", "requests", "of", "128", "tokens", "in,", "64", "out"] in lines
    assert {line[0] for line in lines if line} >= {*WORKLOADS, *GROUPS}


@pytest.mark.slow
def test_a_cold_start_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither compiled kernels nor the files in memory; the next start finds both."""
    folder, output = save_checkpoint(tmp_path / "model"), tmp_path / "figures.json"
    main(["startup", str(folder), "--device", "cpu", "--kv-cache-memory", "32MiB", "--max-model-len", "512", "--output",
          str(output)])  # fmt: skip
    cold, warm = json.loads(output.read_text())
    assert (cold["start"], warm["start"]) == ("cold", "warm")
    assert cold["first_token_s"] > warm["first_token_s"] > 0
    assert cold["share_in_memory"] is None or cold["share_in_memory"] < 1 == warm["share_in_memory"]
    assert "cold start" in capsys.readouterr().out
