"""Vectors of prompts: against transformers' hidden states, in one batch with texts, in chunks, and when they fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ingle.engine.engine import Engine
from ingle.request import NO_TOKENS, EngineOutput, EngineRequest, Pooling, SamplingParams
from tests.engine.test_steps import Mailed
from tests.support import collect, engine_for, random_prompt, reference_model, restrict, run, save_checkpoint

KINDS = ("last", "mean", "cls", "logits")
TOKENS = (17, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_model(folder)


@pytest.fixture(params=["native", "torch", "torch-overlap", pytest.param("gpu", marks=pytest.mark.gpu)])
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    if request.param == "gpu":
        return engine_for(folder, device="cuda", kv_cache_memory="64MiB", block_size=8)
    kernels = "auto" if request.param == "native" else "torch"
    return engine_for(folder, cpu_kernels=kernels, block_size=8, overlap=request.param == "torch-overlap")


def asked(name: str, prompt: Sequence[int], kind: Any, **more: Any) -> EngineRequest:
    pooling = Pooling(kind=kind, token_ids=TOKENS if kind == "logits" else (), **{"normalize": False, **more})
    return EngineRequest(name, list(prompt), NO_TOKENS, pooling=pooling)


def vector(output: EngineOutput) -> npt.NDArray[np.float32]:
    assert output.finish_reason == "stop" and output.token_ids == [] and output.pooled is not None
    return np.frombuffer(output.pooled, "<f4")


@torch.inference_mode()
def expected(reference: Any, prompt: Sequence[int], kind: str) -> npt.NDArray[np.float32]:
    """As sentence-transformers pools what transformers computes."""
    ids = torch.tensor([list(prompt)])
    hidden = reference.model(ids).last_hidden_state[0]
    if kind == "logits":
        return reference.lm_head(hidden[-1])[list(TOKENS)].numpy()
    return {"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[kind].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_against_transformers(engine: Engine, reference: Any, kind: str) -> None:
    prompts = {str(length): random_prompt(length, length) for length in (1, 2, 9, 40)}
    outputs = collect(engine, [asked(name, prompt, kind) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        (output,) = outputs[name]
        np.testing.assert_allclose(vector(output), expected(reference, prompt, kind), rtol=2e-3, atol=2e-4)


def test_normalized_and_cut(engine: Engine, reference: Any) -> None:
    prompt = random_prompt(3, 12)
    (output,) = collect(engine, [asked("a", prompt, "last", normalize=True, dimensions=16)])["a"]
    whole = expected(reference, prompt, "last")[:16]
    np.testing.assert_allclose(vector(output), whole / np.linalg.norm(whole), rtol=2e-3, atol=2e-4)


def test_in_chunks_and_beside_texts(engine: Engine) -> None:
    """Batched with generation, through small steps, and by mail: the same as alone in one step."""
    prompts = [random_prompt(seed, 30 + seed) for seed in range(4)]
    wanted = [asked(f"{kind}-{i}", prompt, kind) for i, prompt in enumerate(prompts) for kind in KINDS]
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    texts = [EngineRequest(f"text-{i}", prompt, greedy) for i, prompt in enumerate(prompts)]
    alone = {request.id: vector(collect(engine, [request])[request.id][0]) for request in wanted}
    spoken = run(engine, texts)
    small = restrict(engine, num_pages=60, max_num_batched_tokens=16, max_num_seqs=8)
    small.worker = Mailed(small.worker.device)
    mixed = [request for pair in zip(wanted[: len(texts)], texts, strict=True) for request in pair]
    outputs = collect(small, [*mixed, *wanted[len(texts) :]])
    for request in wanted:
        np.testing.assert_allclose(vector(outputs[request.id][0]), alone[request.id], rtol=1e-4, atol=1e-5)
    assert {t.id: [token for o in outputs[t.id] for token in o.token_ids] for t in texts} == spoken


def test_the_prefix_cache(engine: Engine) -> None:
    """The last token's state needs no others; a mean needs all."""
    prompt = random_prompt(1, 33)
    first = {kind: collect(engine, [asked(kind, prompt, kind)])[kind][0] for kind in KINDS}
    again = {kind: collect(engine, [asked(kind, prompt, kind)])[kind][0] for kind in KINDS}
    assert {kind: output.num_cached_tokens for kind, output in again.items()} == {
        "last": 32, "mean": 0, "cls": 0, "logits": 32,
    }  # fmt: skip
    for kind in KINDS:
        np.testing.assert_allclose(vector(again[kind]), vector(first[kind]), rtol=1e-4, atol=1e-5)


def test_aborted_and_preempted(engine: Engine) -> None:
    small = restrict(engine, num_pages=12, max_num_batched_tokens=16, max_num_seqs=4)
    prompts = [random_prompt(seed, 40) for seed in range(3)]
    greedy = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    small.add(EngineRequest("text", prompts[0], greedy))
    for name in ("gone", "kept"):
        small.add(asked(name, prompts[1], "mean"))
    small.step()
    small.abort("gone")
    outputs: list[EngineOutput] = []
    while small.has_work:
        outputs += small.step()
    small.scheduler.check()
    (kept,) = [output for output in outputs if output.id == "kept"]
    assert not [output for output in outputs if output.id == "gone"]
    alone = collect(small, [asked("kept", prompts[1], "mean")])["kept"][0]
    np.testing.assert_allclose(vector(kept), vector(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_fails_alone(folder: Path, kind: str) -> None:
    engine = engine_for(folder, cpu_kernels="torch", block_size=8)
    good, bad = random_prompt(1, 20), random_prompt(2, 20)
    weight = engine.worker.device.model.embedding.rows  # type: ignore[attr-defined]

    def rows(ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = weight(ids)
        return torch.where((ids == 255).unsqueeze(1), torch.nan, found)

    object.__setattr__(engine.worker.device.model, "embed", rows)  # type: ignore[attr-defined]
    bad[10], good = 255, [token if token != 255 else 7 for token in good]
    outputs = collect(engine, [asked("good", good, kind), asked("bad", bad, kind)])
    assert outputs["bad"][0].finish_reason == "error" and "NaN" in (outputs["bad"][0].error or "")
    vector(outputs["good"][0])
    vector(collect(engine, [asked("later", good, kind)])["later"][0])
