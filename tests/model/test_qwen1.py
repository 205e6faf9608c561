"""The first Qwen against its description in plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.errors import ModelError
from ingle.request import EngineRequest, SamplingParams
from tests.model.qwen1 import Reference, save_checkpoint
from tests.support import engine_for, engine_logits, greedy, random_prompt, restrict, run

# A prompt of 150 tokens and a context of 256 are both within two doublings of the 64 tokens it was trained on.
LONG, LONG_CONTEXT = 150, 256


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"no_bias": False},
        {"use_dynamic_ntk": False},
        {"use_logn_attn": False},
        {"rotary_pct": 0.5, "rotary_emb_base": 50000},
        {"kv_channels": 24, "num_attention_heads": 3},
        {"seq_length": 1024},
    ],
    ids=str,
)
def test_logits_and_greedy_tokens_equal_the_reference(tmp_path: Path, overrides: dict[str, Any]) -> None:
    save_checkpoint(tmp_path, **overrides)
    reference, engine = Reference(tmp_path), engine_for(tmp_path, block_size=8, max_model_len=LONG_CONTEXT)
    prompt = random_prompt(1, LONG)
    expected = reference.logits(prompt, LONG)
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 64) == reference.greedy(prompt, 64)


def test_the_trained_length_is_served_unless_more_is_asked_for(tmp_path: Path) -> None:
    """So that short prompts are answered as the published code does."""
    engine = engine_for(save_checkpoint(tmp_path), block_size=8)
    assert engine.scheduler.limits.max_model_len == 64
    prompt = random_prompt(2, 30)
    assert greedy(engine, prompt, 34) == Reference(tmp_path).greedy(prompt, 34)


def test_chunks_batches_and_shared_prefixes_change_nothing(tmp_path: Path) -> None:
    reference = Reference(save_checkpoint(tmp_path))
    engine = engine_for(tmp_path, block_size=8, max_model_len=LONG_CONTEXT)
    engine = restrict(engine, num_pages=100, max_num_batched_tokens=28, max_num_seqs=5)
    shared = random_prompt(50, 120)
    prompts = [shared[:count] + random_prompt(i, 60) for i, count in enumerate((80, 101, 120))]
    expected = {str(i): reference.greedy(prompt, 16) for i, prompt in enumerate(prompts)}
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    for _ in range(2):
        assert run(engine, [EngineRequest(str(i), prompt, params) for i, prompt in enumerate(prompts)]) == expected
    assert engine.stats().num_prompt_tokens < 2 * sum(map(len, prompts)), "nothing came from the prefix cache"


@pytest.mark.parametrize("key", ["seq_length", "kv_channels", "rotary_emb_base", "layer_norm_epsilon", "rotary_pct"])
@pytest.mark.parametrize("value", [0, -1, "64", 1e400])
def test_values_out_of_range_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    config = json.loads((save_checkpoint(tmp_path) / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json"):
        engine_for(tmp_path)
