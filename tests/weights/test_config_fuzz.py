"""Whatever config.json says, reading it gives a decoder whose rotations can be computed, or an error in one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from ingle.errors import ConfigError, ModelError
from ingle.model.registry import FAMILIES, decoder_config
from ingle.model.rope import cos_sin_table, query_factors
from ingle.weights.hf_config import normalize_config
from tests.model import qwen1
from tests.model.checkpoints import CHECKPOINTS
from tests.support import TINY

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 4),
    st.integers(),
    st.floats(),
    st.sampled_from([2**31, 2**63, 10**400, 1e-320, 0.5, -0.0, "", "silu", "sliding_attention", [], {}]),
    st.lists(st.sampled_from(["full_attention", "sliding_attention", 1, None, 0.5]), max_size=8),
)
VALID_ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
     "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": None, "truncate": True, "rope_theta": 1e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": None,
     "attention_factor": None, "original_max_position_embeddings": 64},
    {"rope_type": "factors", "factors": [1.0] * 8},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}},
]  # fmt: skip


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    """Rope parameters with at most two odd values."""
    rope = dict(draw(st.sampled_from(VALID_ROPES)))
    for key in draw(st.lists(st.sampled_from(sorted(rope)), max_size=2)):
        rope[key] = draw(ODD | st.floats(0.1, 10.0), key)
    return rope


def written(model_type: str) -> dict[str, Any]:
    """A config.json of the family, from transformers where it has one."""
    if model_type == "qwen":
        return dict(qwen1.CONFIG)
    overrides = next((overrides for kind, overrides in CHECKPOINTS.values() if kind == model_type), {})
    config = AutoConfig.for_model(model_type, **TINY | overrides).to_dict()
    return {key: value for key, value in json.loads(json.dumps(config)).items() if key != "transformers_version"}


WRITTEN = {model_type: written(model_type) for model_type in FAMILIES}


def check_some_config(model_type: str, data: st.DataObject) -> None:
    config = dict(WRITTEN[model_type])
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), max_size=2))
    config |= {key: data.draw(ODD, key) for key in keys if key != "model_type"}
    if data.draw(st.booleans()):
        config["rope_parameters"] = data.draw(ropes())
    flag = data.draw(st.none() | ropes())
    try:
        model = decoder_config(normalize_config(Path("config.json"), config, rope_scaling=flag))
    except (ModelError, ConfigError) as error:
        assert len(str(error)) < 500 and "\n" not in str(error)
        return
    for length in (64, 5000):
        for rope in model.ropes:
            for xp in (torch, np):
                assert cos_sin_table(rope, length, xp).shape == (length, rope.rotary_dim)
        query_factors(model, length)
    for layer in range(min(model.num_layers, 64)):
        options = model.attention(layer)
        assert options.window is None or options.window >= 1
        assert 0 < options.scale < math.inf and (options.softcap is None or 0 < options.softcap < math.inf)


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_config_is_read_or_refused(model_type: str, data: st.DataObject) -> None:
    check_some_config(model_type, data)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_very_many_configs_are_read_or_refused(model_type: str, data: st.DataObject) -> None:
    check_some_config(model_type, data)
