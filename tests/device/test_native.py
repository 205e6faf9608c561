"""A decoder without PyTorch gives what `Decoder` gives with the same packed weights."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.engine import Engine
from ingle.engine.pages import PagePool
from ingle.engine.scheduler import Scheduler
from ingle.kernels.cpu import compile, library
from ingle.model.decoder import Decoder
from ingle.model.load import load_decoder
from ingle.model.rope import cos_sin_tables
from ingle.request import EngineRequest, SamplingParams
from ingle.weights.packed import PackedFormat
from ingle.weights.source import open_source
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, engine_for, engine_logits, engine_on, random_prompt, run, save_checkpoint

NAMES = ["two-wide-heads", "gqa", "odd-heads", "biases", "qwen2", "qwen3", "gemma2", "gemma3"]
MIXTURES = ["mixtral", "qwen2-moe", "qwen2-moe-normed", "qwen2-moe-dense-between", "qwen3-moe", "qwen3-moe-one-expert"]


@pytest.fixture(autouse=True, params=[None, "x86-64-v3"], ids=str)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """As compiled for this processor, and for one without AVX-512."""
    if request.param is not None and not torch.cpu.get_capabilities().get("avx2", False):
        pytest.skip("needs avx2")
    try:
        loaded = library.load(str(compile.library(request.param)))
    except compile.CompileError as error:
        pytest.skip(str(error))
    loaded.ingle_start(2)
    before, library._loaded = library._loaded, loaded
    yield
    library._loaded = before


def both(folder: Path, **options: Any) -> tuple[Engine, Engine]:
    """The engine that runs without PyTorch, and one of PyTorch with the same weights, types and limits."""
    host = engine_for(folder, dtype="bfloat16", **options)
    assert isinstance(host.worker.device, NativeDevice)
    model, limits, num_pages = host.worker.device.model, host.scheduler.limits, host.scheduler.pages.num_pages
    source, cpu = open_source(folder, "auto", 0), torch.device("cpu")
    decoder = load_decoder(
        model.config,
        source,
        matrices=PackedFormat(),
        dtype=torch.float32,
        device=cpu,
        max_model_len=model.max_model_len,
    )
    # NumPy's cosines and PyTorch's differ in their last place, which would move roundings of the keys.
    decoder = dataclasses.replace(decoder, cos_sin=tuple(map(torch.from_numpy, model.cos_sin)))
    device = TorchDevice(decoder, limits, num_pages, cpu, torch.bfloat16, own_threads=True)
    return host, engine_on(device, Scheduler(PagePool(num_pages), limits), host.facts)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    host, torchs = both(save_checkpoint(tmp_path, model_type, **overrides))
    prompt = random_prompt(5, 60)
    torch.testing.assert_close(engine_logits(host, prompt), engine_logits(torchs, prompt), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_the_same_numbers_of_mixtures(name: str, tmp_path: Path) -> None:
    """But for the order in which a token's experts are added up, which moves a rounding here and there."""
    model_type, overrides = CHECKPOINTS[name]
    host, torchs = both(save_checkpoint(tmp_path, model_type, **overrides))
    assert host.worker.device.model.mixture == torchs.worker.device.model.mixture is not None
    prompt = random_prompt(5, 60)
    expected = engine_logits(torchs, prompt)
    assert (engine_logits(host, prompt) - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["gqa", "gemma3"])
def test_rotations(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    host = engine_for(save_checkpoint(tmp_path, model_type, **overrides), dtype="bfloat16").worker.device.model
    for ours, theirs in zip(host.cos_sin, cos_sin_tables(host.config, host.max_model_len, torch), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-4, rtol=0)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.8, "presence_penalty": 0.5, "frequency_penalty": -0.4},
    {"temperature": 0.0, "logit_bias": {7: 4.0, 9: -100.0}},
    {"temperature": 0.0, "min_tokens": 9, "stop_token_ids": tuple(range(0, 250))},
    {"temperature": 0.0, "logprobs": 4, "prompt_logprobs": 2},
    {"temperature": 0.0, "logprobs": 0},
]


