"""Whole decoders by the GPU kernels in Triton's interpreter: what no test of a single kernel sees.

On a GPU the same is tested by `tests/engine/test_gpu_engine.py`, with graphs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ingle import kernels
from ingle.kernels import gpu
from ingle.request import EngineRequest, SamplingParams
from tests.model.test_parity import CHECKPOINTS
from tests.support import engine_for, engine_logits, random_prompt, restrict, run, save_checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in the interpreter")


@pytest.mark.parametrize("name", ["qwen2-moe-dense-between", "deepseek-v3"])
def test_gpu_kernels_give_the_same_logits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_type, overrides = CHECKPOINTS[name]
    engine = engine_for(
        save_checkpoint(tmp_path, model_type, **overrides), enable_prefix_caching=False, cpu_kernels="torch"
    )
    prompt = random_prompt(4, 20)
    expected = engine_logits(engine, prompt)
    monkeypatch.setattr(kernels, "of", lambda x: gpu)
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)


def test_latents_in_chunks_and_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in pieces, and decodes beside them: the tokens are those of plain PyTorch."""
    model_type, overrides = CHECKPOINTS["deepseek-v2-lite"]
    engine = engine_for(save_checkpoint(tmp_path, model_type, **overrides), block_size=8, cpu_kernels="torch")
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    requests = [EngineRequest(str(length), random_prompt(length, length), params) for length in (3, 21, 9)]
    expected = run(engine, requests)
    monkeypatch.setattr(kernels, "of", lambda x: gpu)
    assert run(restrict(engine, num_pages=20, max_num_batched_tokens=12, max_num_seqs=2), requests) == expected
