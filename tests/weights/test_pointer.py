"""A git-lfs pointer or a link to nowhere in place of any file is named as one, and so is an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ingle.errors import ModelError
from ingle.text.load import load_text_side
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from ingle.weights.open import open_source
from tests.support import save_checkpoint
from tests.text import toys

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 4976698672\n"
)

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda file: read_config(file.parent),
    "model.safetensors": lambda file: open_source(file.parent, "auto", 0),
    "model.safetensors.index.json": lambda file: open_source(file.parent, "auto", 0),
    "model-00001-of-00001.safetensors": lambda file: open_source(file.parent, "auto", 0),
    "pytorch_model.bin": lambda file: open_source(file.parent, "auto", 0),
    "model.gguf": GgufFile,
    "tokenizer.json": lambda file: load_text_side(file.parent),
    "tokenizer_config.json": lambda file: load_text_side(file.parent),
    "tokenizer.model": lambda file: load_text_side(file.parent),
    "qwen.tiktoken": lambda file: load_text_side(file.parent),
    "vocab.json": lambda file: load_text_side(file.parent),
    "chat_template.jinja": lambda file: load_text_side(file.parent),
    "generation_config.json": lambda file: load_text_side(file.parent),
}
"""What reads each file."""
BESIDE = ("chat_template.jinja", "generation_config.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_is_named(tmp_path: Path, name: str) -> None:
    if name in BESIDE:  # a tokenizer that could be read
        (tmp_path / "tokenizer.json").write_text(toys.byte_level_json())
    file = tmp_path / name
    file.write_bytes(POINTER)
    with pytest.raises(ModelError, match=f"{name}: a git-lfs pointer stands in the file's place: run `git lfs pull`"):
        READERS[name](file)


def test_a_pointer_that_nobody_needs_is_none(tmp_path: Path) -> None:
    tensors = load_file(save_checkpoint(tmp_path) / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    assert len(open_source(tmp_path, "auto", 0).names) == len(tensors)


@pytest.mark.parametrize("name", READERS)
def test_a_link_to_nowhere_is_named(tmp_path: Path, name: str) -> None:
    """As of a snapshot in a cache of the hub that was mounted, or copied, without the blobs beside it."""
    if name in BESIDE:
        (tmp_path / "tokenizer.json").write_text(toys.byte_level_json())
    if "-of-" in name:
        index = {"weight_map": {"lm_head.weight": name}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    file = tmp_path / name
    file.symlink_to("../../blobs/1f")
    with pytest.raises(ModelError, match=f"{name}: a link to ../../blobs/1f, which is not there"):
        READERS[name](file)


def test_an_adapter_without_its_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds an adapter .* without the model"):
        open_source(tmp_path, "auto", 0)


def test_an_adapter_that_was_not_merged_is_named(tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path) / "model.safetensors"
    save_file({name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in load_file(file).items()}, file)
    source = open_source(tmp_path, "auto", 0)
    with pytest.raises(ModelError, match=r"q_proj\.weight lies beside an adapter .* not merged"):
        source.floats("model.layers.0.self_attn.q_proj.weight", 64 * 64)
