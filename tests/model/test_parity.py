"""The decoder against transformers, on tiny random checkpoints and on the default model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import pytest
import torch

from ingle.kernels.cpu import library
from ingle.request import EngineRequest, SamplingParams
from tests.model.checkpoints import CHECKPOINTS
from tests.support import (
    TINY,
    engine_for,
    engine_logits,
    greedy,
    random_prompt,
    reference_greedy,
    reference_model,
    restrict,
    run,
    save_checkpoint,
)


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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_chunks_batches_and_shared_prefixes_change_nothing(name: str, tmp_path: Path) -> None:
    """Prompts read in pieces beside decoding sequences, twice, so that the prefix cache has a part in it."""
    model_type, overrides = CHECKPOINTS[name]
    save_checkpoint(tmp_path, model_type, **overrides)
    reference = reference_model(tmp_path)
    engine = engine_for(tmp_path, block_size=8)
    num_pages = 100 * len(engine.facts.kv.groups)
    engine = restrict(engine, num_pages=num_pages, max_num_batched_tokens=28, max_num_seqs=5)
    shared = random_prompt(50, 75)
    prompts = [random_prompt(i, 20 + 17 * i) for i in range(4)]
    prompts += [shared[:count] + random_prompt(60 + count, 12) for count in (75, 40)]
    expected = {str(i): reference_greedy(reference, prompt, 16) for i, prompt in enumerate(prompts)}
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    for _ in range(2):
        assert run(engine, [EngineRequest(str(i), prompt, params) for i, prompt in enumerate(prompts)]) == expected
    assert engine.stats().num_prompt_tokens < 2 * sum(map(len, prompts)), "nothing came from the prefix cache"


@pytest.mark.parametrize("name", ["gqa", "phi3-partial", "mistral-window", "gemma2", "gemma3-linear"])
def test_pytorchs_operators_alone_equal_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no C++ compiler, and in 16 bits: the operators that all other kernels are tested against."""
    monkeypatch.setattr(library, "started", lambda: False)
    model_type, overrides = CHECKPOINTS[name]
    save_checkpoint(tmp_path, model_type, **overrides)
    reference = reference_model(tmp_path)
    engine = engine_for(tmp_path, block_size=8, cpu_kernels="torch", max_num_batched_tokens=90)
    prompt = random_prompt(1, 150)
    assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)


def test_the_text_part_of_a_model_of_text_and_images(tmp_path: Path) -> None:
    text = {"head_dim": 16, "sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    save_checkpoint(tmp_path, "gemma3", text_config={**TINY, **text}, vision_config=vision)
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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_prompts", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_default_model_equals_transformers_on_the_same_file(
    smollm2_gguf: Path, num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many prompts x 64 greedy tokens, float32. 32 take half a minute on two idle cores.

    One forward of transformers over prompt and answer shows each of its greedy choices, as long as all before agree.
    """
    from transformers import AutoModelForCausalLM

    for name in ("GGUFReader", "get_tensor_name_map"):  # which transformers makes for each of its modules
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    engine = engine_for(smollm2_gguf, kv_cache_memory="512MiB", max_model_len=1024)
    prompts = {str(i): random_prompt(i, 5 + 6 * i, vocab_size=49152) for i in range(0, 32, 32 // num_prompts)}
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
