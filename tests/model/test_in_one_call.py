"""All layers in one call of the CPU's kernels give what the decoder's own loop gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ingle.kernels.cpu import compile, library
from ingle.model.decoder import Decoder
from ingle.request import EngineRequest, SamplingParams
from tests.model.checkpoints import CHECKPOINTS
from tests.support import engine_for, engine_logits, random_prompt, run, save_checkpoint

NAMES = ["gqa", "odd-heads", "biases", "qwen2", "qwen3", "gemma2", "gemma3"]


@pytest.fixture(autouse=True, params=[None, "-march=x86-64-v3"], ids=str)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_same_numbers(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    engine = engine_for(folder, dtype="bfloat16", enable_prefix_caching=False)
    decoder = engine.worker.model
    assert isinstance(decoder, Decoder) and decoder.one_call is not None
    prompt = random_prompt(5, 60)
    ours = engine_logits(engine, prompt)
    engine.worker.model = dataclasses.replace(decoder, one_call=None)
    torch.testing.assert_close(engine_logits(engine, prompt), ours, atol=1e-6, rtol=1e-6)


def test_what_the_kernels_do_not_know_goes_through_the_loop(tmp_path: Path) -> None:
    for name in ("deepseek-v3", "qwen2-moe-dense-between"):
        model_type, overrides = CHECKPOINTS[name]
        engine = engine_for(save_checkpoint(tmp_path / name, model_type, **overrides), dtype="bfloat16")
        assert isinstance(engine.worker.model, Decoder) and engine.worker.model.one_call is None
        assert torch.isfinite(engine_logits(engine, random_prompt(6, 30))).all()


def test_batched_equals_alone(tmp_path: Path) -> None:
    """Packed weights too: a token's scale is its own, and its sums are in one order whatever the batch."""
    engine = engine_for(save_checkpoint(tmp_path), dtype="bfloat16", enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = {str(i): random_prompt(i, 3 + 17 * i) for i in range(6)}
    together = run(engine, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        assert run(engine, [EngineRequest("alone", prompt, params)])["alone"] == together[name]
