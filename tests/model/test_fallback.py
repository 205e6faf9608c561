"""Models that transformers' own code runs over ingle's pages, against that code with its own attention and cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import ConfigError, ModelError
from ingle.model import fallback
from ingle.model.registry import FAMILIES
from ingle.request import EngineRequest, SamplingParams
from tests.support import (
    collect,
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

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
    "minicpm3": {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
                 "v_head_dim": 12, "num_key_value_heads": 4},
    "glm4": {"head_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "granite_swa": {"sliding_window": 30, "layer_types": ["full_attention", "sliding_attention"]},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "nemotron": {},
    "olmo2": {"num_key_value_heads": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 100, "word_embed_proj_dim": 32},
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True},
    "starcoder2": {"sliding_window": 50},
}  # fmt: skip


def save(folder: Path, model_type: str) -> Path:
    return save_checkpoint(folder, model_type, **CHECKPOINTS[model_type])


@pytest.mark.parametrize("model_type", CHECKPOINTS)
def test_logits_and_greedy_tokens_equal_transformers(model_type: str, tmp_path: Path) -> None:
    assert model_type not in FAMILIES, "a family of its own now: move the case to test_parity.py"
    save(tmp_path, model_type)
    reference, engine = reference_model(tmp_path), engine_for(tmp_path, block_size=8)
    prompt = random_prompt(1, 150)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)


@pytest.mark.parametrize(
    ("model_type", "choices"),
    [("llama", {"hidden_act": "relu"}), ("gemma2", {"hidden_activation": "gelu", "head_dim": 16})],
    ids=str,
)
def test_a_familys_choice_that_ingle_lacks_is_left_to_transformers(
    model_type: str, choices: dict[str, Any], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, model_type, **choices)
    reference, engine = reference_model(tmp_path), engine_for(tmp_path, block_size=8)
    prompt = random_prompt(1, 100)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert f"model_type {model_type!r} with its activation has no implementation" in notices(tmp_path)[0]


@pytest.mark.parametrize("model_type", ["cohere2", "gpt2", "olmoe"])
def test_batches_chunks_and_cached_prefixes_change_nothing(model_type: str, tmp_path: Path) -> None:
    save(tmp_path, model_type)
    reference = reference_model(tmp_path)
    tight = restrict(engine_for(tmp_path, block_size=8), num_pages=40, max_num_batched_tokens=24, max_num_seqs=6)
    start = random_prompt(0, 40)
    prompts = {str(i): start[: 8 * (i % 5)] + random_prompt(i + 1, 5 + 7 * i) for i in range(10)}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    for _ in range(2):  # the second time over prefixes of the first
        answers = run(tight, [EngineRequest(name, prompt, params) for name, prompt in prompts.items()])
        assert answers == {name: reference_greedy(reference, prompt, 20) for name, prompt in prompts.items()}
    again = collect(tight, [EngineRequest("again", prompts["9"], params)])["again"][0]
    assert again.num_cached_tokens > 0


@pytest.mark.parametrize(
    "flag", [{"rope_theta": 5e5}, {"rope_scaling": '{"rope_type": "linear", "factor": 2.0}'}], ids=str
)
def test_rope_flags_do_not_reach_it(flag: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    with pytest.raises(ConfigError, match="write rope_scaling or rope_theta into its config"):
        engine_for(tmp_path, **flag)


def test_says_what_runs_and_leaves_out_graphs(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    engine, info = build_engine(EngineConfig.of(str(tmp_path), device="cpu", kv_cache_memory="4MiB"), tmp_path)
    assert info.family == "olmo2" and not engine.worker.device.model.capturable
    assert "transformers' Olmo2ForCausalLM runs" in info.notices[0]
    weights = load_file(tmp_path / "model.safetensors")
    assert info.num_parameters == sum(tensor.numel() for tensor in weights.values())


def test_keys_that_transformers_passes_over_are_told(tmp_path: Path) -> None:
    save(tmp_path, "granite")
    config = json.loads((tmp_path / "config.json").read_text())
    assert len(notices(tmp_path)) == 1, "all that transformers writes is known"
    (tmp_path / "config.json").write_text(json.dumps(config | {"foo_multiplier": 3.0}))
    assert "foo_multiplier is 3.0" in notices(tmp_path)[1]


def notices(folder: Path) -> list[str]:
    return build_engine(EngineConfig.of(str(folder), device="cpu", kv_cache_memory="4MiB"), folder)[1].notices


def test_dummy_weights_are_seeded(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    (tmp_path / "model.safetensors").unlink()
    prompt = random_prompt(1, 9)
    a, b, c = (engine_logits(engine_for(tmp_path, load_format="dummy", seed=seed), prompt) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bart": ({"d_model": 64, "decoder_layers": 2, "encoder_layers": 2}, "encoder-decoder|decoders"),
    "bloom": ({}, "in 0 of 2 layers"),
    "gptj": ({"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}, "cannot load it with ingle's attention"),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
    "mamba": ({"state_size": 8}, "recurrent state"),
    "t5": ({"d_model": 64, "d_kv": 16, "num_layers": 2}, "no decoder-only language model"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_attention_that_pages_cannot_serve_is_refused(model_type: str, tmp_path: Path) -> None:
    overrides, match = REFUSED[model_type]
    save_config(tmp_path, model_type, **overrides)
    with pytest.raises(ModelError, match=match):
        engine_for(tmp_path, load_format="dummy")


def save_config(folder: Path, model_type: str, **overrides: Any) -> None:
    from transformers import AutoConfig

    tiny = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    AutoConfig.for_model(model_type, **{**tiny, **overrides}).save_pretrained(folder)


def test_what_attention_is_asked_for_beyond_pages_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ModelError, match="Linear asks for attention with position_bias, which is not done over pages"):
        fallback._attention(torch.nn.Linear(1, 1), states, states, states, None, position_bias=torch.ones(1))


def test_tokens_that_meet_outside_attention_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as in a convolution over the sequence, which would see the neighbours in the batch."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

    save(tmp_path, "olmo2")
    forward = Olmo2MLP.forward
    monkeypatch.setattr(Olmo2MLP, "forward", lambda self, x: forward(self, x + 0.2 * x.roll(1, dims=1)))
    with pytest.raises(ModelError, match="tokens meet outside attention"):
        engine_for(tmp_path)


def test_missing_and_misshapen_tensors_are_errors(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 tensors are missing, such as {name}"):
        engine_for(tmp_path)
    save_file({**weights, name: weights[name][:8].clone()}, file, {"format": "pt"})
    with pytest.raises(ModelError):
        engine_for(tmp_path)


def test_no_longer_than_transformers_code_serves(tmp_path: Path) -> None:
    save(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match=r"--max-model-len 600: .* at most 512"):
        engine_for(tmp_path, max_model_len=600)


def test_long_rope_is_served_up_to_its_first_length(tmp_path: Path) -> None:
    """Beyond it, transformers rotates every token of a forward by its longest one's factors."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 128, "factor": 4.0}  # fmt: skip
    save_checkpoint(tmp_path, "olmo2", rope_parameters=rope)
    engine = engine_for(tmp_path, block_size=8)
    assert engine.scheduler.limits.max_model_len == 128
    reference, prompt = reference_model(tmp_path), random_prompt(1, 100)
    assert greedy(engine, prompt, 20) == reference_greedy(reference, prompt, 20)


