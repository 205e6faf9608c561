"""The engine on a GPU: kernels, CUDA graphs and overlap change nothing in what a request gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.engine.engine import Engine
from ingle.kernels.gpu import few_rows, vector
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from tests.engine.test_engine import mixed_requests, run_at_random_moments
from tests.engine.test_steps import Alternating
from tests.model.checkpoints import CHECKPOINTS, DEEPSEEK
from tests.support import (
    collect,
    engine_for,
    engine_logits,
    expect_short_answers,
    random_prompt,
    reference_model,
    run,
    save_checkpoint,
)

pytestmark = pytest.mark.gpu


def gpu_engine(folder: Path, **options: Any) -> Engine:
    return engine_for(
        folder, **{"device": "cuda", "kv_cache_memory": "64MiB", "max_num_batched_tokens": 256, **options}
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    """float32 to 1e-4; bfloat16, whose products carry 8 bits, to 3 % of the logits' norm, where the same experts run.

    Rounded scores of experts may change their order: then a token, and later ones through attention, differ by more.
    """
    model_type, overrides = CHECKPOINTS[name]
    save_checkpoint(tmp_path, model_type, **overrides)
    prompt = random_prompt(1, 150)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(torch.tensor([prompt])).logits[0]
    engines = [gpu_engine(tmp_path, dtype=dtype, enforce_eager=True) for dtype in ("float32", "bfloat16")]
    exact, rounded = (engine_logits(engine, prompt).float().cpu() for engine in engines)
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=0)
    errors = (rounded - expected).norm(dim=1) / expected.norm(dim=1)
    if engines[0].worker.device.model.config.moe is not None:
        errors = errors.sort().values[: int(0.85 * len(errors))]
    assert errors.square().mean().sqrt() < 0.03


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    # All experts for every token: no choice among them for rounding to change.
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 4})],
)
@pytest.mark.parametrize("num_tokens", [1, 2, 13])
def test_few_rows_equal_transformers(
    model_type: str, overrides: dict[str, Any], num_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a few rows have kernels of their own on some GPUs: bfloat16, to 3 % of the logits' norm."""
    save_checkpoint(tmp_path, model_type, hidden_size=256, head_dim=64, **overrides)
    prompt = random_prompt(1, num_tokens)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(torch.tensor([prompt])).logits[0]
    engine = gpu_engine(tmp_path, dtype="bfloat16", enforce_eager=True)
    launched = []
    for kernels in (vector, few_rows):
        real = kernels.project_and_store
        monkeypatch.setattr(
            kernels, "project_and_store", lambda *args, k=kernels, r=real: launched.append(k) or r(*args)
        )
    ours = engine_logits(engine, prompt).float().cpu()
    assert (ours - expected).norm() < 0.03 * expected.norm()
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    assert set(launched) == ({vector} if num_tokens <= 2 else {few_rows} if hopper else set())


TINY = {
    "dense": ("llama", {}),
    "experts": ("qwen2_moe", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 48,
                              "shared_expert_intermediate_size": 64}),
    "latents": ("deepseek_v2", {**DEEPSEEK, "num_key_value_heads": 8, "q_lora_rank": 24, "first_k_dense_replace": 1}),
}  # fmt: skip


