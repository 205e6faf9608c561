"""`ingle chat` as somebody at a terminal sees it."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingle.home import home
from tests.cli.pseudo_terminal import BACKSPACE, CTRL_C, CTRL_D, ENTER, LEFT, PseudoTerminal, pasted

FAKE = """
import json, sys, time
from ingle.cli import chat
from ingle.errors import RequestError
from tests.cli.fakes import FakeLLM
llm = FakeLLM()
def on_word(n):
    said = llm.conversations[-1][-1]["content"]
    if said == "fail":
        raise RequestError("cannot answer that")
    time.sleep(0.2 if said.startswith("slow") else 0)
llm.on_word = on_word
try:
    chat.main(["m"], load=llm.load)
finally:
    print("asked", json.dumps([conversation[-1]["content"] for conversation in llm.conversations]))
"""
SLOW_LOAD = """
import sys, time
import ingle.engine.build as build
def slow(config, path, report=lambda stage: None, **options):
    report("loading weights, said the test")
    time.sleep(60)
build.build_engine = slow
from ingle.cli.main import main
sys.exit(main(["chat", sys.argv[1]]))
"""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[PseudoTerminal]:
    with PseudoTerminal("-c", FAKE, home=tmp_path) as terminal:
        terminal.prompts()
        yield terminal


def test_a_pasted_block_is_one_message(terminal: PseudoTerminal) -> None:
    terminal.type(pasted("first line\nsecond line\n\nlast line"))
    terminal.shows("last line")
    terminal.type(ENTER)
    terminal.shows("echo: first line second line last line")
    terminal.prompts()
    terminal.type(CTRL_D)
    assert terminal.ends() == 0
    terminal.shows('asked ["first line\\nsecond line\\n\\nlast line"]')


def test_three_quotes_hold_lines_together(terminal: PseudoTerminal) -> None:
    terminal.type(f'"""one{ENTER}two"""{ENTER}')
    terminal.shows("echo: one two")


def test_wide_characters_are_edited_one_by_one(terminal: PseudoTerminal) -> None:
    terminal.type("你好吗")
    terminal.shows(">>> 你好吗")
    assert terminal.screen.cursor.x == 4 + 6
    terminal.type(BACKSPACE + LEFT + "们")
    terminal.until(lambda: terminal.lines()[-1].replace(" ", "") == ">>>你们好", "the line as it was edited")
    assert terminal.screen.cursor.x == 4 + 4, "before the last character"
    terminal.type(ENTER)
    terminal.shows("echo: 你们好")


def test_a_line_goes_on_when_the_window_is_resized(terminal: PseudoTerminal) -> None:
    words = "word " * 12
    terminal.type(words)
    terminal.shows(words.strip())
    terminal.resize(30)
    terminal.type("end")
    terminal.until(lambda: "end" in "".join(terminal.lines()), "the end of the line")
    terminal.type(ENTER)
    terminal.prompts()
    terminal.type(CTRL_D)
    assert terminal.ends() == 0
    assert f'asked ["{words}end"]' in terminal.seen.decode().replace("\r\n", "")


def test_ctrl_c_in_each_phase(terminal: PseudoTerminal, tmp_path: Path) -> None:
    """It stops an answer, drops a line that is half typed, and leaves from an empty prompt when it comes twice."""
    terminal.type(f"slow a b c d e f g h i j{ENTER}")
    terminal.shows("echo: slow a")
    terminal.type(CTRL_C)
    terminal.prompts()
    assert "j" not in terminal.lines()[-2], "the answer was stopped"
    terminal.type("half typed")
    terminal.shows("half typed")
    terminal.type(CTRL_C)
    terminal.prompts()
    terminal.type(f"fail{ENTER}")
    terminal.shows("ingle: cannot answer that")
    terminal.prompts()
    terminal.type(CTRL_C)
    terminal.shows("so does another Ctrl-C")
    terminal.prompts()
    terminal.type(CTRL_C)
    assert terminal.ends() == 0
    terminal.shows('"fail"]')


def test_what_is_typed_during_an_answer_is_for_the_next_prompt(terminal: PseudoTerminal) -> None:
    terminal.type(f"slow a b c{ENTER}")
    terminal.shows("echo: slow")
    terminal.type(f"next{ENTER}")
    terminal.shows("echo: next")
    assert "echo: slow a b c" in terminal.lines(), "nothing was echoed into the answer"


def test_what_was_typed_is_kept_for_its_owner_alone(terminal: PseudoTerminal, tmp_path: Path) -> None:
    terminal.type(f"remember me{ENTER}")
    terminal.shows("echo: remember me")
    terminal.prompts()
    terminal.type("\x1b[A")
    terminal.shows(">>> remember me")
    terminal.type(CTRL_C + CTRL_D)
    assert terminal.ends() == 0
    file = tmp_path / "chat_history"
    assert "remember me" in file.read_text() and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_ctrl_c_while_the_model_is_loaded(smollm2_gguf: Path, tmp_path: Path) -> None:
    with PseudoTerminal("-c", SLOW_LOAD, str(smollm2_gguf), home=tmp_path) as terminal:
        terminal.shows("loading weights, said the test … 0 s")
        terminal.type(CTRL_C)
        assert terminal.ends() == 130
        assert not terminal.lines() or terminal.lines() == ["^C"], "the line that shows it is gone"


def test_with_the_model_that_is_there_by_default(smollm2_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels").symlink_to(home() / "kernels")
    words = ["chat", str(smollm2_gguf), "--temperature", "0", "--max-tokens", "12"]
    with PseudoTerminal("-m", "ingle", *words, home=tmp_path) as terminal:
        terminal.shows("/help lists the commands, Ctrl-D leaves.")
        terminal.prompts()
        terminal.type(f"What is the capital of France?{ENTER}")
        terminal.shows("The capital of France is Paris.")
        terminal.prompts()
        terminal.type(f"/bye{ENTER}")
        assert terminal.ends() == 0
