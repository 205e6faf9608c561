from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.errors import ConfigError, ModelError
from ingle.home import home
from ingle.hub.store import Store, check_name
from tests.hub.toy import ToyModel


@pytest.fixture
def stored(toy: ToyModel, store: Store) -> Store:
    """The store with the toy in it."""
    with store.lock("toy:1b"):
        file = store.partial("toy:1b") / "anything"
        file.parent.mkdir()
        file.write_bytes(toy.content)
        store.install(toy.entry, file)
    return store


def test_install_get_remove(toy: ToyModel, stored: Store) -> None:
    model = stored.get("TOY:1B")
    assert stored.names() == ["toy:1b"]
    assert model.path.read_bytes() == toy.content
    assert (model.manifest.name, model.manifest.sha256, model.manifest.size) == (
        "toy:1b",
        toy.entry.sha256,
        toy.entry.size,
    )
    assert model.manifest.pulled_at.tzinfo is not None
    assert list((stored.root / "partial").iterdir()) == [stored.root / "partial" / "toy@1b.lock"]

    stored.remove("toy:1b")
    assert stored.names() == []
    assert list((stored.root / "models").iterdir()) == []
    for use in (stored.get, stored.remove):
        with pytest.raises(ModelError, match="toy:1b is not in the local store"):
            use("toy:1b")


HOSTILE = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\0b", "a" * 65, "a:b:c", ":a", "a:", "a@b", "a\nb", "-a", "ä"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_are_refused(store: Store, name: str) -> None:
    for use in (check_name, store.get, store.remove, store.partial):
        with pytest.raises(ModelError) as error:
            use(name)
        assert str(error.value).isprintable()
    assert not store.root.exists()


@given(st.text(max_size=140) | st.from_regex(r"[a-z0-9./:@_\\-]{0,20}", fullmatch=True))
def test_a_name_is_refused_or_stays_inside_the_store(name: str) -> None:
    store = Store(Path("/nowhere"))
    try:
        place = store.partial(name)
    except ModelError:
        return
    assert Path(os.path.normpath(place)) == place
    assert place.parent == store.root / "partial"
    assert len(place.name) <= 129 and ":" not in place.name
    assert place.name.replace("@", ":") == name.lower()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, "speaks of model 'other'"),
        ({"file": "../../secret"}, "file '../../secret'"),
        ({"file": "manifest.json"}, "file 'manifest.json'"),
        ({"file": "absent.gguf"}, "absent.gguf is missing"),
        ({"size": 3}, "has 5120004 bytes, its manifest says 3"),
        ({"size": "big"}, "Expected `int`"),
        ({"sha256": None}, "Expected `str`"),
    ],
)
def test_manifest_that_does_not_fit(stored: Store, change: dict[str, object], message: str) -> None:
    path = stored.get("toy:1b").path.with_name("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=r"toy:1b in the local store is damaged: .*run `ingle pull toy:1b`") as error:
        stored.get("toy:1b")
    assert message in str(error.value)
    assert stored.names() == ["toy:1b"]
    stored.remove("toy:1b")
    assert stored.names() == []


@pytest.mark.parametrize("target", ["elsewhere", "nothing"])
def test_a_model_that_is_a_link_is_removed_and_its_target_stays(stored: Store, tmp_path: Path, target: str) -> None:
    place = stored.root / "models" / "toy@1b"
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / target, target_is_directory=True)
    assert stored.names() == ["toy:1b"]
    stored.remove("toy:1b")
    assert stored.names() == [] and not place.is_symlink()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["manifest.json", "toy.gguf"]


def test_a_link_that_an_interrupted_removal_left_is_cleared_away(stored: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    stored.partial("toy:1b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    stored.remove("toy:1b")
    assert stored.names() == [] and (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[]", b" " * 70_000])
def test_manifest_that_is_none(stored: Store, raw: bytes) -> None:
    stored.get("toy:1b").path.with_name("manifest.json").write_bytes(raw)
    with pytest.raises(ModelError, match="is damaged"):
        stored.get("toy:1b")


def test_directories_that_are_no_models_are_not_listed(stored: Store) -> None:
    (stored.root / "models" / "Not A Model").mkdir()
    (stored.root / "models" / "file").write_text("")
    assert stored.names() == ["toy:1b"]


def test_lock_makes_the_second_wait(store: Store) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with store.lock("toy", waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with store.lock("toy", lambda: pytest.fail("nobody holds it")):
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_root_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("INGLE_HOME", raising=False)
    assert home() == tmp_path / ".cache" / "ingle"
    monkeypatch.setenv("INGLE_HOME", "~/models")
    assert home() == tmp_path / "models"


@pytest.mark.parametrize(
    ("ingle_home", "root"), [(None, "/.cache/ingle"), ("~", "/"), ("~/models", "/models"), ("/models", "/models")]
)
def test_root_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, ingle_home: str | None, root: str) -> None:
    """As a container has it that runs under any number: no HOME, and no line in /etc/passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("INGLE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", raising_key_error)
    if ingle_home is not None:
        monkeypatch.setenv("INGLE_HOME", ingle_home)
    assert home() == Path(root)


def raising_key_error(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def test_a_root_in_the_home_of_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGLE_HOME", "~nobody-of-that-name/models")
    with pytest.raises(ConfigError, match="INGLE_HOME is '~nobody-of-that-name/models', and there is no such user"):
        home()