@pytest.mark.parametrize("params", SAMPLING, ids=str)
def test_the_same_answers(params: dict[str, Any], tmp_path: Path) -> None:
    engines = both(save_checkpoint(tmp_path), max_num_batched_tokens=32, max_num_seqs=4)
    prompts = [random_prompt(i, 3 + 17 * i) for i in range(5)]
    sampling = SamplingParams(max_tokens=12, **params)
    answers = [
        collect(engine, [EngineRequest(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
        for engine in engines
    ]
    for ours, theirs in zip(answers[0].values(), answers[1].values(), strict=True):
        assert [output.token_ids for output in ours] == [output.token_ids for output in theirs]
        assert [output.finish_reason for output in ours] == [output.finish_reason for output in theirs]
        assert_logprobs_are_close([output.logprobs for output in ours], [output.logprobs for output in theirs])
        assert_logprobs_are_close(
            [output.prompt_logprobs for output in ours], [output.prompt_logprobs for output in theirs]
        )


def assert_logprobs_are_close(ours: list[Any], theirs: list[Any]) -> None:
    for some, others in zip(ours, theirs, strict=True):
        assert (some is None) == (others is None)
        for mine, other in zip(some or (), others or (), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                assert mine.token_ids == other.token_ids and mine.rank == other.rank
                np.testing.assert_allclose(mine.logprobs, other.logprobs, atol=1e-5)


def test_a_request_that_meets_nan_fails_alone(tmp_path: Path) -> None:
    engine = engine_for(save_checkpoint(tmp_path), dtype="bfloat16")
    assert isinstance(engine.worker.device, NativeDevice)
    embedding = engine.worker.device.model.embedding
    rows = embedding.rows

    def with_nan(indices: np.ndarray) -> np.ndarray:
        found = rows(indices)
        found[indices == 250] = np.nan
        return found

    object.__setattr__(embedding, "rows", with_nan)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=8, ignore_eos=True, logprobs=2)
    good = [token for token in random_prompt(1, 40) if token != 250]
    outputs = collect(engine, [EngineRequest("bad", [5, 250, 6], params), EngineRequest("good", good, params)])
    assert outputs["bad"][-1].finish_reason == "error"
    assert outputs["good"][-1].finish_reason == "length"


def test_what_the_kernels_do_not_know_is_pytorchs(tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS["deepseek-v3"]
    engine = engine_for(save_checkpoint(tmp_path, model_type, **overrides), dtype="bfloat16")
    assert isinstance(engine.worker.device, TorchDevice) and isinstance(engine.worker.device.model, Decoder)
    assert torch.isfinite(engine_logits(engine, random_prompt(6, 30))).all()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["gqa", "qwen2-moe"])
def test_batched_equals_alone(name: str, overlap: bool, tmp_path: Path) -> None:
    """Packed weights too: a token's scale is its own, and its sums are in one order whatever the batch."""
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    engine = engine_for(folder, dtype="bfloat16", enable_prefix_caching=False, overlap=overlap)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = {str(i): random_prompt(i, 3 + 17 * i) for i in range(6)}
    together = run(engine, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert run(engine, [EngineRequest("alone", prompt, params)])["alone"] == together[name]


SCRIPT = """
import pathlib, sys
from ingle.config import EngineConfig
from ingle.engine import process
from ingle.request import EngineRequest, SamplingParams

engine, info = process.build_engine(EngineConfig(sys.argv[1], device="cpu"), pathlib.Path(sys.argv[1]))
params = SamplingParams(temperature=0.5, top_p=0.9, max_tokens=3, logprobs=2, repetition_penalty=1.1)
engine.add(EngineRequest("a", [5, 6, 7], params))
while engine.has_work:
    engine.step()
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_nothing_imports_torch(kind: str, tmp_path: Path, smollm2_gguf: Path) -> None:
    """A start is as long as its imports."""
    path = smollm2_gguf if kind == "gguf" else save_checkpoint(tmp_path)
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True)
