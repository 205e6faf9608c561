"""A git-lfs pointer in place of any file is named as one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ingle.errors import ModelError
from ingle.text.load import load_text_side
from ingle.weights.gguf import GgufFile
from ingle.weights.hf_config import read_config
from ingle.weights.source import open_source
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
