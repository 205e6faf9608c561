"""Coding agents of others, started by `ingle launch`: ten turns with tools, and then another question."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.clients import scripts
from tests.e2e.clients.conftest import Scripted, node_program, run, start_scripted
from tests.e2e.clients.scripted_engine import MISSING, Asked, common
from tests.e2e.conftest import PYTHON

ASK = "[script:session] Do the ten steps."
AGAIN = "[script:again] And once more."


@dataclass(frozen=True)
class Agent:
    script: Callable[[str], scripts.Script]
    """Given the folder that it works in."""
    ask: Sequence[str]
    """Its arguments, before what is asked."""
    ask_again: Sequence[str]
    answer: Callable[[str], str]
    """Its last words, in what it printed."""
    share_known: float = 0.99
    """Of a turn's prompt that the next turn's begins with."""


def last_of(kind: str, *path: str) -> Callable[[str], str]:
    """In lines of JSON, in the last of a type."""

    def find(printed: str) -> str:
        found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
        value = [each for each in found if each["type"] == kind][-1]
        for name in path:
            value = value[name]
        assert isinstance(value, str)
        return value

    return find


def codex_words(printed: str) -> str:
    items = [json.loads(line).get("item", {}) for line in printed.splitlines() if line.startswith("{")]
    return [item["text"] for item in items if item.get("type") == "agent_message"][-1]


_CODEX = ("--skip-git-repo-check", "--json", "--dangerously-bypass-approvals-and-sandbox")
_CLAUDE = ("--output-format", "stream-json", "--verbose", "--allowedTools", "Bash,Read,Write,Edit")
AGENTS: Mapping[str, Agent] = {
    "codex": Agent(
        lambda folder: scripts.CODEX,
        ("exec", *_CODEX),
        ("exec", "resume", "--last", *_CODEX),
        codex_words,
    ),
    "claude": Agent(
        scripts.claude,
        (*_CLAUDE, "-p"),
        (*_CLAUDE, "--continue", "-p"),
        last_of("result", "result"),
    ),
    "opencode": Agent(
        scripts.opencode,
        ("run", "--format", "json"),
        ("run", "--format", "json", "--continue"),
        last_of("text", "part", "text"),
    ),
}


@pytest.mark.parametrize("name", AGENTS)
def test_ten_turns_with_tools(name: str, tmp_path: Path) -> None:
    agent = AGENTS[name]
    program = Path(node_program(name))
    work = tmp_path / "work"
    work.mkdir()
    told = {"session": agent.script(str(work)), "again": scripts.AGAIN}
    scripted = start_scripted(tmp_path, scripts=told)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "INGLE_HOME": str(Path.home() / f".cache/ingle-test-{os.getpid()}"),  # Codex will not have it below /tmp
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "NO_COLOR": "1",
        "PWD": str(work),  # as a shell has it: OpenCode takes its word
    }
    try:
        _converse(agent, name, scripted, work, environment)
    finally:
        scripted.server.stop()
        subprocess.run(["rm", "-rf", environment["INGLE_HOME"]], check=True)
    assert "Traceback" not in scripted.server.text()


def _converse(agent: Agent, name: str, scripted: Scripted, work: Path, environment: dict[str, str]) -> None:
    launch = (PYTHON, "-m", "ingle", "launch", name, "--url", scripted.url, "--")
    first = run(*launch, *agent.ask, ASK, cwd=work, env=environment)
    asked = scripted.asked("session")
    assert [each.answer for each in asked if MISSING in each.answer] == [], asked[-1].prompt[-3000:]
    assert agent.answer(first.stdout) == "All ten are done: 十步都完成了。"
    assert len(asked) == 10
    assert (work / "notes.txt").read_text() == "first line\n2nd line\n"
    assert (work / "awkward.txt").read_text() == '引号 "和" 反斜杠 \\\n'
    assert_known(asked, agent.share_known)

    second = run(*launch, *agent.ask_again, AGAIN, cwd=work, env=environment)
    assert agent.answer(second.stdout) == "And again."
    assert_known([asked[-1], scripted.asked("again")[-1]], 0.9)  # a session that is taken up again may say so


def assert_known(asked: Sequence[Asked], share: float) -> None:
    """That each prompt begins with nearly all of the one before."""
    for before, after in pairwise(asked):
        known = after.num_cached_tokens / before.num_tokens
        assert known >= share, f"{known:.1%} of {before.num_tokens} tokens\n{_parting(before.prompt, after.prompt)}"


def _parting(one: str, other: str) -> str:
    """Where they do not go on alike."""
    place = common(one, other)
    return f"{one[place - 80 : place + 120]!r}\n{other[place - 80 : place + 120]!r}"
