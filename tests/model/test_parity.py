"""The decoder against transformers, on tiny random checkpoints and on the default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.request import EngineRequest, SamplingParams
from tests.support import (
    engine_for,
    engine_logits,
    greedy,
    random_prompt,
    reference_greedy,
    reference_model,
    run,
    save_checkpoint,
)

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

QWEN_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
DEEPSEEK = {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
            "n_shared_experts": 2, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 12}  # fmt: skip
DEEPSEEK_YARN = {**YARN, "factor": 4.0, "mscale": 0.8, "mscale_all_dim": 1.1}
V3_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "odd-heads": ("llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}),
    "wide-heads": ("llama", {"head_dim": 32}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama3": ("llama", {"rope_parameters": {"rope_theta": 1e4, **LLAMA3}}),
    "yarn": ("llama", {"rope_parameters": {"rope_theta": 1e4, **YARN}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 40}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3-window": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 33, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 30, "query_pre_attn_scalar": 24}),
    "gemma2-untied": (
        "gemma2",
        {"head_dim": 32, "sliding_window": 64, "tie_word_embeddings": False, "num_key_value_heads": 1,
         "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "attention_bias": True},
    ),
    "gemma2-uncapped": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 7, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 30, "num_hidden_layers": 7}),
    "gemma3-linear": (
        "gemma3_text",
        {"head_dim": 32, "sliding_window": 48, "layer_types": ["full_attention", "sliding_attention"],
         "query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "mixtral-top3-tied": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 3, "tie_word_embeddings": True}),
    "qwen2-moe": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 48}),
    "qwen2-moe-normed": ("qwen2_moe", {**QWEN_MOE, "shared_expert_intermediate_size": 80, "norm_topk_prob": True}),
    "qwen2-moe-dense-between": (
        "qwen2_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    "qwen3-moe": ("qwen3_moe", {**QWEN_MOE, "head_dim": 24, "norm_topk_prob": True}),
    "qwen3-moe-one-expert": ("qwen3_moe", {**QWEN_MOE, "num_experts_per_tok": 1, "attention_bias": True}),
    "qwen3-moe-dense-between": ("qwen3_moe", {**QWEN_MOE, "num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    "deepseek-v2": ("deepseek_v2", {**DEEPSEEK, "first_k_dense_replace": 1, "q_lora_rank": 24}),
    "deepseek-v2-lite": ("deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "routed_scaling_factor": 1.5}),
    "deepseek-v2-groups": (
        "deepseek_v2",
        {**DEEPSEEK, "q_lora_rank": 24, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
         "routed_scaling_factor": 4.0, "rope_parameters": {"rope_theta": 1e4, **DEEPSEEK_YARN}},
    ),
    "deepseek-v3": ("deepseek_v3", {**DEEPSEEK, **V3_GROUPS, "first_k_dense_replace": 1, "q_lora_rank": 24}),
    "deepseek-v3-yarn": (
        "deepseek_v3",
        {**DEEPSEEK, **V3_GROUPS, "first_k_dense_replace": 0, "q_lora_rank": 40, "attention_bias": True,
         "rope_parameters": {"rope_theta": 1e4, **DEEPSEEK_YARN}},
    ),
    "deepseek-v3-halves": (
        "deepseek_v3",
        {**DEEPSEEK, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None,
         "rope_interleave": False, "norm_topk_prob": False, "v_head_dim": 24},
    ),
    "mixtral-window": ("mixtral", {"num_local_experts": 4, "sliding_window": 33}),
    "qwen2-moe-window": (
        "qwen2_moe",
        {**QWEN_MOE, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 33, "max_window_layers": 3},
    ),
    "qwen3-moe-window": ("qwen3_moe", {**QWEN_MOE, "use_sliding_window": True, "sliding_window": 33}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    save_checkpoint(tmp_path, model_type, **overrides)
    reference, engine = reference_model(tmp_path), engine_for(tmp_path, block_size=8)
    prompt = random_prompt(1, 150)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)


def test_sharded_checkpoint_loads_like_a_single_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one")
    model = reference_model(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="60KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    prompt = random_prompt(2, 40)
    one, many = (engine_logits(engine_for(tmp_path / name), prompt) for name in ("one", "many"))
    assert torch.equal(one, many)


def test_dynamic_scaling_stretches_for_a_longer_context(tmp_path: Path) -> None:
    """Beyond the model's own length the angles are those that transformers takes for the longest sequence served."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    save_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    rotary = reference_model(tmp_path).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(128)[None])
    (ours,) = engine_for(tmp_path, max_model_len=128).worker.model.cos_sin
    torch.testing.assert_close(ours, torch.cat((cos[0, :, :8], sin[0, :, :8]), -1), atol=1e-5, rtol=0)


@pytest.mark.timeout(900)  # half a minute on two idle cores
def test_default_model_equals_transformers_on_the_same_file(smollm2_gguf: Path) -> None:
    """32 prompts x 64 greedy tokens, float32.

    One forward of transformers over prompt and answer shows each of its greedy choices, as long as all before agree.
    """
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine = engine_for(smollm2_gguf, kv_cache_memory="512MiB", max_model_len=1024)
    prompts = {str(i): random_prompt(i, 5 + 6 * i, vocab_size=49152) for i in range(32)}
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    answers = run(engine, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answers[name]])).logits[0, len(prompt) - 1 : -1]
        theirs = logits.argmax(-1).tolist()
        assert answers[name] == theirs, f"prompt {name}: {_first_difference(logits, answers[name], theirs)}"


def _first_difference(logits: torch.Tensor, ours: list[int], theirs: list[int]) -> str:
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    gap = float(logits[at, theirs[at]] - logits[at, ours[at]])
    return f"token {at} is {ours[at]}, transformers has {theirs[at]}, {gap:.2e} ahead in its logits"
