"""Probes in processes of their own."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ingle.doctor.children import Children, ProbeError
from tests.doctor import fakes


def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch: str, timeout_s: float = 20.0) -> str:
    """How asking a PyTorch of this source ends."""
    packages = fakes.package(tmp_path / "packages", "torch", torch)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(packages), os.environ.get("PYTHONPATH")))))
    with pytest.raises(ProbeError) as error:
        Children().ask("torch", timeout_s)
    return f"{type(error.value).__name__}: {error.value}"


def test_a_crash_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert ask(tmp_path, monkeypatch, source) == "ProbeError: it crashed (SIGSEGV)"


def test_what_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"""
import subprocess, time
child = subprocess.Popen(["/bin/sleep", "300"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
time.sleep(300)
"""
    assert ask(tmp_path, monkeypatch, source, timeout_s=2.0) == "TookTooLong: no answer within 2 s"
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 5.0
    while status.exists() and ") Z " not in status.read_text():
        assert time.monotonic() < deadline, "its child runs on"
        time.sleep(0.02)


def test_what_a_library_prints_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "AttributeError" in ask(tmp_path, monkeypatch, "print('ingle-probe')")


def test_nothing_is_started_after_the_end() -> None:
    children = Children()
    children.end()
    with pytest.raises(ProbeError, match="was not started"):
        children.run(["/bin/true"], 1.0)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(ProbeError, match="cannot be started: No such file or directory"):
        Children().run(["/nowhere/nvidia-smi"], 1.0)


@pytest.mark.slow
def test_ranks_sum_up() -> None:
    answer = Children().ask("gloo", 120.0)
    assert answer["num_ranks"] == 2
    assert set(answer["seconds"]) == {str(8 << 10), str(64 << 20)}
