"""GGUF files whose blocks stay blocks on a GPU give what their decoded selves give: all types, mixtures too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.engine import torch_build
from ingle.weights.code_types import BITS_ON_GPU
from ingle.weights.experts import CodedExperts
from ingle.weights.gguf_coded import TYPES
from tests.support import engine_for, engine_logits, greedy, random_prompt, save_checkpoint
from tests.weights.gguf_models import write_gguf_model

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window": 30},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
PAIRS = list(zip(list(TYPES)[::2], list(TYPES)[1::2], strict=True))
"""Kernels for each type are compiled, which takes most of the time: so there are many small tests."""
CASES = [
    (("qwen2", "gemma3_text")[index % 2], dtype, types)
    for index, types in enumerate(PAIRS)
    for dtype in ("bfloat16", "float16")
] + [
    (("qwen3_moe", "mixtral")[index % 2], ("bfloat16", "float16")[index // 2 % 2], types)
    for index, types in enumerate(PAIRS)
]
PROMPTS = [random_prompt(3, length) for length in (1, 2, 9, 40, 300)]


def written(tmp_path: Path, family: str, types: Sequence[str], **sizes: int) -> Path:
    """With matrices of these types in turn."""
    save_checkpoint(tmp_path, family, **SIZES | MODELS[family] | sizes)
    return write_gguf_model(tmp_path, tmp_path / "model.gguf", random_types=types)


def off(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.float().cpu() - exact).norm() / exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "dtype", "types"), CASES, ids=str)
def test_on_a_gpu(
    tmp_path: Path, family: str, dtype: str, types: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, family, types)
    options = {"dtype": dtype, "device": "cuda", "enable_prefix_caching": False}
    floats = engine_for(path, enable_prefix_caching=False)
    exact = [engine_logits(floats, prompt) for prompt in PROMPTS]
    ours = engine_for(path, **options)
    assert isinstance(ours.worker.device, TorchDevice)
    logits = [engine_logits(ours, prompt) for prompt in PROMPTS]
    assert len(greedy(ours, PROMPTS[2], 16)) == 16
    monkeypatch.setattr(torch_build.TorchRunner, "_keeps_blocks", lambda *_: False)
    decoded = engine_for(path, **options)
    for prompt, found, right in zip(PROMPTS, logits, exact, strict=True):
        assert off(found, right) < 1.5 * off(engine_logits(decoded, prompt), right) + 0.01


@pytest.mark.slow
def test_all_are_held_in_their_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's device, whatever the device: the same logits, and as much memory as was planned."""
    path = written(tmp_path, "qwen3_moe", list(TYPES), num_hidden_layers=4)
    options = {"cpu_kernels": "torch", "dtype": "float32"}
    expected = engine_logits(engine_for(path, **options), PROMPTS[2])
    monkeypatch.setattr(torch_build.TorchRunner, "_keeps_blocks", lambda *_: True)
    engine = engine_for(path, **options)
    torch.testing.assert_close(engine_logits(engine, PROMPTS[2]), expected, atol=1e-4, rtol=0)
    device = engine.worker.device
    assert isinstance(device, TorchDevice)
    assert all(isinstance(layer.mlp.experts, CodedExperts) for layer in device.model.layers)
    assert set(BITS_ON_GPU) == set(TYPES)
