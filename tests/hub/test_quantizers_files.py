"""Repositories of folders whose weights have a quantizer's name."""

from __future__ import annotations

from pathlib import Path

from ingle.hub.listing import RemoteFile
from ingle.hub.selection import folder_weights, is_whole


def files(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 10) for name in names]


def test_the_one_that_is_called_so_is_the_model() -> None:
    theirs, small = "gptq_model-4bit-128g.safetensors", ("config.json", "quantize_config.json", "tokenizer.json")
    assert folder_weights(files(theirs, *small)) == {"safetensors": tuple(files(theirs))}
    both = folder_weights(files(theirs, "model.safetensors", "pytorch_model.bin", *small))
    usual = {"safetensors": "model.safetensors", "PyTorch (.bin)": "pytorch_model.bin"}
    assert both == {kind: tuple(files(name)) for kind, name in usual.items()}
    assert folder_weights(files(theirs, "gptq_model-8bit-128g.safetensors", *small)) == {}


def test_a_folder_of_such_is_whole(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    assert not is_whole(tmp_path)
    (tmp_path / "llama-7b-4bit-128g.safetensors").write_bytes(b"")
    assert is_whole(tmp_path)
