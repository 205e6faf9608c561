"""What a configuration says of a model's size is what loading finds."""

from __future__ import annotations

import contextlib
from pathlib import Path

import gguf
import pytest

from ingle.config import EngineConfig
from ingle.engine.build import build_engine
from ingle.engine.native_build import numerics
from ingle.kernels.cpu import library
from ingle.model.checkpoint import as_stored
from ingle.model.count import num_parameters
from ingle.model.registry import decoder_config
from ingle.model.tensors import needed
from ingle.weights.hf_config import read_config
from ingle.weights.open import open_source
from ingle.weights.source import split_name
from tests.model.checkpoints import CHECKPOINTS
from tests.support import save_checkpoint
from tests.weights.gguf_models import write_gguf_model


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parameters_are_counted_before_they_are_read(name: str, tmp_path: Path) -> None:
    model_type, overrides = CHECKPOINTS[name]
    folder = save_checkpoint(tmp_path, model_type, **overrides)
    _, info = build_engine(EngineConfig.of(str(folder), dtype="float32", device="cpu", kv_cache_memory="8MiB"), folder)
    decoder = decoder_config(read_config(folder))
    assert num_parameters(decoder) == info.num_parameters
    with contextlib.closing(open_source(folder, "auto", 0)) as source:
        decoder, _ = as_stored(decoder, source)
        sizes = {name: size * getattr(split_name(name)[1], "of", 1) for name, size in needed(decoder, source)}
    assert sum(sizes.values()) == info.num_parameters


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["made up", "F16", "Q4_0", "Q5_1", "Q8_0"])
def test_bytes_are_counted_before_they_are_read(stored: str, dtype: str, tmp_path: Path) -> None:
    if (failure := library.start(2)) is not None:
        pytest.skip(failure)
    path, load_format = save_checkpoint(tmp_path, hidden_size=256, intermediate_size=512), "dummy"
    decoder = decoder_config(read_config(path))
    if stored != "made up":
        kind = gguf.GGMLQuantizationType[stored]
        path, load_format = write_gguf_model(path, tmp_path / "model.gguf", kind), "auto"
    config = EngineConfig.of(str(path), dtype=dtype, device="cpu", kv_cache_memory="8MiB", load_format=load_format)
    _, info = build_engine(config, path)
    assert numerics(config).weight_bytes(decoder, info.stored_types) == pytest.approx(info.weight_bytes, rel=0.02)
