from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ingle.cli import chat
from ingle.cli.answer import harmless
from ingle.cli.conversation import About, Conversation
from ingle.cli.settings import Settings
from ingle.config import EngineConfig
from ingle.errors import ConfigError, RequestError
from ingle.request import SamplingParams
from tests.cli.fakes import FakeLLM

Talk = Callable[..., str]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def talk(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def talk(lines: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        chat.main(["m", "--lines", *flags], load=llm.load)
        return capsys.readouterr().out

    return talk


@pytest.fixture
def conversation(llm: FakeLLM) -> Conversation:
    settings = Settings(SamplingParams(max_tokens=None), {}, drop_oldest=False, verbose=False)
    return Conversation(llm, settings, About("m", "the model's own"))


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def test_lines_of_a_pipe_are_turns_of_one_conversation(llm: FakeLLM, talk: Talk) -> None:
    assert talk("你好\n\nhow are you\n") == "echo: 你好\necho: how are you\n"
    assert llm.conversations == [turns("你好"), turns("你好", "echo: 你好", "how are you")]
    assert llm.config == EngineConfig.of("m")


@pytest.mark.parametrize(
    ("piped", "words", "asked"),
    [
        ("one\ntwo\n", (), "one\ntwo"),
        ("one\ntwo\n", ("summarize",), "one\ntwo\n\nsummarize"),
        ("", ("what?",), "what?"),
        ("\n", ("/clear",), "/clear"),
        ("  indented\n", (), "  indented"),
    ],
)
def test_a_pipe_and_a_question_are_answered_once(
    llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: Capture, piped: str, words: tuple[str, ...], asked: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(piped))
    chat.main(["m", *words], load=llm.load)
    assert llm.conversations == [turns(asked)]
    assert capsys.readouterr().out == f"echo: {' '.join(asked.split())}\n"


def test_nothing_is_asked(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(ConfigError, match="nothing is asked"):
        chat.main(["m"], load=llm.load)
    with pytest.raises(ConfigError, match="leave the question out"):
        chat.main(["m", "what?", "--lines"], load=llm.load)
    assert llm.config is None


def test_a_model_without_a_template_is_told_with_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        chat.main([str(folder)])
    assert f"`ingle chat '{folder}' --chat-template FILE`" in str(refused.value)
    assert f"`ingle generate '{folder}' \"Once" in str(refused.value)


def test_clear_and_system(llm: FakeLLM, talk: Talk) -> None:
    out = talk("one\n/clear\n/system be brief\ntwo\n/system\n/exit\nnever\n", "--system", "be kind")
    kind, brief = ({"role": "system", "content": f"be {how}"} for how in ("kind", "brief"))
    assert llm.conversations == [[kind, *turns("one")], [brief, *turns("two")]]
    assert out == "echo: one\necho: two\n", "stdout has answers alone"


def test_lines_in_triple_quotes_are_one_message(llm: FakeLLM, talk: Talk) -> None:
    talk('"""one\n\n  two\n"""\n"""three"""\n"""four\nfive\n')
    assert [talk[-1]["content"] for talk in llm.conversations] == ["one\n\n  two", "three", "four\nfive"]


def test_help_and_unknown_commands(conversation: Conversation, capsys: Capture) -> None:
    conversation.handle("/help")
    conversation.handle("/system")
    said = capsys.readouterr().err
    assert said.startswith("/clear ") and said.endswith("no system message is set\n")
    conversation.handle("/etc/passwd is what?")
    conversation.handle(" /nonsense")
    assert [turn["content"] for turn in conversation.turns[::2]] == ["/etc/passwd is what?", "/nonsense"]
    with pytest.raises(RequestError, match="no command /nonsense"):
        conversation.handle("/nonsense")
    assert not conversation.handle("/bye") and not conversation.handle("/quit")


def test_set(conversation: Conversation, llm: FakeLLM, capsys: Capture) -> None:
    for line in ("temperature 0.5", "parameter num_predict 7", "top-k 40", 'stop "a b" \\n', "seed none"):
        conversation.handle(f"/set {line}")
    conversation.handle("hello")
    wanted = SamplingParams(temperature=0.5, max_tokens=7, top_k=40, stop=("a b", "\n"))
    assert llm.sampling == wanted
    capsys.readouterr()
    conversation.handle("/set")
    said = capsys.readouterr().err
    assert "temperature         0.5\n" in said and "verbose             off\n" in said
    conversation.handle("/set temperature default")
    assert conversation.settings.params.temperature == 1.0
    conversation.handle('/set system "be brief"')
    assert conversation.system == "be brief"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/set temperature hot", "temperature must be a number, got 'hot'"),
        ("/set temperature", "needs a value, now it is: 1.0"),
        ("/set top_p 3", "top_p must be between"),
        ("/set temprature 1", "do you mean temperature"),
        ("/set num_ctx 4096", "start with --max-model-len"),
        ("/set verbose maybe", "give on or off"),
        ('/set stop "a', "No closing quotation"),
        ("/show everything", "there are info, template"),
        ("/save", "needs a file"),
        ("/load /nowhere/at all", "No such file"),
        ("/retry", "nothing was asked"),
    ],
)
def test_a_command_that_cannot_be_done_changes_nothing(conversation: Conversation, line: str, words: str) -> None:
    before = conversation.settings.params
    with pytest.raises(RequestError, match=words):
        conversation.handle(line)
    assert conversation.settings.params == before and conversation.turns == []


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_save_and_load(conversation: Conversation, tmp_path: Path, name: str) -> None:
    file = tmp_path / "a folder" / name
    file.parent.mkdir()
    conversation.handle("/system 简短")
    conversation.handle("你好")
    conversation.handle(f"/save {file}")
    said = conversation.messages
    with pytest.raises(RequestError, match="it exists; /save! "):
        conversation.handle(f"/save {file}")
    conversation.handle("/clear")
    conversation.handle("/system other")
    conversation.handle(f"/load {file}")
    assert conversation.messages == said and conversation.system == "简短"
    conversation.handle("more")
    conversation.handle(f"/save! {file}")
    assert "echo: more" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no messages"),
        ('["a"]', "message 1 is no object"),
        ('[{"role": "user"}]', "message 1"),
    ],
)
def test_files_that_hold_no_conversation(conversation: Conversation, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(RequestError, match=words):
        conversation.handle(f"/load {tmp_path}/talk.json")


def test_an_object_with_messages_is_loaded(conversation: Conversation, tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps({"model": "m", "messages": turns("a", "b")}))
    conversation.handle(f"/load {tmp_path}/talk.json")
    assert conversation.messages == turns("a", "b")


def test_retry(conversation: Conversation, llm: FakeLLM) -> None:
    conversation.handle("one")
    conversation.handle("/retry")
    assert llm.conversations == [turns("one")] * 2 and conversation.turns == turns("one", "echo: one")


def test_an_answer_that_was_cut_says_so(conversation: Conversation, llm: FakeLLM, capsys: Capture) -> None:
    conversation.handle("/set max_tokens 2")
    conversation.handle("a b c")
    assert "[cut: max_tokens is 2 (/set max_tokens, --max-tokens)]" in capsys.readouterr().err
    conversation.handle("/set max_tokens none")
    conversation.handle("word " * 80)
    assert "[cut: the context of 100 tokens is full: /clear forgets" in capsys.readouterr().err
    with pytest.raises(RequestError, match=r"the context is full\. /clear forgets the conversation, /set drop_oldest"):
        conversation.handle("once more")
    conversation.handle("/set drop_oldest on")
    conversation.handle("once more")
    assert "oldest messages are forgotten" in capsys.readouterr().err
    assert conversation.turns == turns("once more", "echo: once more")


def test_speed_and_what_the_model_is(conversation: Conversation, capsys: Capture) -> None:
    conversation.handle("/set verbose on")
    conversation.handle("a b c")
    assert re.search(r"prompt: 3 tokens, 0 of them known.* answer: 4 tokens in .* tokens/s", capsys.readouterr().err)
    conversation.handle("/show")
    said = capsys.readouterr().err
    assert "info:       fake, 12.0 k parameters" in said and "template:   the model's own" in said
    conversation.handle("/show template")
    assert capsys.readouterr().err == "{{ messages[-1].content }}\n"
    assert "context 100 tokens\ntemplate: the model's own" in conversation.banner()


def test_escapes_are_not_obeyed(llm: FakeLLM) -> None:
    assert harmless("\x1b[2Ja\r\nb\tc\x9b\x07 👩‍👧 全角\u3000") == "\\x1b[2Ja\nb\tc\\x9b\\x07 👩‍👧 全角\u3000"


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
    assert talk("a b c\nnext\n") == "echo:\necho: next\n"
    assert llm.closed_after == [1, 2]
    assert llm.conversations[1] == turns("a b c", "echo:", "next")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_second_ctrl_c_interrupts_at_once(llm: FakeLLM, talk: Talk) -> None:
    def twice(n: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    llm.on_word = twice
    with pytest.raises(KeyboardInterrupt):
        talk("a\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_failed_message_is_not_remembered(conversation: Conversation, llm: FakeLLM) -> None:
    def fail(n: int) -> None:
        raise RequestError("too long")

    llm.on_word = fail
    with pytest.raises(RequestError):
        conversation.handle("a very long message")
    assert conversation.messages == []


def test_input_that_is_no_text(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    with pytest.raises(ConfigError, match="the input is not utf-8 text"):
        chat.main(["m"], load=llm.load)