REMOTE_CODE = """
from pathlib import Path
from transformers import Olmo2Config, Olmo2ForCausalLM
Path({marker!r}).touch()

class HomeMadeConfig(Olmo2Config):
    model_type = "home_made"

class HomeMadeForCausalLM(Olmo2ForCausalLM):
    config_class = HomeMadeConfig
"""


@pytest.fixture
def home_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that brings its own code, which leaves a mark when it is imported."""
    folder = save(tmp_path / "model", "olmo2")
    code = REMOTE_CODE.format(marker=str(tmp_path / "imported"))
    (folder / "modeling_home_made.py").write_text(code, encoding="utf-8")
    classes = {"AutoConfig": "HomeMadeConfig", "AutoModelForCausalLM": "HomeMadeForCausalLM"}
    auto_map = {auto: f"modeling_home_made.{name}" for auto, name in classes.items()}
    edit_config(folder, model_type="home_made", architectures=["HomeMadeForCausalLM"], auto_map=auto_map)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_code_from_a_folder_is_never_imported_unasked(home_made: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'home_made' comes with its own code.*--trust-remote-code"):
        engine_for(home_made)
    edit_config(home_made, model_type="olmo2")  # known to transformers: its own code runs, not the folder's
    engine_for(home_made)
    edit_config(home_made, model_type="llama")
    with pytest.raises(ModelError):  # ingle's own, whose norms are not there
        engine_for(home_made)
    assert not (tmp_path / "imported").exists()


def test_trusted_code_runs(home_made: Path, tmp_path: Path) -> None:
    engine, prompt = engine_for(home_made, trust_remote_code=True), random_prompt(1, 20)
    assert (tmp_path / "imported").exists() and engine.worker.device.model.config.family == "home_made"
    plain = shutil.copytree(home_made, tmp_path / "plain")
    edit_config(plain, model_type="olmo2")
    assert torch.equal(engine_logits(engine, prompt), engine_logits(engine_for(plain), prompt))


def test_trusted_code_is_the_folder_s_own(home_made: Path) -> None:
    edit_config(home_made, auto_map={"AutoConfig": "someone/else--modeling.HomeMadeConfig"})
    with pytest.raises(ModelError, match="in another repository"):
        engine_for(home_made, trust_remote_code=True)


def test_a_model_type_that_nobody_knows_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "olmo2")
    edit_config(tmp_path, model_type="home_made")
    with pytest.raises(ModelError, match="'home_made' is known neither to ingle nor to transformers"):
        engine_for(tmp_path, trust_remote_code=True)


MANY = [
    "afmoe", "apertus", "arcee", "aria_text", "biogpt", "bitnet", "ctrl", "cwm", "ernie4_5", "ernie4_5_moe",
    "exaone4", "exaone_moe", "flex_olmo", "fuyu", "glm", "glm4_moe", "gpt-sw3", "gpt_bigcode", "granitemoe",
    "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax", "internlm3", "jais2", "jetmoe",
    "minimax_m2", "ministral", "nanochat", "olmo", "olmo3", "persimmon", "phi", "phimoe", "seed_oss", "smollm3",
    "solar_open", "vaultgemma",
]  # fmt: skip
SIZES = {"moe_intermediate_size": 32, "head_dim": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "pad_token_id": 0}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MANY)
def test_many_more_architectures_equal_transformers(model_type: str, tmp_path: Path) -> None:
    if model_type in FAMILIES:
        pytest.skip("a family of its own now")
    save_checkpoint(tmp_path, model_type, **SIZES)
    reference, engine, prompt = reference_model(tmp_path), engine_for(tmp_path, block_size=8), random_prompt(1, 100)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 16) == reference_greedy(reference, prompt, 16)
