"""All checks together, and how they are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from ingle.cli.doctor import lines, summary
from ingle.config import EngineConfig
from ingle.doctor import checks, model, software
from ingle.doctor.checks import Check, run
from ingle.doctor.children import ProbeError, TookTooLong
from ingle.doctor.finding import Finding, Reporter
from ingle.doctor.here import Here, Once, Question
from ingle.kernels.cpu import compile
from tests.doctor.fakes import FakeHere, findings


def use(monkeypatch: pytest.MonkeyPatch, *functions: Callable[[Here, Reporter], None]) -> None:
    monkeypatch.setattr(checks, "CHECKS", tuple(Check(each.__name__, each) for each in functions))


def test_one_check_that_hangs_and_one_that_breaks_keep_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    never, waited = Event(), list[str]()

    def hangs(here: Here, report: Reporter) -> None:
        never.wait(30.0)

    def breaks(here: Here, report: Reporter) -> None:
        raise ZeroDivisionError("by\nzero")

    def whole(here: Here, report: Reporter) -> None:
        report.ok("fine")

    use(monkeypatch, hangs, breaks, whole)
    monkeypatch.setattr(checks, "_GRACE_S", 0.2)
    started = time.monotonic()
    first, second, third = run(Here(Question(timeout_s=0.05)), waited.append)
    assert time.monotonic() - started < 5.0
    never.set()
    assert (first.check, first.state) == ("hangs", "fail") and "does not come to an end" in first.text
    assert (second.state, second.text) == ("fail", "cannot be looked at: ZeroDivisionError: by")
    assert third == Finding("whole", "ok", "fine")
    assert waited and set(waited) == {"hangs"}


def test_checks_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Event(), Event()

    def one(here: Here, report: Reporter) -> None:
        first.set()
        report.ok(str(second.wait(10.0)))

    def other(here: Here, report: Reporter) -> None:
        second.set()
        report.ok(str(first.wait(10.0)))

    use(monkeypatch, one, other)
    assert [each.text for each in run(Here(Question()))] == ["True", "True"]


def test_what_ends_early_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleeps(here: Here, report: Reporter) -> None:
        try:
            here.children.run(["/bin/sleep", "60"], 60.0)
        finally:
            ended.set()

    def tells(here: Here, report: Reporter) -> None:
        report.ok("fine")

    ended = Event()
    use(monkeypatch, tells, sleeps)
    found = run(Here(Question()))
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert ended.wait(5.0)


def test_a_thing_is_looked_up_once() -> None:
    calls: list[int] = []

    def fails() -> int:
        calls.append(1)
        raise ProbeError("broken")

    once = Once(fails)
    for _ in range(2):
        with pytest.raises(ProbeError):
            once()
    assert calls == [1]


# ---- as people read it


def test_lines() -> None:
    finding = Finding("GPUs", "warn", "train\x1b[2J holds memory", "end it")
    assert lines(finding, "utf-8") == ["! GPUs      train\\x1b[2J holds memory", "            → end it"]
    assert lines(finding, "ascii")[1].strip() == "-> end it"
    assert lines(Finding("disk", "ok", "fine"), "utf-8") == ["✓ disk      fine"]
    assert lines(Finding("disk", "fail", "full"), "latin-1") == ["X  disk      full"]


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ("o", "all is well"),
        ("ow", "nothing to repair, 1 thing to know"),
        ("oww", "nothing to repair, 2 things to know"),
        ("of", "1 thing to repair"),
        ("ffw", "2 things to repair, 1 to know"),
    ],
)
def test_the_summary(states: str, words: str) -> None:
    names = {"o": "ok", "w": "warn", "f": "fail"}
    assert summary([Finding("disk", names[each], "") for each in states]) == words  # type: ignore[arg-type]


# ---- software


def missing(*names: str) -> Callable[..., object]:
    return lambda name, package=None: None if name in names else object()


def test_no_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", missing("torch"))
    monkeypatch.setenv("PATH", str(tmp_path))
    [line] = findings(software.check_torch, FakeHere(root=tmp_path))
    assert line.state == "warn" and "is not installed" in line.text and "make setup" in (line.advice or "")


def test_neither_pytorch_nor_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", missing("torch"))
    monkeypatch.setattr(compile, "prebuilt_file", lambda _: tmp_path / "none")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    here = FakeHere({"kernels": {"ready": False, "failure": "there is no C++ compiler", "instructions": ""}})
    [line] = findings(software.check_compiler, here)
    assert line.state == "fail" and "no C++ compiler" in line.text and "apt-get install g++" in (line.advice or "")
    assert findings(software.check_kernels, here) == [], "which is said once"


def test_a_compiler_that_is_too_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho \"g++: error: unrecognized command line option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    [line] = findings(software.check_compiler, FakeHere())
    assert line.state == "warn" and "unrecognized command line option '-std=c++20'" in line.text


def test_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    required = [
        "tyro>=99",
        "msgspec>=0.1",
        "absent[fast]!=2,>=1.5",
        "torch>=2.11",
        "transformers>=4",
        "httpx; extra == 'dev'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: required)
    failures = {"msgspec": "ImportError: _core.so: undefined symbol: PyList_Foo"}
    lack, broken = findings(software.check_packages, FakeHere({"packages": {"failures": failures}}))
    assert lack.state == "fail" and "is older than 99" in lack.text and "absent is not installed" in lack.text
    assert broken.state == "fail" and broken.text.startswith("msgspec cannot be imported: ImportError: _core.so")
    assert "torch" not in lack.text


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (TookTooLong("no answer within 10 s"), "importing it: no answer within 10 s"),
        (ProbeError("it crashed (SIGILL)"), "cannot be imported: it crashed (SIGILL)"),
        ({"version": "2.4.1", "cuda": None, "gpus": []}, "2.4.1 is older than ingle needs"),
    ],
)
def test_a_pytorch_that_will_not_do(
    answer: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    line = findings(software.check_torch, FakeHere({"torch": answer}, root=tmp_path))[0]
    assert line.state == "fail" and words in line.text and line.advice


# ---- a model


def test_what_of_a_model_would_fail() -> None:
    def check(answer: object) -> list[Finding]:
        return findings(model.check_model, FakeHere({"model": answer}, engine=EngineConfig("tiny")))

    runs = {"findings": [], "need": "1 GiB of memory", "fits": True, "path": "/tiny"}
    assert [each.text for each in check(runs)] == ["tiny runs here; it needs 1 GiB of memory"]
    [cut] = check({**runs, "fits": False})
    assert cut.state == "warn" and "`ingle plan tiny`" in (cut.advice or "")
    [refused] = check({**runs, "findings": [[True, "its tensors are cut off", "fetch it again"]]})
    assert refused == Finding("check", "fail", "tiny: its tensors are cut off", "fetch it again")
    noticed, whole = check({**runs, "findings": [[False, "tiny has no chat template", None]]})
    assert (noticed.state, whole.state) == ("warn", "ok") and noticed.text == "tiny has no chat template"
    [broken] = check(ProbeError("it crashed (SIGBUS)"))
    assert broken.state == "fail" and "SIGBUS" in broken.text
    assert findings(model.check_model, FakeHere()) == [], "none is asked about"
