"""pull, list, rm and search, with a hub and the caches that it fills."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ingle.hub.caches import cached_models, remove_cached
from ingle.hub.download import PART
from ingle.hub.origins import huggingface
from ingle.hub.progress import QuietProgress
from ingle.hub.resolve import pull_model
from ingle.hub.store import Store
from ingle.hub.urls import url_folder
from tests.cli.conftest import Run
from tests.cli.pseudo_terminal import CTRL_C, PseudoTerminal
from tests.hub.conftest import hub, store  # noqa: F401
from tests.hub.repos import CONFIG, SMALL, gguf_repo, sharded, single
from tests.hub.server import Fault, Hub, Repo

BERT = {"architectures": ["BertModel"], "model_type": "bert"}
GGUF_URL = "https://example.org/models/mine.gguf"


@pytest.fixture(autouse=True)
def at_hub(ingle: Run, hub: Hub) -> Hub:  # noqa: F811
    hub.repos |= {"org/tiny": single(), "org/gguf": gguf_repo(), "org/other": single(50_000)}
    return hub


def cache() -> Path:
    return huggingface.cache_folder()


def put(repo: str, files: dict[str, bytes], commit: str = "b" * 40, main: bool = True) -> Path:
    """As huggingface_hub lays a repository out; returns its snapshot."""
    storage = cache() / huggingface.storage_name(repo)
    snapshot = storage / "snapshots" / commit
    for name, content in files.items():
        blob = storage / "blobs" / f"{hash(content) & (1 << 64) - 1:040x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    if main:
        (storage / "refs").mkdir(exist_ok=True)
        (storage / "refs" / "main").write_text(commit)
    return snapshot


def put_url(content: bytes = b"GGUF" + bytes(96)) -> Path:
    folder = url_folder(GGUF_URL, Store())
    folder.mkdir(parents=True)
    (folder / "url").write_text(GGUF_URL)
    (folder / "mine.gguf").write_bytes(content)
    return folder


def listed(ingle: Run) -> dict[str, dict[str, Any]]:
    return {held["name"]: held for held in json.loads(ingle("list", "--json").out)}


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, *answers: str) -> list[str]:
    """Answers in turn; returns what was asked."""
    asked, left = list[str](), list(answers)

    def reply(question: str) -> str:
        asked.append(question)
        return left.pop(0)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", reply)
    return asked


def test_list_of_all_places(ingle: Run, tmp_path: Path) -> None:
    assert ingle("pull", "org/tiny", "org/gguf:Q8_0").code == 0
    put_url()
    scope = tmp_path / "modelscope" / "models" / "org--ms" / "snapshots" / "master"
    scope.mkdir(parents=True)
    for name, content in {**SMALL, "model.safetensors": b"x" * 700}.items():
        (scope / name).write_bytes(content)
    held = listed(ingle)
    assert {name: (each["format"], each["place"]) for name, each in held.items()} == {
        GGUF_URL: ("GGUF", "url"),
        "org/gguf:Q8_0": ("GGUF", "huggingface"),
        "org/tiny": ("safetensors", "huggingface"),
        "modelscope:org/ms": ("safetensors", "modelscope"),
    }
    assert held[GGUF_URL]["size"] == 100 and held["org/gguf:Q8_0"]["size"] == 8004
    assert held["org/tiny"]["size"] > 100_000 and held["org/tiny"]["last_used"] > 1_700_000_000
    table = ingle("list")
    assert (table.code, table.err, len(table.out.splitlines())) == (0, "", 5)


def test_list_of_what_was_interrupted(ingle: Run, at_hub: Hub) -> None:
    at_hub.faults.append(Fault(r"cdn/.*tiny", cut_after=5_000, times=1))
    at_hub.faults.append(Fault(r"cdn/.*tiny", status=404))
    assert ingle("pull", "org/tiny").code == 1
    put_url().joinpath("mine.gguf").rename(url_folder(GGUF_URL, Store()) / f"mine.gguf{PART}")
    held = listed(ingle)
    assert {each["format"] for each in held.values()} == {"interrupted"} and set(held) == {GGUF_URL, "org/tiny"}
    assert 5_000 < held["org/tiny"]["size"] < 20_000
    assert ingle("rm", "org/tiny", GGUF_URL).code == 0
    assert listed(ingle) == {} and not (cache() / "models--org--tiny").exists()


def test_list_leaves_out_what_ingle_cannot_serve(ingle: Run) -> None:
    put("org/bert", {**SMALL, "config.json": json.dumps(BERT).encode(), "model.safetensors": b"1" * 99})
    packed = {**CONFIG, "quantization_config": {"quant_method": "exl2"}}
    put("org/packed", {**SMALL, "config.json": json.dumps(packed).encode(), "model.safetensors": b"2" * 99})
    pooling = b'[{"type": "sentence_transformers.models.Pooling"}]'
    put("org/embeds", {**SMALL, "modules.json": pooling, "model.safetensors": b"3"})
    put("org/config-only", {"config.json": b"{}"})
    put("org/low", {"M-IQ1_S.gguf": b"GGUF4"})
    (cache() / "datasets--org--data" / "snapshots" / "c").mkdir(parents=True)
    (cache() / "models--org--empty" / ".no_exist" / "c").mkdir(parents=True)
    assert listed(ingle) == {}
    assert "there is no org/bert on this machine" in ingle("rm", "org/bert").err
    assert (cache() / "models--org--bert").exists()


def test_list_goes_on_past_what_may_not_be_read(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    put("org/theirs", {**SMALL, "model.safetensors": b"1"})
    put("org/mine", {**SMALL, "model.safetensors": b"2"})
    look = Path.iterdir

    def refused(path: Path) -> Any:
        if "theirs" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(Path, "iterdir", refused)
    monkeypatch.setattr("ingle.hub.caches._listed", lambda folder: [each for each in look(folder) if each.is_dir()])
    assert {name: each["format"] for name, each in listed(ingle).items()} == {
        "org/mine": "safetensors",
        "org/theirs": "unreadable",
    }
    told = ingle("list")
    assert told.code == 0 and "Permission denied" in told.err and told.err.count("\n") == 1
    failed = ingle("show", "org/theirs")
    assert failed.code == 1 and "Permission denied" in failed.err and "get the right to it" in failed.err


def test_rm_of_one_quantization_of_several(ingle: Run) -> None:
    assert ingle("pull", "org/gguf:Q8_0", "org/gguf:Q4_K_M", "org/gguf:F16").code == 0
    assert ingle("rm", "org/gguf:q8_0").out == "removed org/gguf:Q8_0, 8.0 kB\n"
    assert set(listed(ingle)) == {"org/gguf:Q4_K_M", "org/gguf:F16"}
    assert len(list((cache() / "models--org--gguf" / "blobs").iterdir())) == 3
    assert ingle("rm", "hf.co/org/gguf:M-Q4_K_M.gguf").out == "removed org/gguf:Q4_K_M, 4.0 kB\n"
    assert ingle("rm", "org/gguf:F16").code == 0
    assert not (cache() / "models--org--gguf").exists()


def test_rm_of_a_quantization_as_llama_cpp_calls_it(ingle: Run) -> None:
    assert ingle("pull", "org/gguf:Q8_0", "org/gguf:Q4_K_M").code == 0
    assert ingle("rm", "org/gguf:Q4_K").out == "removed org/gguf:Q4_K_M, 4.0 kB\n"
    assert "there is no org/gguf:Q2_K on" in ingle("rm", "org/gguf:Q2_K").err


def test_rm_of_all_of_a_repository(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked for; what is not agreed to stays whole."""
    snapshot = put(
        "org/both", {**SMALL, "model.safetensors": b"w" * 99, "M-Q8_0.gguf": b"GGUF8", "M-Q4_0.gguf": b"GGUF4"}
    )
    asked = on_a_terminal(monkeypatch, "y", "n", "y")
    result = ingle("rm", "Org/Both")
    assert [question.partition(",")[0] for question in asked] == [
        "Remove org/both", "Remove org/both:Q4_0", "Remove org/both:Q8_0",
    ]  # fmt: skip
    assert result.out.splitlines()[1] == "org/both:Q4_0 stays"
    assert [path.name for path in snapshot.iterdir()] == ["M-Q4_0.gguf"]
    assert (snapshot / "M-Q4_0.gguf").read_bytes() == b"GGUF4"
    assert list(listed(ingle)) == ["org/both:Q4_0"]


