"""What people give in place of a model: each is named, with what to give instead."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ingle.errors import ModelError
from ingle.hub.resolve import resolve_model
from ingle.weights.hf_config import read_config

Make = Callable[[Path], object]


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def text(content: bytes) -> Make:
    return lambda path: path.write_bytes(content)


def files(**contents: bytes) -> Make:
    """A folder; `__` stands for a dot in names."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, content in contents.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return make


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("config.json", "{}")


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as made:
        made.add(__file__, "x")


def within(*names: str) -> Make:
    return lambda path: [model(path / name) for name in names]


def ollama(path: Path) -> None:
    for name in ("manifests", "blobs"):
        (path / name).mkdir(parents=True)
    (path / "blobs" / "sha256-01").write_bytes(b"GGUF" + bytes(99))
    (path / "blobs" / "sha256-02").write_bytes(b"{}")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
CASES: dict[str, tuple[Make, str]] = {
    "a.safetensors": (text(b"12345678{}"), "one of the files of a model; give a folder that holds them with config"),
    "pytorch_model.bin": (archive, "one of the files of a model"),
    "old.bin": (text(b"tjgg" + bytes(99)), "from before GGUF"),
    "model.zip": (archive, r"an archive \(zip\); unpack it"),
    "model.tar": (tar, r"an archive \(tar\); unpack it"),
    "model.tar.gz": (text(b"\x1f\x8b\x08"), r"an archive \(gzip\)"),
    "./page": (text(b"\n<!DOCTYPE html><html>"), "a web page stands in the file's place; download .* /resolve/"),
    "./pointer": (text(POINTER), "git-lfs pointer .*git lfs pull"),
    "./denied": (text(b"Entry not found"), "what a server said: 'Entry not found'; download it again"),
    "./model.safetensors.incomplete": (text(b"123"), "a download that has not ended"),
    "net.onnx": (text(b"\x08\x07"), "an ONNX model"),
    "./Modelfile": (text(b"# mine\nFROM qwen2\n"), "Modelfile of Ollama; give the model that its line FROM names"),
    "config.json": (text(b"{}"), "one of the files of a model; give"),
    "./notes.txt": (text(b"x"), "is not a .gguf file: give"),
    "./nothing": (files(), "folder ./nothing is empty"),
    "./above": (
        within("Qwen", "Phi"),
        r"has no config.json; give the model's folder in it: above/Phi \(or above/Qwen\)",
    ),
    "./quants": (files(a__gguf=b"GGUF", mmproj__gguf=b"GGUF"), "give its path: quants/a.gguf$"),
    "./two": (files(a__gguf=b"GGUF", b__gguf=b"GGUF"), r"give its path: two/a.gguf \(or one of 1 others there\)"),
    "./weights": (files(model__safetensors=b""), "though it has weights; download config.json"),
    "./meta": (files(params__json=b"{}", consolidated__00__pth=b""), "the makers' own format"),
    "./onnx": (files(model__onnx=b""), "holds ONNX files"),
    "./images": (files(model_index__json=b"{}"), "makes images"),
    "./store": (ollama, r"Ollama's store; give one of its models: store/blobs/sha256-01 is the largest"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_model_is_named(name: str, tmp_path: Path) -> None:
    make, message = CASES[name]
    make(tmp_path / name)
    with pytest.raises(ModelError, match=message) as error:
        resolve_model(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_a_file_beside_its_config_names_the_folder(tmp_path: Path) -> None:
    (model(tmp_path / "m") / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"give their folder: m$"):
        resolve_model("m/model.safetensors")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("models/SmolLM2-135m-instruct", "models/SmolLM2-135M-Instruct"),
        ("model/SmolLM2-135M-Instruct", "models/SmolLM2-135M-Instruct"),
        ("./smolm.gguf", "smollm.gguf"),
    ],
)
def test_a_mistyped_path_gets_near_ones(name: str, near: str, tmp_path: Path) -> None:
    model(tmp_path / "models" / "SmolLM2-135M-Instruct")
    (tmp_path / "smollm.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ModelError, match=rf"(there is no file or folder|is not on this machine yet).*; did you mean {near}\?"
    ):
        resolve_model(name)


def test_a_gguf_file_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "sha256-0011").write_bytes(b"GGUF" + bytes(20))
    assert resolve_model("./sha256-0011").kind == "gguf"


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    (model(tmp_path / "m")).chmod(0)
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "f").chmod(0)
    for name in ("./m", "./f"):
        with pytest.raises(ModelError, match=r"Permission denied; give the user who runs ingle the right"):
            resolve_model(name)
    (tmp_path / "m").chmod(0o700)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": "Repository not found"}', "what a server said"),
        (b"<html>", "a web page stands"),
        (POINTER, "git-lfs pointer"),
    ],
)
def test_in_place_of_a_config(content: bytes, message: str, tmp_path: Path) -> None:
    (model(tmp_path / "m") / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=rf"m/config.json: .*{message}"):
        read_config(tmp_path / "m")
