"""Ranks on GPUs: NCCL within CUDA graphs, on one GPU as far as that goes, and on as many as there are."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.config import EngineConfig
from ingle.engine import ranks
from ingle.engine.engine import Engine
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Scheduler
from ingle.engine.startup import ModelFiles, Startup
from ingle.engine.torch_build import TorchRunner
from ingle.parallel.group import Member, TensorGroup, _gloo, _nccl, c10d
from ingle.parallel.layout import Layout
from ingle.parallel.link import Link
from ingle.request import EngineRequest, SamplingParams
from tests.engine.test_engine import mixed_requests
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, engine_for, engine_on, greedy, random_prompt, run, save_checkpoint

pytestmark = pytest.mark.gpu
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma2": {"head_dim": 16, "sliding_window": 30, "num_key_value_heads": 4},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64, "num_key_value_heads": 4},
}


def quiet() -> Startup:
    return Startup(lambda stage: None)


def options_of(**more: Any) -> dict[str, Any]:
    return {"device": "cuda", "dtype": "float32", "num_gpu_blocks_override": 200, "max_num_batched_tokens": 256, **more}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256}
    return save_checkpoint(tmp_path, request.param, **{**sizes, **FAMILIES[request.param]})


@pytest.fixture(scope="module")
def alone_among_ranks() -> Iterator[Member]:
    """A group of one, by NCCL: all that ranks do, but that nobody else has a share."""
    file = os.memfd_create("rendezvous")
    store = c10d.FileStore(f"/proc/self/fd/{file}", 1)
    group = TensorGroup(_nccl(store, "group", 0, 1), 0, 1, "nccl")
    hosts = TensorGroup(_gloo(store, "hosts", 0, 1), 0, 1, "gloo")
    yield Member(Layout(1).place(0), torch.device("cuda", 0), group, hosts, Link("nothing", 0.0, 0.0))


def engine_of(member: Member, folder: Path, **more: Any) -> Engine:
    config = EngineConfig.of(str(folder), **options_of(**more))
    opened = ModelFiles.read(config, folder).opened(config)
    _, loaded = TorchRunner(config, "cuda", our_kernels=False, member=member).load(opened, quiet())
    scheduler = Scheduler(PagePool(200), loaded.memory.limits)
    return engine_on(loaded.device, scheduler, loaded.facts, overlap=True)


def test_sums_within_graphs(alone_among_ranks: Member, folder: Path) -> None:
    engine = engine_of(alone_among_ranks, folder)
    device = engine.worker.device
    assert device.graphs is not None  # type: ignore[attr-defined]
    while device.capture_next():
        pass
    assert not device.graphs._given_up  # type: ignore[attr-defined]
    assert run(engine, mixed_requests(8)) == run(engine_for(folder, **options_of()), mixed_requests(8))


def crew_answers(folder: Path, devices: list[str]) -> dict[str, list[int]]:
    layout = Layout(len(devices))
    config = EngineConfig.of(str(folder), **options_of(tensor_parallel_size=len(devices)))
    opened = ModelFiles.read(config, folder).opened(config)
    crew = ranks.assemble(layout, devices, quiet())
    with crew.team:
        print(crew.member.link, crew.member.group.why_by_nccl if crew.member.group is not None else "")
        _, loaded = ranks.load_on(crew, config, folder, opened, quiet())
        engine = engine_on(loaded.device, Scheduler(PagePool(200), loaded.memory.limits), loaded.facts, overlap=True)
        while loaded.device.capture_next():
            pass
        return run(engine, mixed_requests(8))


def test_two_ranks_on_one_gpu(folder: Path) -> None:
    """By way of the host, which NCCL would refuse."""
    whole = engine_for(folder, **options_of())
    assert crew_answers(folder, ["cuda:0", "cuda:0"]) == run(whole, mixed_requests(8))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_gpu_for_each_rank(folder: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    whole = engine_for(folder, **options_of())
    assert crew_answers(folder, [f"cuda:{index}" for index in range(size)]) == run(whole, mixed_requests(8))


def test_pages_of_all_gpus_are_kept(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    folder = save_checkpoint(tmp_path, "qwen2", hidden_size=128, num_attention_heads=8, num_key_value_heads=4)
    few = options_of(num_gpu_blocks_override=10)
    engine, alone = engine_for(folder, tensor_parallel_size=2, host_cache="4MiB", **few), engine_for(folder, **few)
    keeper = engine.keeper
    assert keeper is not None
    for seed in (1, 2, 1, 2):
        assert greedy(engine, random_prompt(seed, 100), 6) == greedy(alone, random_prompt(seed, 100), 6)
        assert keeper.flush(60)
    assert keeper.counters["host"].num_pages_read > 0
    engine.worker.device.close()


def sizes_of(name: str) -> dict[str, Any]:
    """Such that a share goes by the kernels of our own."""
    overrides = CHECKPOINTS[name][1]
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    if "kv_lora_rank" in overrides:
        sizes["num_key_value_heads"] = 8
    elif "head_dim" in overrides:
        sizes["head_dim"] = 32
    if "moe_intermediate_size" in overrides:
        sizes["moe_intermediate_size"] = 128
    return {**overrides, **sizes}


@pytest.mark.parametrize(
    "name",
    [
        "biases", "phi3-window", "mistral-window", "qwen2", "qwen3", "gemma", "gemma2", "gemma3-linear", "mixtral",
        "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3", "gpt-oss",
    ],
)  # fmt: skip
def test_every_family_in_bfloat16(name: str, tmp_path: Path) -> None:
    """The log probability of each token that two ranks draw is that in float32, but for experts chosen otherwise. And
    it is drawn too where whole logits are not asked for."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    folder = save_checkpoint(tmp_path, CHECKPOINTS[name][0], **sizes_of(name))
    limits = {"kv_cache_memory": "64MiB", "max_num_seqs": 4, "max_model_len": 512, "enable_prefix_caching": False}
    engine = engine_for(folder, device="cuda", dtype="bfloat16", tensor_parallel_size=2, **limits)
    # Other numbers of rows go by other kernels, which take long to compile.
    prompts = {str(seed): random_prompt(seed, 100 + seed) for seed in range(4 if name == "qwen2" else 1)}
    told = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
    asked = [EngineRequest(request, prompt, told) for request, prompt in prompts.items()]
    outputs = {**collect(engine, asked[1:]), **collect(engine, asked[:1])}
    assert greedy(engine, prompts["0"], 12) == [token for part in outputs["0"] for token in part.token_ids]
    engine.worker.device.close()
    exact, errors = engine_for(folder), []
    for request, parts in outputs.items():
        tokens = [token for part in parts for token in part.token_ids]
        read = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (answer,) = collect(exact, [EngineRequest("read", [*prompts[request], *tokens], read)])["read"]
        right = (answer.prompt_logprobs or ())[-12:]
        ours = [row for part in parts for row in part.logprobs or ()]
        for one, other in zip(ours, right, strict=True):
            assert other is not None and one.token_ids[0] == other.token_ids[0]
            errors.append(abs(float(one.logprobs[0]) - float(other.logprobs[0])))
    print(f"{name}: off by {statistics.median(errors):.3f}, at most {max(errors):.3f}")
    assert statistics.median(errors) < 0.15


@pytest.mark.parametrize("size", [2, 4])
def test_in_bfloat16_by_the_flag(tmp_path: Path, size: int) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    folder = save_checkpoint(tmp_path, "llama", hidden_size=256, num_attention_heads=8, num_key_value_heads=4)
    engine = engine_for(folder, device="cuda", dtype="bfloat16", tensor_parallel_size=size, kv_cache_memory="64MiB")
    answer = greedy(engine, random_prompt(1, 100), 32)
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    many = [EngineRequest(str(index), random_prompt(1, 100), params) for index in range(4)]
    assert len(answer) == 32 and all(len(tokens) == 32 for tokens in run(engine, many).values())
