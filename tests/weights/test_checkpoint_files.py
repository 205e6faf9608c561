"""The files of a folder outrank their index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ingle.errors import ConfigError, ModelError
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES, CheckpointFiles, named_by_quantizers
from ingle.weights.open import open_source
from ingle.weights.safetensors_source import SafetensorsSource
from ingle.weights.tensor_sources import TorchSource

Folder = Callable[..., Any]


@pytest.fixture(params=["safetensors", "bin"])
def kind(request: pytest.FixtureRequest) -> CheckpointFiles:
    return SAFETENSORS_FILES if request.param == "safetensors" else TORCH_FILES


@pytest.fixture
def opened(kind: CheckpointFiles, tmp_path: Path) -> Folder:
    """The source of a folder with these files, each with its tensors of one number, and with this index."""
    stem = kind.single.removesuffix(kind.suffix)

    def name_of(short: str) -> str:
        return kind.single if short == "single" else f"{stem}-0000{short[0]}-of-0000{short[2]}{kind.suffix}"

    def make(files: Mapping[str, Mapping[str, float]], index: Mapping[str, str] | None) -> Any:
        for short, numbers in files.items():
            tensors = {name: torch.tensor([float(value)]) for name, value in numbers.items()}
            save = save_file if kind is SAFETENSORS_FILES else torch.save
            save(tensors, tmp_path / name_of(short))
        if index is not None:
            weight_map = {name: name_of(short) for name, short in index.items()}
            (tmp_path / kind.index).write_text(json.dumps({"weight_map": weight_map}))
        return SafetensorsSource(tmp_path) if kind is SAFETENSORS_FILES else TorchSource(tmp_path)

    return make


def number(source: Any, name: str) -> float:
    return float(source.floats(name, 1)[0])


LOADS: dict[str, tuple[dict[str, dict[str, float]], dict[str, str] | None]] = {
    "one file": ({"single": {"a": 1, "b": 2}}, None),
    "as the index says": ({"1/2": {"a": 1}, "2/2": {"b": 2}}, {"a": "1/2", "b": "2/2"}),
    "the index names one of two": ({"1/2": {"a": 1, "b": 9}, "2/2": {"b": 2}}, {"a": "1/2", "b": "2/2"}),
    "a whole file beside a stale index": ({"single": {"a": 1, "b": 2}}, {"a": "1/2", "b": "2/2"}),
    "and beside one shard of before": ({"single": {"a": 1, "b": 2}, "1/2": {"a": 9}}, {"a": "1/2", "b": "2/2"}),
    "a tensor nobody needs in a missing shard": ({"1/2": {"a": 1, "b": 2}}, {"a": "1/2", "b": "1/2", "c": "2/2"}),
    "a tensor that no shard has": ({"1/2": {"a": 1}, "2/2": {"b": 2}}, {"a": "1/2", "b": "2/2", "c": "2/2"}),
    "a tensor in another shard": ({"1/2": {"a": 1}, "2/2": {"b": 2}}, {"a": "2/2", "b": "1/2"}),
    "in a shard of which the index forgets a tensor": ({"1/2": {"a": 1, "b": 2}}, {"a": "1/2"}),
    "shards without an index": ({"1/2": {"a": 1}, "2/2": {"b": 2}}, None),
    "an index of the one file": ({"single": {"a": 1, "b": 2}}, {"a": "single", "b": "single"}),
    "an empty index": ({"single": {"a": 1, "b": 2}}, {}),
}


@pytest.mark.parametrize("case", LOADS)
def test_loads(opened: Folder, case: str) -> None:
    files, index = LOADS[case]
    source = opened(files, index)
    assert (number(source, "a"), number(source, "b")) == (1, 2)


def test_what_is_truly_missing_is_named(opened: Folder) -> None:
    source = opened({"1/3": {"a": 1}}, {"a": "1/3", "b": "2/3", "c": "3/3"})
    assert "b" not in source
    with pytest.raises(ModelError, match=r"has no tensor b, which the model needs; it may be in .*00002-of-00003"):
        number(source, "b")


def test_an_index_alone_is_not_a_checkpoint(opened: Folder) -> None:
    with pytest.raises(ModelError, match=r"00001-of-00002\.\w+ is missing, which \S+\.index\.json lists"):
        opened({}, {"a": "1/2"})


def test_nothing_at_all(opened: Folder, kind: CheckpointFiles) -> None:
    with pytest.raises(ModelError, match=f"holds neither {kind.single} nor {kind.index}"):
        opened({}, None)


def test_two_generations_of_shards_are_not_mixed(opened: Folder) -> None:
    with pytest.raises(ModelError, match=r"have a tensor a, and no .* says which is meant"):
        opened({"1/2": {"a": 1}, "1/3": {"a": 9}}, None)


def test_a_whole_checkpoint_of_one_kind_beside_the_index_of_the_other(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}})
    )
    assert isinstance(open_source(tmp_path, "auto", 0), TorchSource)
    with pytest.raises(ConfigError, match="--load-format safetensors"):
        open_source(tmp_path, "safetensors", 0)


def test_what_quantizers_called_their_files() -> None:
    for name in (
        "gptq_model-4bit-128g.safetensors",
        "llama-7b-4bit-128g.safetensors",
        "vicuna-13B-1.1-GPTQ-4bit-128g.compat.no-act-order.safetensors",
        "awq_model_w4_g128.safetensors",
        "Wizard-Vicuna-13B-GPTQ-8bit-128g.act.order.safetensors",
    ):
        assert named_by_quantizers([name, "config.json", "adapter_model.safetensors", "vae.safetensors"]) == [name]
    others = "model.safetensors", "consolidated.safetensors", "8bits", "gptq.bin", "x/gptq.safetensors", "orbit"
    assert named_by_quantizers(others) == []
