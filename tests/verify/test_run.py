"""Right models pass and wrong ones do not. Each family's parity is in tests/model; here is the proof's own proof."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ingle.config import EngineConfig
from ingle.errors import ConfigError, ModelError
from ingle.model import config_keys, registry
from ingle.model.architecture import DecoderConfig
from ingle.verify.run import Verification, verify
from ingle.weights.source import StoredRows
from tests.model import qwen1
from tests.support import TINY, random_prompt, save_checkpoint
from tests.weights.gguf_models import write_gguf_model

RIGHT: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 24},
    "gemma3_text": {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16},
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"head_dim": 16, "sliding_window": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
}


def verified(path: Path, dtype: str = "float32", **options: Any) -> Verification:
    config = EngineConfig.of(str(path), dtype=dtype, device="cpu", **options)  # type: ignore[arg-type]
    return verify(config, path, [("some ids", random_prompt(1, 70))], num_random=3, num_tokens=12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in RIGHT if name != "llama")]
)
def test_a_right_model_passes(model_type: str, dtype: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, model_type, **RIGHT[model_type])
    result = verified(tmp_path, dtype)
    assert result.passed and result.reference.independent
    assert result.info.dtype == dtype and len(result.comparisons) == 4
    assert all(one.num_answer_tokens == 12 for one in result.comparisons)
    if dtype == "float32":
        assert result.distance.max < 1e-4


Change = Callable[[DecoderConfig], DecoderConfig]
WRONG: dict[str, Change] = {
    "another rope base": lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, theta=c.rope.theta * 1.5)),
    "another epsilon": lambda c: dataclasses.replace(c, norm_eps=c.norm_eps * 1e4),
    "one head's scale": lambda c: dataclasses.replace(c, attention_scale=0.9 * c.head_dim**-0.5),
    "a window that is not there": lambda c: dataclasses.replace(c, windows=(40,) * c.num_layers),
}


def computed_otherwise(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    right = registry.FAMILIES["llama"]

    def wrong(config: Mapping[str, Any]) -> DecoderConfig:
        return change(right(config))

    monkeypatch.setitem(registry.FAMILIES, "llama", wrong)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_fails(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path)
    computed_otherwise(monkeypatch, WRONG[name])
    assert not verified(tmp_path).passed


def test_a_wrong_model_fails_in_sixteen_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path)
    computed_otherwise(monkeypatch, WRONG["one head's scale"])
    result = verified(tmp_path, "bfloat16")
    assert not result.passed and result.distance.mean > result.tolerance.mean


def test_wrong_weights_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that reads a tensor amiss, here the rows of one projection in another order."""
    from ingle.weights.safetensors_source import SafetensorsSource

    save_checkpoint(tmp_path)
    stored_rows = SafetensorsSource.stored_rows

    def misread(self: SafetensorsSource, name: str, num_rows: int, num_columns: int) -> StoredRows:
        rows = stored_rows(self, name, num_rows, num_columns)
        amiss = name == "model.layers.1.self_attn.k_proj.weight"
        return rows._replace(order=np.roll(np.arange(num_rows), 1)) if amiss else rows

    monkeypatch.setattr(SafetensorsSource, "stored_rows", misread)
    assert not verified(tmp_path).passed


def test_a_model_that_transformers_lacks_is_compared_with_ourselves(tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "home_made"}))
    with pytest.raises(ModelError, match="known neither"):
        verified(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.FAMILIES, "home_made", registry.FAMILIES["llama"])
        patch.setitem(config_keys.KNOWN_KEYS, "home_made", config_keys.KNOWN_KEYS["llama"])
        result = verified(tmp_path)
    assert result.passed and not result.reference.independent
    assert "transformers has no model_type 'home_made'" in result.reference.description


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_qwen_is_compared_with_ourselves(dtype: str, tmp_path: Path) -> None:
    result = verified(qwen1.save_checkpoint(tmp_path, seq_length=128), dtype)
    assert result.passed and not result.reference.independent


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_text_part_of_a_model_of_text_and_images_passes(dtype: str, tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    save_checkpoint(tmp_path, "gemma3", text_config={**TINY, **RIGHT["gemma3_text"]}, vision_config=vision)
    result = verified(tmp_path, dtype)
    assert result.passed and result.reference.independent


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, max_position_embeddings=32)
    config = EngineConfig.of(str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(ConfigError, match="--num-tokens 31"):
        verify(config, tmp_path, [], num_random=1, num_tokens=31)
    result = verify(config, tmp_path, [("long", random_prompt(1, 70))], num_random=0, num_tokens=20)
    assert result.comparisons[0].num_prompt_tokens == 11


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3_text", "gpt_oss"])
def test_a_gguf_file_is_compared_with_its_decoded_self(model_type: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 128} | ({} if model_type == "gpt_oss" else {"moe_intermediate_size": 32})
    save_checkpoint(tmp_path, model_type, **{**RIGHT[model_type], **sizes})
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    result = verified(path)
    assert result.passed and result.distance.max < 1e-4
    assert result.reference.description.endswith("on the weights as ingle decodes them")
    assert result.info.expanded_types == ["Q8_0"]


def test_llama3_s_rope_factors_of_a_gguf_file_reach_the_reference(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    save_checkpoint(tmp_path, "llama", rope_parameters=rope)
    path = write_gguf_model(tmp_path, tmp_path / "model.gguf")
    assert verified(path).passed


@pytest.mark.slow
def test_the_default_model_passes(smollm2_gguf: Path) -> None:
    result = verified(smollm2_gguf, "bfloat16")
    assert result.passed and result.reference.description.endswith("on the weights as ingle decodes them")
