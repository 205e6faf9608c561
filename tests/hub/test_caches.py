"""Hugging Face's cache as other tools, disks and users leave it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ingle.errors import ModelError
from ingle.hub import disk
from ingle.hub.caches import cached_models
from ingle.hub.origins import huggingface
from ingle.hub.resolve import ensure_model, pull_model, resolve_model
from tests.hub.repos import SMALL, data, files_in, single
from tests.hub.server import Fault, Hub, Repo
from tests.hub.toy import Recorder

NEEDED = {*SMALL, "README.md", "model.safetensors"}


def storage() -> Path:
    return huggingface.cache_folder() / "models--org--tiny"


@pytest.fixture
def tiny(hub: Hub, recorder: Recorder) -> Path:
    """Its snapshot, as ingle has pulled it."""
    hub.repos["org/tiny"] = single()
    path = pull_model("org/tiny", recorder).path
    hub.asked.clear()
    hub.sent = 0
    return path


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "symlink_to", refused)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b", "HF_HOME": "/c", "XDG_CACHE_HOME": "/d"}, "/b"),
        ({"HF_HOME": "~/c", "XDG_CACHE_HOME": "/d"}, "/home/me/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], place: str) -> None:
    code = "from ingle.hub.origins.huggingface import cache_folder; print(cache_folder())"
    inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", code]
    shown = subprocess.run(
        command, env={**inherited, "HOME": "/home/me", **environment}, capture_output=True, text=True
    )
    assert shown.stdout == f"{place}\n", shown.stderr


def test_files_without_links_are_used_and_lie_there_once(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub leaves them on Windows' disks."""
    no_links(monkeypatch)
    hub.repos["org/tiny"] = Repo({**single().files, "same.json": SMALL["tokenizer.json"]})
    path = pull_model("org/tiny", recorder).path
    assert files_in(path) == {*NEEDED, "same.json"}
    assert not any(file.is_symlink() for file in path.iterdir()) and not any((storage() / "blobs").iterdir())
    assert (path / "same.json").read_bytes() == (path / "tokenizer.json").read_bytes() == SMALL["tokenizer.json"]
    sent = hub.sent
    assert pull_model("org/tiny", recorder).path == path and hub.sent == sent

    (path / "model.safetensors").write_bytes(b"cut while it was copied")
    assert pull_model("org/tiny", recorder).path == path
    assert (path / "model.safetensors").read_bytes() == hub.repos["org/tiny"].files["model.safetensors"]


def test_a_branch_that_leads_to_no_snapshot(hub: Hub, tiny: Path) -> None:
    (storage() / "refs" / "main").write_text("c" * 40)
    assert resolve_model("org/tiny").path == tiny


def test_a_branch_that_leads_to_a_configuration_alone(hub: Hub, tiny: Path) -> None:
    """As AutoConfig.from_pretrained leaves it once the branch has moved on."""
    later = storage() / "snapshots" / ("c" * 40)
    later.mkdir()
    (later / "config.json").write_bytes(SMALL["config.json"])
    (storage() / "refs" / "main").write_text("c" * 40)
    (storage() / ".no_exist" / ("c" * 40)).mkdir(parents=True)
    assert ensure_model("org/tiny").path == tiny and not hub.asked
    with pytest.raises(ModelError, match="not on this machine yet"):
        resolve_model(f"org/tiny@{'c' * 40}")


@pytest.mark.parametrize("content", ["../../../etc", "x" * 40, "", "\udcff"])
def test_a_branch_that_leads_elsewhere_is_not_followed(tiny: Path, content: str) -> None:
    (storage() / "refs" / "main").write_bytes(content.encode(errors="surrogateescape"))
    assert resolve_model("org/tiny").path == tiny


def test_several_snapshots(hub: Hub, tiny: Path, recorder: Recorder) -> None:
    hub.repos["org/tiny"] = Repo({**single().files, "model.safetensors": data(90_000, 9)}, commit="c" * 40)
    assert ensure_model("org/tiny", recorder).path == tiny
    newer = pull_model("org/tiny", recorder).path
    assert newer != tiny and resolve_model("org/tiny").path == newer
    assert resolve_model(f"org/tiny@{tiny.name[:8]}").path == tiny
    [model] = cached_models()
    assert 190_000 < model.size < 200_000  # both, and what they share once


def test_bytes_that_are_not_whole_are_fetched_again(hub: Hub, tiny: Path, recorder: Recorder) -> None:
    blob = (tiny / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:5000])
    pull_model("org/tiny", recorder)
    assert (tiny / "model.safetensors").read_bytes() == hub.repos["org/tiny"].files["model.safetensors"]


def test_a_disk_that_can_only_be_read(
    hub: Hub, tiny: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is whole there is used, also by a pull; what is not is told with what to do."""
    opened = os.open

    def refused(path: str, flags: int, *rest: int, **also: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *rest, **also)

    monkeypatch.setattr(disk.os, "open", refused)
    assert ensure_model("org/tiny", recorder).path == tiny
    assert pull_model("org/tiny", recorder).path == tiny
    assert "Read-only file system" in recorder.notes[-1] and "what is here of org/tiny is whole" in recorder.notes[-1]
    hub.repos["org/other"] = single()
    with pytest.raises(ModelError, match=r"cannot pull org/other: Read-only file system: .*ingle\.lock; get the right"):
        pull_model("org/other", recorder)


def test_wrong_bytes_over_a_bad_line_come_to_an_end(
    hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose file is not the listed one, and which is cut again and again: one more try, not one after another
    for ever."""
    monkeypatch.setattr("ingle.hub.http.RETRY_DELAYS_S", (0.0,))
    monkeypatch.setattr("ingle.hub.download.RETRY_DELAYS_S", (0.0,))
    hub.repos["org/tiny"] = single(90_000)
    hub.faults.append(Fault("cdn", instead=data(90_000, 7), cut_after=40_000))
    with pytest.raises(ModelError, match=r"model\.safetensors: what came has SHA-256 .*, and the hub says"):
        pull_model("org/tiny", recorder)
    assert len([path for path in hub.asked if "cdn" in path]) == 6


def test_a_file_system_without_locks(hub: Hub, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refused)
    hub.repos["org/tiny"] = single()
    assert files_in(pull_model("org/tiny", recorder).path) == NEEDED
