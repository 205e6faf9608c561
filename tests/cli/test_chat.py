from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from ingle.cli import chat
from ingle.config import EngineConfig
from ingle.errors import ConfigError, RequestError
from ingle.request import SamplingParams
from tests.cli.fakes import FakeLLM

Talk = Callable[..., str]


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def talk(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def talk(lines: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        chat.main(["m", *flags], load=llm.load)
        return capsys.readouterr().out

    return talk


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_lines_of_a_pipe_are_turns_of_one_conversation(llm: FakeLLM, talk: Talk) -> None:
    assert talk("你好\n\nhow are you\n") == "echo: 你好\necho: how are you\n"
    assert llm.conversations == [turns("你好"), turns("你好", "echo: 你好", "how are you")]
    assert llm.config == EngineConfig.of("m")


def test_clear_and_system(llm: FakeLLM, talk: Talk) -> None:
    out = talk("one\n/clear\n/system be brief\ntwo\n/system\n/exit\nnever\n", "--system", "be kind")
    kind, brief = ({"role": "system", "content": f"be {how}"} for how in ("kind", "brief"))
    assert llm.conversations == [[kind, *turns("one")], [brief, *turns("two")]]
    assert out == "echo: one\necho: two\nbe brief\n"


def test_help_and_unknown_commands(llm: FakeLLM, talk: Talk) -> None:
    out = talk("/help\n/etc/passwd is what?\n/system\n")
    assert out.startswith("/clear ")
    assert out.endswith("echo: /etc/passwd is what?\nno system message is set\n")
    talk("/nonsense\n")
    assert len(llm.conversations) == 1


def test_flags_go_over_the_models_own_sampling(llm: FakeLLM, talk: Talk) -> None:
    llm.default_sampling = {"temperature": 0.2, "top_p": 0.9}
    talk("x\n", "--temperature", "0.5", "--top-k", "40", "--seed", "7", "--stop", "a", "b")
    assert llm.sampling == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=40, seed=7, stop=("a", "b"), max_tokens=None
    )
    talk("x\n", "--max_tokens", "9")
    assert llm.sampling == SamplingParams(temperature=0.2, top_p=0.9, max_tokens=9)


def test_bad_sampling_is_told_before_the_model_is_loaded(llm: FakeLLM, talk: Talk) -> None:
    with pytest.raises(RequestError, match="top_p must be between"):
        talk("x\n", "--top-p", "3")
    with pytest.raises(ConfigError, match="unknown flag"):
        talk("x\n", "--temprature", "3")
    assert llm.config is None


def test_ctrl_c_stops_the_answer_and_keeps_what_was_shown(llm: FakeLLM, talk: Talk) -> None:
    llm.on_word = lambda n: signal.raise_signal(signal.SIGINT) if n == 1 and len(llm.conversations) == 1 else None
    assert talk("a b c\nnext\n") == "echo: a\necho: next\n"
    assert llm.closed_after == [1, 2]
    assert llm.conversations[1] == turns("a b c", "echo: a", "next")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_ctrl_c_interrupts_at_once(llm: FakeLLM, talk: Talk) -> None:
    def twice(n: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    llm.on_word = twice
    with pytest.raises(KeyboardInterrupt):
        talk("a\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failed_message_is_not_remembered(llm: FakeLLM) -> None:
    def fail(n: int) -> None:
        raise RequestError("too long")

    conversation = chat.Conversation(llm, SamplingParams(), None)
    llm.on_word = fail
    with pytest.raises(RequestError):
        conversation.handle("a very long message")
    assert conversation.messages == []


TERMINAL = """
import time
from ingle.cli import chat
from ingle.errors import RequestError
from tests.cli.fakes import FakeLLM
llm = FakeLLM()
def on_word(n):
    if llm.conversations[-1][-1]["content"] == "fail":
        raise RequestError("cannot answer that")
    time.sleep(0.3 if n >= 2 else 0)
llm.on_word = on_word
chat.main(["m"], load=llm.load)
print("left")
"""


def test_on_a_terminal() -> None:
    """Ctrl-C stops an answer, drops a half typed line, and leaves at the empty prompt. Errors do not end the chat."""
    ours, theirs = pty.openpty()
    code = TERMINAL.replace("60 if n == 2", "0.3 if n >= 2")
    environment = os.environ | {"TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def expect(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            ready, _, _ = select.select([ours], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not come, only {seen!r}"
            seen += os.read(ours, 4096)
        seen = seen[seen.index(text) + len(text) :]

    def ctrl_c() -> None:
        time.sleep(0.2)  # what was printed last may precede the wait for input that the signal is to interrupt
        process.send_signal(signal.SIGINT)

    try:
        expect(b">>> ")
        os.write(ours, b"a b c d e f g h i j\n")
        expect(b"echo: a b")
        ctrl_c()
        expect(b">>> ")
        os.write(ours, b"fail\n")
        expect(b"ingle: cannot answer that")
        expect(b">>> ")
        os.write(ours, b"half typed")
        expect(b"half typed")
        ctrl_c()
        expect(b">>> ")
        ctrl_c()
        expect(b"left")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_input_that_is_no_text(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match="the input is not utf-8 text"):
        chat.main(["m"], load=llm.load)
