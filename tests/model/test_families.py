"""What a config.json says, as choices of the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ModelError
from ingle.model.architecture import DecoderConfig
from ingle.model.registry import decoder_config
from ingle.weights.hf_config import normalize_config
from tests.support import TINY


def read(model_type: str, **values: Any) -> DecoderConfig:
    config = {**TINY, "model_type": model_type, "rms_norm_eps": 1e-6, **values}
    return decoder_config(normalize_config(Path("config.json"), config))


def test_gemmas_legacy_name_of_its_activation() -> None:
    """The first Gemma's files say gelu, and transformers computes the approximation by tanh."""
    for said in ({}, {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, {"hidden_act": None}):
        assert read("gemma", **said).activation == "gelu_tanh"
    assert read("gemma", hidden_act="silu").activation == "silu"


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text"])
def test_a_gemma_that_embeds_is_no_decoder(model_type: str) -> None:
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        read(model_type, use_bidirectional_attention=True)


def test_windows_layer_by_layer() -> None:
    eight = {"num_hidden_layers": 8, "sliding_window": 100}
    sliding = {"use_sliding_window": True, **eight}
    assert read("mistral", **eight).windows == (100,) * 8
    assert read("mistral", **eight | {"sliding_window": None}).windows == ()
    assert read("qwen2", **sliding, max_window_layers=6).windows == (None,) * 6 + (100,) * 2
    assert read("qwen3", **sliding, max_window_layers=0).windows == (100,) * 8
    assert read("qwen2", **sliding).windows == (None,) * 8
    assert read("qwen2", **eight, max_window_layers=2).windows == ()
    assert read("gemma2", **eight).windows == (100, None) * 4
    assert read("gemma3_text", **eight).windows == (100,) * 5 + (None,) + (100,) * 2
    assert read("gemma3_text", **eight, sliding_window_pattern=2).windows == (100, None) * 4
    named = ["full_attention"] * 7 + ["sliding_attention"]
    assert read("gemma3_text", **eight, layer_types=named).windows == (None,) * 7 + (100,)


@pytest.mark.parametrize("types", [["full_attention"] * 3, ["chunked_attention"] * 2, []], ids=str)
def test_layer_types_that_fit_no_layers_are_refused(types: list[str]) -> None:
    with pytest.raises(ModelError, match="layer_types"):
        read("gemma2", layer_types=types)


def test_each_rotation_belongs_to_its_layers() -> None:
    model = read("gemma3_text", num_hidden_layers=6, rope_theta=5e5, rope_local_base_freq=2e4)
    assert [model.ropes[model.rope_index(layer)].theta for layer in range(6)] == [2e4] * 5 + [5e5]
    assert {read("llama").rope_index(layer) for layer in range(2)} == {0}
