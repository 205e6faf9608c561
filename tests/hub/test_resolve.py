from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ingle.errors import ModelError
from ingle.hub.resolve import ModelSource, ensure_model, resolve_model
from ingle.hub.store import Store
from tests.hub.toy import Recorder, ToyModel


@pytest.fixture(autouse=True)
def _only_the_toy(toy: ToyModel, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text("{}")
    source = ModelSource("llama", tmp_path / "llama", "folder")
    assert resolve_model("llama") == source
    assert resolve_model("./llama").path == source.path
    assert resolve_model(str(source.path)) == ModelSource(str(source.path), source.path, "folder")
    assert ensure_model("llama") == source


def test_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.GGUF").write_bytes(b"GGUF")
    assert resolve_model("a.GGUF") == ModelSource("a.GGUF", tmp_path / "a.GGUF", "gguf")


def test_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model("~/a.gguf").path == tmp_path / "a.gguf"


def test_short_name_is_pulled_once(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    with pytest.raises(ModelError, match="toy:1b is not on this machine yet: run `ingle pull toy:1b`"):
        resolve_model("toy")

    place = store.partial("toy:1b") / "wheel" / toy.wheel.name
    place.parent.mkdir(parents=True)
    shutil.copy(toy.wheel, place)
    source = ensure_model("toy", recorder)

    assert source == ModelSource("toy:1b", store.get("toy:1b").path, "gguf")
    assert recorder.notes == ["toy:1b is not on this machine yet: pulling it"]
    assert resolve_model("Toy:1B") == resolve_model("toy") == ensure_model("toy", recorder) == source
    assert len(recorder.notes) == 1


def test_a_folder_without_config_does_not_hide_a_short_name(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    with pytest.raises(ModelError, match="ingle pull toy:1b"):
        resolve_model("toy")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tojj:1b", "did you mean toy:1b"),
        ("qwen3", "there is no model qwen3: `ingle catalog` lists"),
        ("missing.gguf", "there is no file or folder 'missing.gguf'"),
        (
            "some/repo",
            "some/repo is not on this machine yet: run `ingle pull some/repo`|cannot be reached",
        ),
        ("some/repo/", "run `ingle pull some/repo`|cannot be reached"),
        ("some/repo/Q8_0/x.gguf", "run `ingle pull some/repo:Q8_0/x.gguf`|cannot be reached"),
        ("some/repo:x.gguf", "run `ingle pull some/repo:x.gguf`|cannot be reached"),
        ("quants/q8/x.gguf", "there is no file or folder 'quants/q8/x.gguf'"),
        ("./empty", "is empty, so it is not"),
        ("./quants", "give its path: quants/b.gguf"),
        ("./adapter", "holds an adapter .* merge both"),
        ("./linked", r"linked/config.json: a link to ../../blobs/1f, which is not there: copy or mount"),
        ("./models--org--name", "cache of the Hugging Face hub; give the model in it: models--org--name/snapshots/1f"),
        ("./linked.gguf", r"linked.gguf: a link to ../../blobs/1f, which is not there"),
        ("./notes.txt", "notes.txt is not a .gguf file"),
        ("", "is neither a path that exists nor"),
        ("../x", "no file or folder"),
        ("a\0b", "neither a path"),
        ("./a\0b", "no file or folder"),
        ("x" * 5000, "neither a path|cannot be looked up"),
        ("./" + "x" * 5000, "no file or folder|cannot be looked up"),
        ("~nobody-of-that-name/x", "cannot be looked up"),
        ("two words", "neither a path"),
    ],
)
def test_what_is_no_model(tmp_path: Path, name: str, message: str) -> None:
    for folder in ("empty", "quants", "adapter", "linked", "models--org--name/snapshots/1f"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "linked.gguf").symlink_to("../../blobs/1f")
    (tmp_path / "linked" / "config.json").symlink_to("../../blobs/1f")
    (tmp_path / "models--org--name" / "snapshots" / "1f" / "config.json").write_text("{}")
    (tmp_path / "quants" / "b.gguf").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    for find in (resolve_model, ensure_model):
        with pytest.raises(ModelError, match=message) as error:
            find(name)
        assert len(str(error.value)) < 400
        assert str(error.value).isprintable()
