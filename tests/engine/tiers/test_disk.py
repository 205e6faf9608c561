"""Pages on a disk: what is believed of it, what goes first, and what happens when it is full."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.engine.tiers import disk
from ingle.engine.tiers.disk import HEAD_BYTES, DiskTier
from ingle.errors import ConfigError

from .test_host import OTHERS, OURS, name, page

PAGE_BYTES = 512
ON_DISK = 4096


def tier_in(folder: Path, num_pages: int = 100, identity: bytes = OURS) -> DiskTier:
    return DiskTier(folder, num_pages * ON_DISK, PAGE_BYTES, identity)


def is_there(tier: DiskTier, number: int) -> bool:
    out = np.zeros(PAGE_BYTES, np.uint8)
    return tier.read(name(number), out) and np.array_equal(out, page(number))


def file_of(folder: Path, number: int, identity: bytes = OURS) -> Path:
    (found,) = (folder / identity.hex()).rglob(f"{name(number).hex()}.kv")
    return found


def test_a_new_process_finds_what_was_kept_and_nobody_else_reads_it(tmp_path: Path) -> None:
    tier = tier_in(tmp_path / "cache")
    tier.write(name(1), page(1))
    assert is_there(tier, 1)
    after = tier_in(tmp_path / "cache")
    assert name(1) in after
    assert is_there(after, 1)
    assert name(1) not in tier_in(tmp_path / "cache", identity=OTHERS)
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        path.write_bytes(content + b"x")
    elif how == "altered":
        path.write_bytes(content[: HEAD_BYTES + 7] + bytes([content[HEAD_BYTES + 7] ^ 1]) + content[HEAD_BYTES + 8 :])
    elif how == "another version":
        path.write_bytes(b"I" + content[1:])
    elif how == "random":
        path.write_bytes(os.urandom(len(content)))
    elif how == "link":
        other = path.with_name("other")
        path.rename(other)
        path.symlink_to(other)
    elif how == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "unreadable":
        path.chmod(0)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "longer", "altered", "another version", "random", "link", "pipe", "folder"]
)
def test_a_file_that_is_not_as_it_was_written_is_ignored(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    tier_in(tmp_path).write(name(1), page(1))
    tier = tier_in(tmp_path)
    damage(file_of(tmp_path, 1), how)
    assert not is_there(tier, 1)
    assert name(1) not in tier
    assert tier.num_damaged == 1
    assert len(caplog.records) == 1
    assert "is not used" in caplog.text
    if how != "folder":
        tier.write(name(1), page(1))
        assert is_there(tier, 1)


def test_a_file_under_another_name_or_of_another_model_is_ignored(tmp_path: Path) -> None:
    for number in (1, 2):
        tier_in(tmp_path).write(name(number), page(number))
    tier_in(tmp_path, identity=OTHERS).write(name(3), page(3))
    file_of(tmp_path, 2).write_bytes(file_of(tmp_path, 1).read_bytes())
    copied = file_of(tmp_path, 1).with_name(f"{name(3).hex()}.kv")
    copied.write_bytes(file_of(tmp_path, 3, OTHERS).read_bytes())
    tier = tier_in(tmp_path)
    assert [number for number in (1, 2, 3) if is_there(tier, number)] == [1]


def test_many_damaged_files_cost_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = tier_in(tmp_path)
    for number in range(20):
        tier.write(name(number), page(number))
        damage(file_of(tmp_path, number), "truncated")
    assert not any(is_there(tier, number) for number in range(20))
    assert tier.num_damaged == 20
    assert len(caplog.records) == 1


def test_files_that_go_away_are_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tier = tier_in(tmp_path)
    tier.write(name(1), page(1))
    file_of(tmp_path, 1).unlink()
    assert not is_there(tier, 1)
    assert name(1) not in tier
    assert not caplog.records


@given(st.lists(st.tuples(st.sampled_from(["read", "write", "touch", "restart"]), st.integers(0, 7)), max_size=30))
@settings(max_examples=15, deadline=None)
def test_the_least_recently_used_goes_first(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("lru")
    tier, expected = tier_in(folder, 4), list[int]()
    for moment, (operation, number) in enumerate(operations):
        if operation == "restart":
            tier = tier_in(folder, 4)
        elif operation == "write":
            tier.write(name(number), page(number))
            if number not in expected:
                expected = [*expected, number][-4:]
                os.utime(file_of(folder, number), (moment, moment))
        else:
            found = is_there(tier, number) if operation == "read" else name(number) in tier
            assert found == (number in expected)
            if operation == "touch":
                tier.touch(name(number))
            if number in expected:
                expected.remove(number)
                expected.append(number)
                os.utime(file_of(folder, number), (moment, moment))
        assert sorted(n for n in range(8) if name(n) in tier) == sorted(expected)
        assert len(list(folder.rglob("*.kv"))) == len(expected)
        assert tier.num_bytes == len(expected) * ON_DISK


def test_what_other_models_left_goes_as_well(tmp_path: Path) -> None:
    old = tier_in(tmp_path, identity=OTHERS)
    for number in range(3):
        old.write(name(number), page(number))
        os.utime(file_of(tmp_path, number, OTHERS), (number, number))
    tier = tier_in(tmp_path, 4)
    for number in range(4):
        tier.write(name(number), page(number))
    assert all(is_there(tier, number) for number in range(4))
    assert not list((tmp_path).glob(OTHERS.hex()))


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    kept = [tmp_path / "notes.txt", tmp_path / OURS.hex() / "00" / "x.kv", tmp_path / "00" / f"{name(1).hex()}.kv"]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 9000)
    tier = tier_in(tmp_path, 1)
    for number in range(3):
        tier.write(name(number), page(number))
    assert tier.num_bytes == ON_DISK
    assert all(path.exists() for path in kept)


def test_what_a_killed_process_did_not_finish_is_taken_away(tmp_path: Path) -> None:
    tier_in(tmp_path).write(name(1), page(1))
    part = file_of(tmp_path, 1).with_name(f".{name(2).hex()}.77.0.part")
    fresh = file_of(tmp_path, 1).with_name(f".{name(3).hex()}.77.0.part")
    for path in (part, fresh):
        path.write_bytes(b"x")
    os.utime(part, (time.time() - 3600, time.time() - 3600))
    tier = tier_in(tmp_path)
    assert not part.exists()
    assert fresh.exists(), "another process may be writing it"
    assert name(2) not in tier
    assert is_there(tier, 1)


def test_a_full_disk_costs_one_line_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_in(tmp_path)
    tier.write(name(1), page(1))

    def full(file: int, parts: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "writev", full)
        for number in range(2, 9):
            tier.write(name(number), page(number))
    assert len(caplog.records) == 1
    assert "No space left on device; nothing is written there for 60 s" in caplog.text
    assert is_there(tier, 1)
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.setattr(disk.time, "monotonic", lambda: time.perf_counter() + 1e9)
    tier.write(name(3), page(3))
    assert is_there(tier, 3)


def test_some_of_the_disk_is_left_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tier_in(tmp_path)
    monkeypatch.setattr(disk, "_FREE_BYTES", 1 << 62)
    tier.write(name(1), page(1))
    assert name(1) not in tier
    assert "No space left" in caplog.text


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    first, second = tier_in(tmp_path, 64), tier_in(tmp_path, 64)
    for number in range(64):
        (first, second)[number % 2].write(name(number), page(number))
    assert len(list(tmp_path.rglob("*.kv"))) == 64
    for number in range(64, 200):
        (first, second)[number % 2].write(name(number), page(number))
    assert len(list(tmp_path.rglob("*.kv"))) < 64 + 10
    assert is_there(first, 198)
    assert is_there(second, 199)


def test_a_folder_that_cannot_be_trusted_is_refused(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    with pytest.raises(ConfigError, match=r"--disk-cache .*loose: others may write to it"):
        tier_in(loose)
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--disk-cache .*file: "):
        tier_in(file)
    with pytest.raises(ConfigError, match=r"--disk-cache .*below: "):
        tier_in(file / "below")
