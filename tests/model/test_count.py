"""What a configuration says of a model's size is what loading finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.model.count import num_parameters
from ingle.model.registry import decoder_config
from ingle.weights.hf_config import read_config
from tests.model.checkpoints import CHECKPOINTS
from tests.support import save_checkpoint


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_counted_before_they_are_read(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    _, info = build_engine(EngineConfig.of(str(folder), dtype="float32", device="cpu", kv_cache_memory="8MiB"), folder)
    assert num_parameters(decoder_config(read_config(folder))) == info.num_parameters
