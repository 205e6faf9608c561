"""Memory, limits and disk, on machines that a folder stands for."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from ingle.doctor import machine
from ingle.doctor.finding import Finding
from tests.doctor.fakes import FakeHere, findings

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")


# ---- memory and limits


@pytest.mark.parametrize(("free", "state"), [(100 << 20, "fail"), (1 * GIB, "warn"), (16 * GIB, "ok")])
def test_memory(free: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       33554432 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr("ingle.engine.memory.free_host_bytes", lambda: free)
    [line] = findings(machine.check_memory, FakeHere(root=tmp_path))
    assert line.state == state and " of 32.00 GiB free" in line.text


def control_group(root: Path, **files: str) -> None:
    folder = root / "sys/fs/cgroup"
    (root / "proc/self").mkdir(parents=True)
    folder.mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "proc/self/mountinfo").write_text("30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n")
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_a_control_group_that_grants_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_group(tmp_path, cpu_max="50000 100000\n", memory_max=f"{GIB}\n", memory_current="0\n")
    monkeypatch.setattr("ingle.engine.memory.free_host_bytes", lambda: GIB)
    here = FakeHere(root=tmp_path)
    [memory] = findings(machine.check_memory, here)
    assert memory.state == "warn" and "a control group (container, service) grants no more" in memory.text
    assert any("grants 0.5 processors' time" in each.text for each in findings(machine.check_limits, here))


@pytest.mark.parametrize(
    ("soft", "hard", "state", "words"),
    [
        (64, 64, "fail", "64 open files (ulimit -n) are too few"),
        (1024, 1024, "warn", "fewer connections than a server takes"),
        (1024, 1 << 20, "ok", "(a server raises 1024 to what it needs)"),
        (1024, resource.RLIM_INFINITY, "ok", "open files unlimited"),
    ],
)
def test_open_files(
    soft: int, hard: int, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {resource.RLIMIT_NOFILE: (soft, hard)}
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, unlimited))
    assert any(
        each.state == state and words in each.text for each in findings(machine.check_limits, FakeHere(root=tmp_path))
    )


def test_a_limit_of_address_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (GIB, GIB) if kind == resource.RLIMIT_AS else real(kind))
    found = findings(machine.check_limits, FakeHere(root=tmp_path))
    assert Finding("check", "warn", "ulimit -v allows a process 1.00 GiB", "ulimit -v unlimited") in found


# ---- disk


def disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setenv("INGLE_HOME", str(folder))
    return findings(machine.check_disk, FakeHere())[0]


@pytest.mark.parametrize(
    ("free", "state", "words"),
    [(0, "fail", "the disk is full"), (5 * GIB, "warn", "not much for models"), (500 * GIB, "ok", "writable")],
)
def test_free_disk(free: int, state: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000 * GIB, 1000 * GIB - free, free))
    line = disk(tmp_path, monkeypatch)
    assert line.state == state and words in line.text


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "your quota is used up"),
        (errno.EROFS, "cannot be written to: Read-only file system"),
        (errno.EACCES, "cannot be written to: Permission denied"),
        (errno.EIO, "cannot be written to: Input/output error"),
    ],
)
def test_a_disk_that_refuses_a_file(number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    line = disk(tmp_path, monkeypatch)
    assert line.state == "fail" and words in line.text and line.advice is not None


def test_no_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = list(os.statvfs(tmp_path))
    real[5:8] = [1000, 0, 0]
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(real))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000 * GIB, 0, 1000 * GIB))
    line = disk(tmp_path, monkeypatch)
    assert line.state == "fail" and "no inode" in line.text


def test_a_file_in_the_place_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").touch()
    line = disk(tmp_path / "home", monkeypatch)
    assert line.state == "fail" and "is not a folder" in line.text


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = disk(tmp_path / "a/b", monkeypatch)
    assert line.text.startswith(f"the store, {tmp_path}/a/b: ") and not (tmp_path / "a").exists()


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk(tmp_path, monkeypatch)
    assert list(tmp_path.iterdir()) == []
