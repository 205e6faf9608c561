"""Rope scalings that depend on the length of what is served, and those of the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.errors import IngleError
from ingle.model.architecture import RopeConfig
from ingle.model.rope import cos_sin_table
from tests.support import (
    engine_for,
    engine_logits,
    greedy,
    random_prompt,
    reference_greedy,
    reference_model,
    save_checkpoint,
)

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}


@torch.inference_mode()
def assert_same(folder: Path, reference: Any, prompt_length: int, **options: Any) -> None:
    prompt, engine = random_prompt(3, prompt_length), engine_for(folder, **options)
    expected = reference(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(engine_logits(engine, prompt), expected, atol=1e-4, rtol=0)
    assert greedy(engine, prompt, 64) == reference_greedy(reference, prompt, 64)


def notices(folder: Path, **options: Any) -> str:
    config = EngineConfig.of(str(folder), device="cpu", dtype="float32", **{"kv_cache_memory": "8MiB", **options})
    return "\n".join(build_engine(config, folder)[1].notices)


def test_dynamic_scaling_stretches_for_a_longer_context(tmp_path: Path) -> None:
    """Beyond the model's own length the angles are those that transformers takes for the longest sequence served."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    save_checkpoint(tmp_path, rope_parameters=rope, max_position_embeddings=64)
    rotary = reference_model(tmp_path).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(128)[None])
    (ours,) = engine_for(tmp_path, max_model_len=128).worker.device.model.cos_sin
    torch.testing.assert_close(torch.as_tensor(ours), torch.cat((cos[0, :, :8], sin[0, :, :8]), -1), atol=1e-5, rtol=0)
    assert "rope scaling dynamic is set for sequences of up to 128 tokens" in notices(tmp_path, max_model_len=128)
    assert "rope scaling" not in notices(tmp_path)


@pytest.mark.parametrize("more", [{}, {"factor": 8.0}, {"attention_factor": 1.5}], ids=str)
def test_longrope_takes_short_factors_within_the_original_length_and_long_ones_beyond(
    tmp_path: Path, more: dict[str, float]
) -> None:
    save_checkpoint(
        tmp_path,
        "phi3",
        max_position_embeddings=1024,
        original_max_position_embeddings=256,
        rope_parameters=LONGROPE | more,
    )
    reference = reference_model(tmp_path)
    assert_same(tmp_path, reference, 150, max_model_len=256)
    assert_same(tmp_path, reference, 260)
    assert "--max-model-len 256 or less" in notices(tmp_path)
    assert "rope scaling" not in notices(tmp_path, max_model_len=256)


def test_a_context_cut_to_memory_decides_on_the_scaling(tmp_path: Path) -> None:
    """The long factors are not for an engine whose pages hold no long sequence."""
    save_checkpoint(
        tmp_path, "phi3", max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=LONGROPE
    )
    assert_same(tmp_path, reference_model(tmp_path), 150, num_gpu_blocks_override=17)
    assert "rope scaling" not in notices(tmp_path, num_gpu_blocks_override=17)


def test_older_names_of_longrope(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path, "phi3", max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=LONGROPE
    )
    config = json.loads((tmp_path / "config.json").read_text())
    new = torch.as_tensor(engine_for(tmp_path).worker.device.model.cos_sin[0])
    rope = {key: value for key, value in config.pop("rope_parameters").items() if key.endswith("_factor")}
    for name in ("su", "yarn"):
        config |= {"rope_scaling": {"type": name, **rope}, "rope_theta": 1e4}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert torch.equal(torch.as_tensor(engine_for(tmp_path).worker.device.model.cos_sin[0]), new)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
