from __future__ import annotations

import json

import pytest

from ingle.doctor import checks
from ingle.doctor.checks import Check
from ingle.doctor.finding import Reporter
from ingle.doctor.here import Here
from tests.cli.conftest import Run


def test_the_question_and_the_answer(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Here] = []

    def check(here: Here, report: Reporter) -> None:
        asked.append(here)
        report.ok("fine")
        report.warn("slow", "wait")

    monkeypatch.setattr(checks, "CHECKS", (Check("disk", check),))
    result = ingle("doctor", "--port", "9000", "--timeout", "3")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "nothing to repair, 1 thing to know"
    question = asked[0].question
    assert (question.host, question.port, question.timeout_s, question.engine) == ("127.0.0.1", 9000, 3.0, None)
    assert json.loads(ingle("doctor", "tiny", "--max-model-len", "2k", "--json").out) == {
        "ok": True,
        "findings": [
            {"check": "disk", "state": "ok", "text": "fine", "advice": None},
            {"check": "disk", "state": "warn", "text": "slow", "advice": "wait"},
        ],
    }
    engine = asked[1].question.engine
    assert engine is not None and (engine.model, engine.max_model_len) == ("tiny", 2000)


def test_a_failure_is_the_exit_code(ingle: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", (Check("disk", lambda _, report: report.fail("full")),))
    assert ingle("doctor").code == 1 and ingle("doctor", "--json").code == 1


def test_a_time_that_is_none(ingle: Run) -> None:
    result = ingle("doctor", "--timeout", "0")
    assert result.code == 2 and "give seconds above 0" in result.err


@pytest.mark.parametrize("habit", ["collect-env", "env"])
def test_the_names_of_other_tools(habit: str, ingle: Run) -> None:
    result = ingle(habit)
    assert result.code == 2 and "ingle doctor" in result.err