def test_rm_of_several_names_and_unknown_ones(ingle: Run) -> None:
    assert ingle("pull", "org/tiny", "org/other").code == 0
    result = ingle("rm", "org/tiny", "org/none")
    assert (result.code, result.out) == (1, "") and "there is no org/none on this machine; `ingle list`" in result.err
    assert set(listed(ingle)) == {"org/tiny", "org/other"}
    result = ingle("rm", "org/tiny", "org/other", "org/tiny")
    assert (result.code, result.out.count("removed")) == (0, 2)
    assert listed(ingle) == {}


def test_rm_of_a_revision_removes_no_other(ingle: Run) -> None:
    assert ingle("pull", "org/tiny").code == 0
    result = ingle("rm", "org/tiny@v1")
    assert result.code == 1 and "`ingle rm org/tiny` removes all of them" in result.err
    assert list(listed(ingle)) == ["org/tiny"]


def test_rm_of_several_revisions_and_bytes_that_are_shared(ingle: Run) -> None:
    files = {"M-Q8_0.gguf": b"GGUF8", "M-Q4_0.gguf": b"GGUF4"}
    old = put("org/two", files, "c" * 40)
    new = put(
        "org/two", {"M-Q8_0.gguf": b"GGUF8 newer", "copy-of-M.gguf": b"GGUF4", "M-Q4_0.gguf": b"GGUF4"} | {}, "d" * 40
    )
    assert ingle("rm", "org/two:Q4_0").code == 0
    assert set(listed(ingle)) == {"org/two:Q8_0", "org/two:copy-of-M"}
    assert (new / "copy-of-M.gguf").read_bytes() == b"GGUF4"
    assert ingle("rm", "org/two:Q8_0").code == 0
    assert list(listed(ingle)) == ["org/two:copy-of-M"]
    assert not any(old.iterdir()) and len(list((new.parents[1] / "blobs").iterdir())) == 1