OVERRIDES: dict[str, tuple[dict[str, Any] | None, float | None]] = {
    "theta": (None, 5e5),
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    "legacy-name": ({"type": "linear", "factor": 2.0}, 2e4),
    "yarn": (YARN, 1e6),
    "llama3": (LLAMA3, None),
    "none": ({"rope_type": "default"}, None),
}


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", OVERRIDES)
def test_flags_take_the_place_of_the_models_own(tmp_path: Path, name: str, model_type: str) -> None:
    """As if the checkpoint said so: of Gemma 3's two rotations it is that of layers without a window."""
    scaling, theta = OVERRIDES[name]
    own = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
    local = {"rope_type": "default", "rope_theta": 1e3}
    ours = {"rope_type": "linear", "factor": 3.0} if scaling is None else scaling
    changed = {**ours, "rope_type": ours.get("rope_type", ours.get("type")), "rope_theta": theta or 1e4}
    shape = {"max_position_embeddings": 256}
    if model_type == "gemma3_text":
        shape |= {"head_dim": 16, "sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}
        own, changed = ({"full_attention": rope, "sliding_attention": local} for rope in (own, changed))
    save_checkpoint(tmp_path / "own", model_type, rope_parameters=own, **shape)
    shutil.copytree(tmp_path / "own", tmp_path / "changed")
    config = json.loads((tmp_path / "changed" / "config.json").read_text())
    (tmp_path / "changed" / "config.json").write_text(json.dumps(config | {"rope_parameters": changed}))
    flag = None if scaling is None else json.dumps(scaling)
    assert_same(tmp_path / "own", reference_model(tmp_path / "changed"), 150, rope_scaling=flag, rope_theta=theta)


def test_a_scaling_by_flag_stretches_the_context(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, max_position_embeddings=64)
    for scaling, length in [
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}, 256),
        ({"rope_type": "yarn", "factor": 2.0}, 128),
        (LLAMA3, 64),
    ]:
        engine = engine_for(tmp_path, rope_scaling=json.dumps(scaling))
        assert engine.scheduler.limits.max_model_len == length, scaling


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear"}, "--rope-scaling: rope factor is None"),
        ({"rope_type": "linear", "factor": -2}, "--rope-scaling: rope factor is -2"),
        ({"rope_type": "spiral", "factor": 2}, "'spiral' is not supported; known are default, linear"),
        ({"rope_type": 3}, "--rope-scaling: rope_type is 3"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "--rope-scaling: rope short_factor is"),
    ],
    ids=str,
)
def test_a_scaling_by_flag_is_checked(tmp_path: Path, scaling: dict[str, Any], message: str) -> None:
    save_checkpoint(tmp_path)
    with pytest.raises(IngleError, match=message):
        engine_for(tmp_path, rope_scaling=json.dumps(scaling))


YARN = RopeConfig(theta=1e4, rotary_dim=16, original_max_position_embeddings=64, type="yarn", factor=4.0)


def test_attn_factor_multiplies_yarns_own_temperature() -> None:
    """As vLLM and llama.cpp read it; `attention_factor` takes its place."""
    plain, more = (cos_sin_table(rope, 100, np) for rope in (YARN, dataclasses.replace(YARN, attn_factor=1.5)))
    np.testing.assert_allclose(more, plain * 1.5, rtol=1e-6)
    whole = dataclasses.replace(YARN, attention_factor=1.5 * (0.1 * math.log(4.0) + 1.0))
    np.testing.assert_allclose(more, cos_sin_table(whole, 100, np), rtol=1e-6)


def test_extrapolation_factor_is_the_share_of_frequencies_that_yarn_keeps() -> None:
    def angles(**changes: Any) -> npt.NDArray[np.float32]:
        rope = dataclasses.replace(YARN, attention_factor=1.0, **changes)
        cos, sin = np.split(cos_sin_table(rope, 2, np)[1], 2)
        return np.arctan2(sin, cos)

    interpolated = angles(type="linear")
    kept = (angles() - interpolated) / (angles(type="default") - interpolated)
    assert kept[0] == 1.0 and kept[-1] == 0.0
    half = angles(extrapolation_factor=0.5)
    np.testing.assert_allclose((half - interpolated) / (angles(type="default") - interpolated), kept / 2, atol=1e-5)


def test_yarn_without_a_factor_is_stretched_to_the_stated_context(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 128}
    save_checkpoint(tmp_path, rope_parameters={**rope, "factor": 4.0})
    expected = engine_logits(engine_for(tmp_path), random_prompt(1, 40))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]["factor"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    assert torch.equal(engine_logits(engine_for(tmp_path), random_prompt(1, 40)), expected)