@pytest.fixture(scope="module", params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, overrides = TINY[request.param]
    return save_checkpoint(
        tmp_path_factory.mktemp("tiny"), model_type, hidden_size=128, num_attention_heads=8, **overrides
    )


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("eager", [False, True])
def test_batched_equals_alone(folder: Path, overlap: bool, eager: bool) -> None:
    """float32: 64 requests at random moments, few pages, small steps, against each alone without graphs or overlap."""
    requests = mixed_requests(64)
    plain = gpu_engine(folder, enforce_eager=True, overlap=False, enable_prefix_caching=False, block_size=8)
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= run(plain, [request])
    tight = gpu_engine(folder, enforce_eager=eager, overlap=overlap, block_size=8, num_gpu_blocks_override=21,
                       max_num_batched_tokens=24, max_num_seqs=12)  # fmt: skip
    expect_short_answers(tight.scheduler)
    assert run_at_random_moments(tight, requests) == alone
    assert tight.scheduler.num_preemptions > 0


def everything(count: int) -> list[EngineRequest]:
    """`mixed_requests`, two of three with log probabilities of various sizes."""
    return [
        msgspec.structs.replace(r, sampling=msgspec.structs.replace(r.sampling, logprobs=(None, 2, 7)[i % 3]))
        for i, r in enumerate(mixed_requests(count))
    ]


def test_whatever_is_asked_of_sampling_is_in_the_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the tokens and log probabilities of each request alone, without graphs."""
    requests = everything(48)
    plain = gpu_engine(folder, enforce_eager=True, overlap=False, enable_prefix_caching=False)
    alone: dict[str, list[EngineOutput]] = {}
    for request in requests:
        alone |= collect(plain, [request])
    engine = gpu_engine(folder, max_num_seqs=12)
    assert isinstance(engine.worker.device, TorchDevice) and engine.worker.device.graphs is not None
    monkeypatch.setattr(engine.worker.device.tables, "batch_of", lambda step: pytest.fail("a step left the graph"))
    together = collect(engine, requests)
    for name, outputs in alone.items():
        assert [t for o in together[name] for t in o.token_ids] == [t for o in outputs for t in o.token_ids]
        ours, theirs = ([e for o in parts for e in o.logprobs or ()] for parts in (together[name], outputs))
        assert [(e.token_ids[0], e.rank, len(e.logprobs)) for e in ours] == [
            (e.token_ids[0], e.rank, len(e.logprobs)) for e in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_masks_come_between_two_graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = everything(16)
    eager, engine = gpu_engine(folder, enforce_eager=True), gpu_engine(folder)
    assert isinstance(engine.worker.device, TorchDevice)
    monkeypatch.setattr(engine.worker.device.tables, "batch_of", lambda step: pytest.fail("a step left the graph"))
    answers = []
    for each in (eager, engine):
        masks = {r.id: Alternating() for r in requests[::2]}
        for request in requests:
            each.add(request, masks.get(request.id))
        tokens: dict[str, list[int]] = {r.id: [] for r in requests}
        while each.has_work:
            for output in each.step():
                tokens[output.id] += output.token_ids
        assert all(masks[name].taken == tokens[name] for name in masks)
        answers.append(tokens)
    assert answers[0] == answers[1]


def test_long_contexts_split_over_many_programs(folder: Path) -> None:
    """One sequence alone is split far more than in a batch, and must decode to the same tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    requests = [EngineRequest(str(i), random_prompt(i, 400 + i), params) for i in range(12)]
    engine = gpu_engine(folder, enable_prefix_caching=False, max_num_batched_tokens=512)
    alone: dict[str, list[int]] = {}
    for request in requests:
        alone |= run(engine, [request])
    assert run(engine, requests) == alone


@contextmanager
def no_more_memory() -> Iterator[None]:
    """The process gets no more of the GPU's memory than it has; others, which share the GPU, do not notice."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(
        torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_memory_that_runs_out_in_a_step_costs_requests_and_not_the_engine(
    enforce_eager: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Steps of 4,096 tokens take some megabytes, of which there are none."""
    save_checkpoint(tmp_path, hidden_size=512, intermediate_size=4096, max_position_embeddings=8192)
    options = {"max_num_batched_tokens": 4096, "enable_prefix_caching": False, "enforce_eager": enforce_eager}
    engine = gpu_engine(tmp_path, dtype="bfloat16", **options)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    requests = [EngineRequest(str(i), random_prompt(i, 4000), params) for i in range(3)]
    with no_more_memory():
        for parts in collect(engine, requests).values():
            assert parts[-1].finish_reason == "length" or "not enough memory" in (parts[-1].error or "")
    assert "memory ran out in a step" in caplog.text
    assert all(len(tokens) == 4 for tokens in run(engine, requests).values())


def test_graphs_that_do_not_fit_memory_are_given_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_checkpoint(tmp_path, hidden_size=512, intermediate_size=4096, max_position_embeddings=8192)
    options = {"max_num_batched_tokens": 4096, "dtype": "float32", "enable_prefix_caching": False}
    engine = gpu_engine(tmp_path, **options)
    with no_more_memory():
        while engine.worker.device.capture_next():
            pass
    assert "could not be captured" in caplog.text
    params = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    requests = [EngineRequest(str(i), random_prompt(i, 100 + i), params) for i in range(8)]
    assert run(engine, requests) == run(gpu_engine(tmp_path, **options, enforce_eager=True), requests)
