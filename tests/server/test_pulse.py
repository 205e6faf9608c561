"""Signs of life of a process: which silence means what."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.channel import Beat
from ingle.server import pulse as pulse_module
from ingle.server.pulse import Pulse

TICK_S = 0.5
PID = 77


class Watched:
    """A pulse, a clock, and what /proc says."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
        self.now_s = 100.0
        self._file = tmp_path / str(PID) / "stat"
        self._file.parent.mkdir()
        self.says("S", 10)
        monkeypatch.setattr("time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("sys.platform", platform)
        self.pulse = Pulse(PID, 300.0, tmp_path)

    def says(self, state: str, ticks: int) -> None:
        self._file.write_text(f"{PID} (a) b (c)) {state} " + "0 " * 10 + f"{ticks} 0 0 0\n")

    def pass_s(self, seconds: float, *, working: bool = False, pending: bool = False) -> None:
        for count in range(int(seconds / TICK_S)):
            if working:
                self.says("R", count)
            self.now_s += TICK_S
            self.pulse.tick(pending)

    @property
    def hopeless(self) -> bool | None:
        unwell = self.pulse.unwell()
        return None if unwell is None else unwell.hopeless


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch, "linux")


def test_one_that_is_stopped_is_known_within_three_seconds(linux: Watched) -> None:
    linux.pulse.heard(Beat("stepping", 0.1))
    linux.pass_s(1.0)
    linux.says("T", 10)
    linux.pass_s(3.0)
    assert linux.hopeless is False
    linux.says("S", 10)
    linux.pulse.heard(Beat("stepping", 4.0))
    assert linux.hopeless is None
    linux.says("T", 10)
    linux.pass_s(12.0)
    assert linux.hopeless is True


def test_one_that_computes_without_a_word_lives(linux: Watched) -> None:
    """As one that compiles in C++ without giving Python's lock away."""
    linux.pulse.heard(Beat("stepping", 0.0))
    linux.pass_s(200.0, working=True)
    assert linux.hopeless is None
    linux.pass_s(101.0, working=True)
    assert linux.hopeless is True, "but not for ever"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_one_that_neither_speaks_nor_works_is_dead(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path, monkeypatch, platform)
    watched.pass_s(60.0)
    assert watched.hopeless is None, "it has not begun to beat: imports take their time"
    watched.pulse.heard(Beat("loading", 0.0))
    watched.pass_s(3.0)
    assert watched.hopeless is None
    watched.pass_s(2.0)
    assert watched.hopeless is False
    watched.pass_s(6.0)
    assert watched.hopeless is True


def test_time_in_which_this_process_did_not_run_is_not_counted(linux: Watched) -> None:
    linux.pulse.heard(Beat("stepping", 0.0))
    linux.now_s += 3600.0
    linux.pulse.tick(pending=True)
    assert linux.hopeless is None


def test_loading_may_take_for_ever_and_a_step_may_not(linux: Watched) -> None:
    for stage, hopeless in (("loading", None), ("waiting", None), ("stepping", True), ("capturing", True)):
        linux.pulse.heard(Beat(stage, 1000.0))  # type: ignore[arg-type]
        assert linux.hopeless is hopeless, stage
    forever = Pulse(PID, 0.0)
    forever.heard(Beat("stepping", 1e6))
    assert forever.unwell() is None


def test_requests_that_an_idle_engine_forgot_are_found(linux: Watched) -> None:
    for count in range(700):
        linux.pulse.heard(Beat("waiting", 1000.0 + count * TICK_S))
        linux.pass_s(TICK_S, pending=count > 20)
        assert linux.hopeless is (None if count < 620 else True)


def test_what_the_system_says_is_read_whatever_the_program_is_called() -> None:
    assert pulse_module._life("7 (a) T 1 2) R 1 2 3 4 5 6 7 8 9 10 30 12 0\n") == ("R", 42)
