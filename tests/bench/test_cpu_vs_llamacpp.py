"""The comparison with llama.cpp, as far as it needs no llama.cpp: it bounds its time, and judges by the right goals."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cpu_vs_llamacpp

    return cpu_vs_llamacpp


@pytest.mark.parametrize(("max_s", "num_runs"), [(1, 1), (99, 1), (100, 2), (250, 5), (1000, 5)])
def test_runs_end_when_another_would_take_too_long(
    script: ModuleType, max_s: float, num_runs: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One takes 50 s; each measures every part."""
    now_s, measured = [0.0], []
    session = script.Session(script.peer.Peer(Path(), Path()), "native", 2)
    session.elapsed_s = lambda: now_s[0]

    def part(name: str, seconds: float):  # type: ignore[no-untyped-def]
        def run(session: object, index: int) -> None:
            now_s[0] += seconds
            measured.append((index, name))

        return run

    parts = {"offline": part("offline", 20), "server": part("server", 30)}
    assert script.repeat(session, parts, 5, max_s) == num_runs
    assert measured == [(index, name) for index in range(num_runs) for name in parts]
    assert ("--max-minutes" in capsys.readouterr().out) == (num_runs < 5)


def test_a_part_that_fails_leaves_the_others_their_figures(script: ModuleType) -> None:
    session = script.Session(script.peer.Peer(Path("no-such-python"), Path()), "native", 2)

    def fails(session: script.Session, index: int) -> None:
        session.call("llama.cpp", "describe", Path("model"))

    def goes_on(session: script.Session, index: int) -> None:
        session.add("ingle", "prefill_512", float(index))

    assert script.repeat(session, {"offline": fails, "server": goes_on}, 3, 1000) == 3
    assert list(session.failures) == ["offline"] and "no-such-python" in session.failures["offline"]
    assert session.runs["ingle"] == {"prefill_512": [0.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("kernels", "goal"),
    [("ingle's for AVX-512 VNNI", 5.5), ("ingle's for AVX2", 3.0), ("ingle's for NEON", 3.0), ("PyTorch's", 3.0)],
)
def test_goals_are_those_of_the_kernels_that_run(script: ModuleType, kernels: str, goal: float) -> None:
    report = script.report
    kind = report.kind(kernels)
    theirs = {"prefill_512": 100.0, "ready_s": 0.5, "mean_kl": 0.004}
    for ours, reached in ((goal * 100, "yes"), (goal * 100 - 1, "NO ")):
        line = report.table({"llama.cpp": theirs, "ingle": {"prefill_512": ours}}, kind).splitlines()[1]
        assert f">={goal:g}" in line and reached in line
    slower = report.table({"llama.cpp": theirs, "ingle": {"ready_s": 0.6}}, kind)
    assert "<=1  NO" in slower


def test_the_peer_of_a_target_has_its_instructions_alone(script: ModuleType) -> None:
    told = script.peer.INSTRUCTIONS["x86-64-v3"]
    assert told["GGML_NATIVE"] == "OFF" and told["GGML_AVX2"] == "ON"
    assert {value for name, value in told.items() if "512" in name or "VNNI" in name} == {"OFF"}
    from ingle.kernels.cpu.targets import TARGETS

    assert set(script.peer.INSTRUCTIONS) <= {"native", *TARGETS}
