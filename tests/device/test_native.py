"""A decoder without PyTorch gives what `Decoder` gives by PyTorch's operators with the same weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.device.native.device import NativeDevice
from ingle.device.torch.device import TorchDevice
from ingle.engine.engine import Engine
from ingle.kernels.cpu import compile, library
from ingle.model.rope import cos_sin_tables
from ingle.request import EngineRequest, SamplingParams
from tests.model import qwen1
from tests.model.checkpoints import CHECKPOINTS
from tests.support import collect, engine_for, engine_logits, random_prompt, run, save_checkpoint

NAMES = ["two-wide-heads", "gqa", "odd-heads", "biases", "qwen2", "qwen3", "gemma2", "gemma3"]
MIXTURES = ["mixtral", "qwen2-moe", "qwen2-moe-normed", "qwen2-moe-dense-between", "qwen3-moe", "qwen3-moe-one-expert"]
LATENT = ["deepseek-v2", "deepseek-v2-lite", "deepseek-v2-wide-values", "deepseek-v2-groups", "deepseek-v3-halves"]


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
    """The engine that runs without PyTorch, and PyTorch's with the same weights."""
    native, torchs = engine_for(folder, **options), engine_for(folder, cpu_kernels="torch", **options)
    assert isinstance(native.worker.device, NativeDevice) and isinstance(torchs.worker.device, TorchDevice)
    return native, torchs


@pytest.mark.parametrize("name", [*NAMES, *MIXTURES, *LATENT])
def test_the_same_numbers(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    native, torchs = both(save_checkpoint(tmp_path, model_type, **overrides))
    assert native.facts.kv.dtype == torchs.facts.kv.dtype == "float32"
    prompt = random_prompt(5, 60)
    torch.testing.assert_close(engine_logits(native, prompt), engine_logits(torchs, prompt), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, *MIXTURES, *LATENT])
def test_16_bits_are_near(name: str, tmp_path: Path) -> None:
    """Of weights that 16 bits hold exactly; what is rounded are keys and values, and where the processor multiplies
    bfloat16, activations. Of a mixture some tokens then choose other experts."""
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    file = folder / "model.safetensors"
    rounded = {
        name: tensor.bfloat16().float() if tensor.dim() > 1 else tensor for name, tensor in load_file(file).items()
    }
    save_file(rounded, file, {"format": "pt"})
    native = engine_for(folder, dtype="float16")
    assert isinstance(native.worker.device, NativeDevice) and native.worker.device.kv.spec.dtype == "float16"
    prompt = random_prompt(5, 60)
    expected = engine_logits(engine_for(folder, cpu_kernels="torch"), prompt)
    difference = (engine_logits(native, prompt) - expected).norm(dim=1) / expected.norm(dim=1)
    assert difference.median() < (0.03 if library.factors(library.Matrix(bits=16)) == "bfloat16" else 3e-3)


@pytest.mark.parametrize("length", [64, 256])
def test_the_first_qwens_query_factors(length: int, tmp_path: Path) -> None:
    """They are above 1 beyond the 64 tokens of its training."""
    native, torchs = both(qwen1.save_checkpoint(tmp_path), max_model_len=length)
    assert (native.worker.device.model.query_factors is None) == (length == 64)
    prompt = random_prompt(5, length - 4)
    torch.testing.assert_close(engine_logits(native, prompt), engine_logits(torchs, prompt), atol=2e-5, rtol=1e-5)


def test_a_latent_is_all_that_is_cached(tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS["deepseek-v3"]
    device = engine_for(save_checkpoint(tmp_path, model_type, **overrides), block_size=16).worker.device
    assert device.kv.data.shape[1] == 1 and device.kv.data.shape[3] == 16 * (32 + 8) * 4


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3"])
def test_sizes_are_pytorchs(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    native, torchs = both(save_checkpoint(tmp_path, model_type, **overrides))
    ours, theirs = native.facts.weights, torchs.facts.weights
    assert ours.total[0] == theirs.total[0] and ours.head[0] == theirs.head[0] and ours.looked_up == theirs.looked_up
    assert ours.mixture is not None and theirs.mixture is not None
    assert ours.mixture.num_parameters == theirs.mixture.num_parameters


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


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["gqa", "qwen2-moe", "deepseek-v3"])
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


@pytest.mark.parametrize("name", ["two-wide-heads", "qwen2-moe", "deepseek-v3"])
def test_a_draw_needs_only_its_own_token(name: str, tmp_path: Path) -> None:
    """The last layer of a prompt's other tokens is computed where somebody asks for what it gives, and not else."""
    model_type, overrides = CHECKPOINTS[name]
    engine = engine_for(save_checkpoint(tmp_path, model_type, **overrides), enable_prefix_caching=False)
    assert isinstance(engine.worker.device, NativeDevice)
    forward, rows = engine.worker.device.model.forward, []

    def counted(*arguments: Any) -> np.ndarray:
        rows.append(len(found := forward(*arguments)))
        return found

    object.__setattr__(engine.worker.device.model, "forward", counted)
    prompts = {"a": random_prompt(1, 33), "b": random_prompt(2, 20)}
    answers = {}
    for asked, wanted in ((None, [2, 2]), (1, [53, 2])):
        params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, logprobs=3, prompt_logprobs=asked)
        outputs = collect(engine, [EngineRequest(key, prompt, params) for key, prompt in prompts.items()])
        assert rows == wanted
        rows.clear()
        given = [each.logprobs for of in outputs.values() for each in of]
        assert None not in given
        answers[asked] = [token for tokens in given for token in tokens or ()]
    for apart, beside in zip(*answers.values(), strict=True):
        assert apart.token_ids == beside.token_ids
        assert apart.logprobs == pytest.approx(beside.logprobs, abs=1e-4)


SCRIPT = """
import pathlib, sys
from ingle.config import EngineConfig
from ingle.engine import process
from ingle.request import EngineRequest, SamplingParams

engine, info = process.build_engine(EngineConfig.of(sys.argv[1], device="cpu"), pathlib.Path(sys.argv[1]))
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