def test_files_of_one_quantization_have_names_of_their_own(ingle: Run) -> None:
    names = ("Base-Q8_0.gguf", "Chat-Q8_0.gguf", "x/Q8_0.gguf", "y/Q8_0.gguf")
    put("org/many", {name: b"GGUF" + bytes(at) for at, name in enumerate(names)})
    assert set(listed(ingle)) == {
        "org/many:Q8_0",
        "org/many:Chat-Q8_0.gguf",
        "org/many:Q8_0.gguf",
        "org/many:y/Q8_0.gguf",
    }
    assert ingle("rm", "org/many:y/Q8_0.gguf").out == "removed org/many:y/Q8_0.gguf, 0.0 kB\n"
    assert ingle("rm", "org/many:Chat-Q8_0.gguf").code == 0
    assert len(listed(ingle)) == 2


def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    for name, content in {**SMALL, "model.safetensors": b"1", "M-Q8_0.gguf": b"GGUF"}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("where", ["file", "snapshot", "snapshots", "storage", "modelscope", "url"])
def test_rm_deletes_nothing_that_is_only_linked_to(ingle: Run, tmp_path: Path, where: str) -> None:
    folder = outside(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    storage, name = cache() / "models--org--link", "org/link"
    if where == "file":
        snapshot = put("org/link", {"M-Q4_0.gguf": b"GGUF4"})
        (snapshot / "M-Q8_0.gguf").symlink_to(folder / "M-Q8_0.gguf")
    elif where == "snapshot":
        put("org/link", {"M-Q4_0.gguf": b"GGUF4"})
        (storage / "snapshots" / ("e" * 40)).symlink_to(folder)
    elif where == "snapshots":
        storage.mkdir(parents=True)
        (folder / ("e" * 40)).symlink_to(".")
        (storage / "snapshots").symlink_to(folder)
    elif where == "storage":
        (folder / "snapshots").mkdir()
        (folder / "snapshots" / ("e" * 40)).symlink_to("..")
        cache().mkdir(parents=True)
        storage.symlink_to(folder)
    elif where == "modelscope":
        (tmp_path / "modelscope" / "hub" / "org").mkdir(parents=True)
        (tmp_path / "modelscope" / "hub" / "org" / "link").symlink_to(folder)
        name = "modelscope:org/link"
    else:
        put_url()
        (url_folder(GGUF_URL, Store()) / "mine.gguf").unlink()
        (url_folder(GGUF_URL, Store()) / "mine.gguf").symlink_to(folder / "M-Q8_0.gguf")
        name = GGUF_URL
    assert name in " ".join(listed(ingle))
    result = ingle("rm", name if where != "file" else "org/link:Q8_0")
    assert result.code == (1 if where in ("storage", "modelscope") else 0)
    assert ("is but a link; delete both yourself" in result.err) is (result.code == 1)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_rm_of_what_is_just_being_pulled(ingle: Run) -> None:
    from ingle.hub.disk import locked

    assert ingle("pull", "org/tiny").code == 0
    lock = huggingface.lock_file(cache(), "models--org--tiny")
    with locked(lock):
        result = ingle("rm", "org/tiny")
    assert result.code == 1 and "org/tiny is just being pulled; end that first" in result.err
    assert ingle("rm", "org/tiny").code == 0 and lock.exists()


def test_rm_keeps_what_came_while_it_asked(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ingle("pull", "org/gguf:Q8_0").code == 0

    def reply(question: str) -> str:
        pull_model("org/gguf:Q4_K_M", QuietProgress())
        return "y"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", reply)
    assert ingle("rm", "org/gguf:Q8_0").code == 0
    assert list(listed(ingle)) == ["org/gguf:Q4_K_M"]


def test_rm_of_what_was_interrupted_beside_what_is_whole(ingle: Run, at_hub: Hub) -> None:
    """The beginnings of files go, and those that came whole before them."""
    assert ingle("pull", "org/gguf:Q8_0").code == 0
    at_hub.faults.append(Fault("cdn/.*00002-of", cut_after=3_000, times=1))
    at_hub.faults.append(Fault("cdn/.*00002-of", status=404))
    assert ingle("pull", "org/gguf:F16").code == 1
    held = listed(ingle)
    assert {name: each["format"] for name, each in held.items()} == {
        "org/gguf:Q8_0": "GGUF",
        "org/gguf": "interrupted",
    }
    assert held["org/gguf"]["size"] in (3_000, 12_004)  # the first part had come, or not yet
    assert ingle("rm", "org/gguf:Q8_0").code == 0 and list(listed(ingle)) == ["org/gguf"]
    assert ingle("pull", "org/gguf:Q8_0").code == 0
    storage = cache() / "models--org--gguf"
    left = [held for held in cached_models() if held.format == "interrupted"]
    remove_cached(left[0])
    assert len(list((storage / "blobs").iterdir())) == 1 and list(listed(ingle)) == ["org/gguf:Q8_0"]


def test_rm_of_a_model_of_modelscopes_package_takes_its_link_along(ingle: Run, tmp_path: Path) -> None:
    owner = tmp_path / "modelscope" / "hub" / "models" / "org"
    (owner / "M1___5").mkdir(parents=True)
    for name, content in {**SMALL, "model.safetensors": b"1"}.items():
        (owner / "M1___5" / name).write_bytes(content)
    (owner / "M1.5").symlink_to("M1___5")
    assert list(listed(ingle)) == ["modelscope:org/M1.5"]
    assert ingle("rm", "org/M1.5", "--hub", "modelscope").code == 0
    assert list(owner.iterdir()) == []


def test_search(ingle: Run, at_hub: Hub) -> None:
    at_hub.repos["org/tiny"].gated = "manual"
    result = ingle("search", "TINY")
    assert (result.code, result.err) == (0, "")
    assert [line.split() for line in result.out.splitlines()] == [
        ["NAME", "DOWNLOADS", "LIKES", "TASK"],
        ["org/tiny", "100", "3", "text-generation,", "gated"],
    ]
    assert len(ingle("search", "org", "--limit", "2").out.splitlines()) == 3
    [found] = json.loads(ingle("search", "gguf", "--json").out)
    assert found == {"name": "org/gguf", "downloads": 100, "likes": 3, "task": "text-generation", "gated": False}


def test_search_for_nothing(ingle: Run) -> None:
    result = ingle("search", "no", "such\x1b")
    assert (result.code, result.out) == (1, "")
    assert "huggingface has no model with 'no such\\x1b' in its name; try fewer words" in result.err
    assert ingle("search", "nothing", "--json").out == "[]\n"
    assert ingle("search").code == ingle("search", "  ").code == ingle("search", "x", "--limit", "0").code == 2


def test_search_on_modelscope(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingle.hub.listing import Found
    from ingle.hub.origins.modelscope import ModelScope

    monkeypatch.setattr(ModelScope, "search", lambda self, words, limit: [Found(f"org/{words}", 1_234_567)])
    assert ingle("search", "m", "--hub", "modelscope").out.splitlines()[1].split() == ["modelscope:org/m", "1.2M"]
    [found] = json.loads(ingle("search", "m", "--hub", "ms", "--json").out)
    assert found["name"] == "modelscope:org/m"


def test_pull_of_several_of_which_one_fails(ingle: Run) -> None:
    result = ingle("pull", "org/tiny", "org/none", "org/other")
    assert result.code == 1
    assert [line.partition(": ")[0] for line in result.out.splitlines()] == ["org/tiny is here", "org/other is here"]
    assert "has no public model org/none" in result.err
    assert result.err.splitlines()[-1] == "ingle: 1 of 3 models were not pulled: org/none"


def test_pull_quietly_and_by_patterns(ingle: Run) -> None:
    result = ingle("pull", "org/tiny", "--quiet", "--include", "*.json", "--exclude", "gen*")
    assert (result.code, result.err) == (0, "")
    folder = Path(result.out.strip())
    assert {path.name for path in folder.glob("*.json")} == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "no file that matches '*.pt'" in ingle("pull", "org/tiny", "--include", "*.pt").err
    assert "--exclude leaves nothing of org/gguf:Q8_0" in ingle("pull", "org/gguf:Q8_0", "--exclude", "*.gguf").err
    assert ingle("pull", GGUF_URL, "--include", "*").code == 2
    assert ingle("pull", "smollm2", "--revision", "v1").code == 2
    assert ingle("pull").code == 2


def test_what_a_hub_says_cannot_reach_the_terminal(ingle: Run, at_hub: Hub) -> None:
    at_hub.repos["org/tiny"].card = {"license": "\x1b]0;evil\x07"}
    told = ingle("pull", "org/tiny").err
    assert "terms: \\x1b]0;evil\\x07" in told and "\x1b" not in told


def in_terminal(hub: Hub, tmp_path: Path, *words: str, columns: int = 80) -> PseudoTerminal:  # noqa: F811
    return PseudoTerminal(
        *("-m", "ingle", *words), home=tmp_path / "home", columns=columns, COLUMNS="",
        HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_CACHE=str(cache()), TMPDIR=str(tmp_path),
    )  # fmt: skip


@pytest.mark.parametrize("columns", [80, 40])
def test_bars_of_many_files(tmp_path: Path, at_hub: Hub, columns: int) -> None:
    """Only what is coming is shown, a line each, and nothing of it stays."""
    at_hub.repos["org/many"] = Repo({**SMALL, **sharded(30, 60_000)})
    at_hub.faults.append(Fault("cdn", pause_s=0.01))
    with in_terminal(at_hub, tmp_path, "pull", "org/many", columns=columns) as terminal:
        terminal.until(lambda: sum("  model-" in line for line in terminal.lines()) >= 4, "four bars")
        for _ in range(10):
            terminal._read(0.05)
            bars = [line for line in terminal.lines() if line.startswith("  model-0")]
            assert len(bars) <= 5 and all("B/s" in line or "?" in line for line in bars)
        assert any(line.startswith("pulling org/many") and "B/s" in line for line in terminal.lines())
        assert terminal.ends() == 0
        lines = terminal.lines()
    assert not any("model-0" in line or "getting ready" in line for line in lines)
    assert sum(line.startswith("pulling org/many") for line in lines) == 1


@pytest.mark.parametrize("end", [CTRL_C, signal.SIGTERM])
def test_a_pull_that_is_ended(ingle: Run, tmp_path: Path, at_hub: Hub, end: str | signal.Signals) -> None:
    slow = Fault("cdn", pause_s=0.1)
    at_hub.faults.append(slow)
    with in_terminal(at_hub, tmp_path, "pull", "org/tiny") as terminal:
        terminal.until(lambda: any("0/100.0 kB" not in x and "/100.0 kB" in x for x in terminal.lines()), "a bar")
        if isinstance(end, str):
            terminal.type(end)
        else:
            terminal.process.send_signal(end)
        assert terminal.ends() == (130 if isinstance(end, str) else 143)
        assert terminal.seen.rstrip().endswith(b"\x1b[?25h") or b"interrupted: what has come stays" in terminal.seen
    at_hub.faults.clear()
    assert listed(ingle)["org/tiny"]["format"] == "interrupted"
    assert ingle("pull", "org/tiny").code == 0
    assert at_hub.starts[-1] > 0 and listed(ingle)["org/tiny"]["format"] == "safetensors"


@pytest.mark.parametrize("command", ["show", "plan"])
def test_what_only_looks_leaves_nothing_when_it_is_ended(tmp_path: Path, at_hub: Hub, command: str) -> None:
    at_hub.faults.append(Fault("cdn", pause_s=1.0))
    with in_terminal(at_hub, tmp_path, command, "org/tiny") as terminal:
        deadline = time.monotonic() + 20
        while not any("/cdn" in asked for asked in at_hub.asked) and time.monotonic() < deadline:
            terminal._read(0.02)
        assert list(tmp_path.glob("ingle-*"))
        terminal.process.terminate()
        assert terminal.ends() == 143
    assert not list(tmp_path.glob("ingle-*"))
