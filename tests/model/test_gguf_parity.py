"""GGUF files of each architecture against transformers on the checkpoint that they were made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ingle.engine import torch_build
from tests.support import engine_for, engine_logits, greedy, random_prompt, reference_greedy, reference_model
from tests.support import save_checkpoint as save
from tests.weights.gguf_models import write_gguf_model

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3}),
    "qwen2moe": (
        "qwen2_moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
         "shared_expert_intermediate_size": 48},
    ),
    "qwen3moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 30, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0, "num_hidden_layers": 3},
    ),
    "gemma2-defaults": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 40}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 30, "num_hidden_layers": 7},
    ),
    "gemma3-linear": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 30, "num_hidden_layers": 6,
         "final_logit_softcapping": 4.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "gpt-oss": (
        "gpt_oss",
        {"head_dim": 16, "sliding_window": 20, "num_local_experts": 6, "num_experts_per_tok": 3,
         "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "truncate": False,
                             "original_max_position_embeddings": 128}},
    ),
    "phi3": ("phi3", {}),
    "phi3-window": ("phi3", {"sliding_window": 40, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "phi3-partial": ("phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * i for i in range(8)]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_gguf_equals_the_checkpoint_in_transformers(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    save(tmp_path, model_type, **overrides)
    reference = reference_model(tmp_path)
    engine = engine_for(write_gguf_model(tmp_path, tmp_path / "model.gguf"), block_size=8)
    prompt = random_prompt(1, 150)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1"])
def test_quantized_gguf_equals_its_decoded_self_in_transformers(kind: str, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    save(tmp_path, "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=30, intermediate_size=128)
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", stored)
    tensors = load_file(tmp_path / "model.safetensors")
    decoded = {name: _rounded(values, stored) for name, values in tensors.items()}
    save_file(decoded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt = random_prompt(1, 100)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine_for(path), prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_that_stay_blocks_equal_their_decoded_selves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PyTorch's device, as on a GPU: embedding and head of one matrix too."""
    save(tmp_path, "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=30, intermediate_size=128)
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind])
    prompt, options = random_prompt(1, 100), {"cpu_kernels": "torch", "dtype": "float32"}
    expected = engine_logits(engine_for(path, **options), prompt)
    monkeypatch.setattr(torch_build.TorchRunner, "_keeps_blocks", lambda *_: True)
    engine = engine_for(path, **options)
    assert engine.facts.weights.total[1] < 1.4 * engine.facts.weights.total[0], "bytes a number"
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stacks", [True, False])
def test_experts_that_stay_blocks_equal_their_decoded_selves(
    stacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "mixtral", intermediate_size=96, num_local_experts=4)
    stored = gguf.GGMLQuantizationType.Q5_0
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", stored, stacks_experts=stacks)
    prompt, options = random_prompt(1, 60), {"cpu_kernels": "torch", "dtype": "float32"}
    expected = engine_logits(engine_for(path, **options), prompt)
    monkeypatch.setattr(torch_build.TorchRunner, "_keeps_blocks", lambda *_: True)
    engine = engine_for(path, **options)
    assert engine.facts.weights.mixture is not None
    assert engine.facts.weights.mixture.num_bytes == engine.facts.weights.mixture.num_parameters * 5.5 / 8
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)


def test_quantized_experts_equal_their_decoded_selves(tmp_path: Path) -> None:
    """Every expert of a stack is decoded to its own place."""
    stored = gguf.GGMLQuantizationType.Q8_0
    save(tmp_path, "mixtral", intermediate_size=96, num_local_experts=4)
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", stored)
    tensors = load_file(tmp_path / "model.safetensors")
    decoded = {
        name: values if name.endswith("moe.gate.weight") else _rounded(values, stored)
        for name, values in tensors.items()
    }
    save_file(decoded, tmp_path / "model.safetensors", metadata={"format": "pt"})
    prompt = random_prompt(1, 100)
    with torch.inference_mode():
        expected = reference_model(tmp_path)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine_for(path), prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_experts_in_tensors_of_their_own_equal_those_in_one(kind: str, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    save(tmp_path, "mixtral", intermediate_size=96, num_local_experts=4)
    one = write_gguf_model(tmp_path, tmp_path / "one.gguf", stored)
    many = write_gguf_model(tmp_path, tmp_path / "many.gguf", stored, stacks_experts=False)
    prompt = random_prompt(1, 60)
    assert torch.equal(engine_logits(engine_for(one), prompt), engine_logits(engine_for(many), prompt))


def _rounded(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    return gguf.dequantize(gguf.quantize(values, kind), kind) if values.ndim == 2 else values


def test_split_gguf_equals_the_whole(tmp_path: Path) -> None:
    save(tmp_path)
    whole = write_gguf_model(tmp_path, tmp_path / "model.gguf")
    first = write_gguf_model(tmp_path, tmp_path / "parts.gguf", max_part_tensors=7)
    assert len(list(tmp_path.glob("parts-*.gguf"))) > 2
    prompt = random_prompt(2, 40)
    assert torch.equal(engine_logits(engine_for(whole), prompt), engine_logits(engine_for(first), prompt))
