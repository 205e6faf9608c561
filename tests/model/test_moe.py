"""Mixtures of experts: the ways their weights are stored, and configurations that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.errors import ModelError
from ingle.kernels.cpu import library
from ingle.model.registry import decoder_config
from ingle.request import EngineRequest, SamplingParams
from tests.model.test_parity import CHECKPOINTS
from tests.support import (
    engine_for,
    engine_logits,
    random_prompt,
    reference_greedy,
    reference_model,
    restrict,
    run,
    save_checkpoint,
)
from tests.weights.gguf_models import write_gguf_model

QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 100, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "max_position_embeddings": 64, **QWEN3_MOE,
}  # fmt: skip


def fused(experts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gate_up = torch.cat((experts["gate_proj"], experts["up_proj"]), dim=1)
    return {"gate_up_proj": gate_up, "down_proj": experts["down_proj"]}


def stacked(experts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": tensor for name, tensor in experts.items()}


@pytest.mark.parametrize("form", [fused, stacked])
def test_experts_in_one_tensor_load_like_one_by_one(tmp_path: Path, form: Any) -> None:
    folder = save_checkpoint(tmp_path, "qwen3_moe", **QWEN3_MOE)
    prompt = random_prompt(3, 40)
    expected = engine_logits(engine_for(folder), prompt)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = {
            name: torch.stack([tensors.pop(f"{prefix}.{expert}.{name}.weight") for expert in range(6)])
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        tensors |= {f"{prefix}.{name}": tensor.contiguous() for name, tensor in form(experts).items()}
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(engine_logits(engine_for(folder), prompt), expected)


def test_cpu_kernels_multiply_experts_as_the_file_stores_them(tmp_path: Path) -> None:
    """All experts for every token: no choice among them for rounding to change."""
    failure = library.start(2)
    if failure is not None:
        pytest.skip(failure)
    folder = save_checkpoint(tmp_path, "mixtral", intermediate_size=128, num_local_experts=4, num_experts_per_tok=4)
    path = write_gguf_model(folder, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    prompt = random_prompt(6, 40)
    expected = engine_logits(engine_for(path, cpu_kernels="torch"), prompt)
    engine = engine_for(path, dtype="auto")
    mixture = engine.worker.device.model.mixture
    assert mixture is not None and mixture.num_bytes < 1.2 * mixture.num_parameters
    assert (engine_logits(engine, prompt) - expected).norm() < 0.01 * expected.norm()


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "qwen3_moe", **QWEN3_MOE)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        tensors[f"{prefix}.gate_up_proj"] = torch.zeros(7, 80, 64)
        tensors[f"{prefix}.down_proj"] = torch.zeros(7, 64, 40)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"gate_up_proj has shape \(7, 80, 64\), and the configuration asks for 6"):
        engine_for(folder)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "mixtral", num_local_experts=4)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight"):
        engine_for(folder)


@pytest.mark.parametrize("name", ["qwen2-moe", "deepseek-v3"])
def test_batches_chunks_and_cached_prefixes_change_nothing(name: str, tmp_path: Path) -> None:
    """Few pages, small steps, shared prefixes: the tokens are those of transformers for each prompt alone."""
    model_type, overrides = CHECKPOINTS[name]
    reference = reference_model(save_checkpoint(tmp_path, model_type, **overrides))
    tight = restrict(engine_for(tmp_path, block_size=8), num_pages=40, max_num_batched_tokens=24, max_num_seqs=6)
    start = random_prompt(0, 40)
    prompts = {str(i): start[: 8 * (i % 5)] + random_prompt(i + 1, 5 + 7 * i) for i in range(10)}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    expected = {name: reference_greedy(reference, prompt, 20) for name, prompt in prompts.items()}
    for _ in range(2):  # the second time over prefixes of the first
        assert run(tight, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()]) == expected
    assert tight.scheduler.num_preemptions > 0


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, {0, 1, 2, 3}),
        ({"decoder_sparse_step": 2}, {1, 3}),
        ({"mlp_only_layers": [1, 2]}, {0, 3}),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, {1}),
    ],
)
def test_which_layers_are_sparse(changes: dict[str, Any], layers: set[int]) -> None:
    moe = decoder_config(CONFIG | changes).moe
    assert moe is not None and moe.layers == layers


DEEPSEEK: dict[str, Any] = {
    **CONFIG, "n_routed_experts": 8, "num_experts": None, "first_k_dense_replace": 1, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_group": 4, "topk_group": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"topk_group": 5}, "8 experts in 4 groups, of which a token chooses 5"),
        ({"n_group": 8}, "2 experts a token do not fit 1 groups of 1"),
        ({"num_experts_per_tok": 3}, "3 experts a token do not fit 1 groups of 2"),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"scoring_func": "softmax"}, "scoring_func sigmoid"),
        ({"model_type": "deepseek_v2", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method 'noaux_tc'"),
    ],
)
def test_impossible_deepseeks_are_refused(changes: dict[str, Any], message: str) -> None:
    config = {key: value for key, value in (DEEPSEEK | {"model_type": "deepseek_v3"}).items() if value is not None}
    assert decoder_config(config).moe is not None
    with pytest.raises(ModelError, match=message):
        decoder_config(config | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 is more than num_experts 6"),
        ({"num_experts": 1025}, "num_experts is 1025, and at most 1024"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None"),
    ],
)
def test_impossible_mixtures_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        decoder_config(CONFIG | changes)
