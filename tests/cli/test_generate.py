from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ingle.cli import generate
from ingle.config import EngineConfig
from ingle.errors import ConfigError
from ingle.request import SamplingParams
from tests.cli.fakes import FakeLLM


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("one\r\n\n 你好\u2028same line\n", encoding="utf-8")
    return path


RECORD = {
    "prompt": "Hi",
    "text": "Hi…好",
    "finish_reason": "stop",
    "stop_reason": "\n",
    "prompt_tokens": 3,
    "completion_tokens": 2,
}


def test_one_prompt(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["m", "Hi there", "--max-tokens", "8", "--temperature", "0", "--dtype", "float32"], load=llm.load)
    assert capsys.readouterr().out == "Hi there…好\n"
    assert llm.config == EngineConfig.of("m", dtype="float32")
    assert llm.sampling == SamplingParams(temperature=0.0, max_tokens=8)


def test_json(llm: FakeLLM, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--model", "m", "Hi", "--json"], load=llm.load)
    out = capsys.readouterr().out
    assert json.loads(out) == RECORD
    assert "好" in out
    assert llm.sampling == SamplingParams(max_tokens=generate.MAX_TOKENS)


def test_file_of_prompts(llm: FakeLLM, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["m", "--prompts-file", str(prompts)], load=llm.load)
    assert capsys.readouterr().out == "--- 1: one\none…好\n--- 2:  你好\u2028same line\n 你好\u2028same line…好\n"


def test_jsonl_in_and_out(llm: FakeLLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Hi", "id": 1}\n\n{"prompt": "two\\nlines"}\n')
    generate.main(["m", "--prompts-file", str(source), "--output", str(target)], load=llm.load)
    assert capsys.readouterr().out == ""
    first, second = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert first == {"id": 1, **RECORD}
    assert second["prompt"] == "two\nlines"


@pytest.mark.parametrize(("name", "line"), [("p.txt", "Hi"), ("p.jsonl", '{"prompt": "Hi"}'), ("-", "Hi")])
def test_a_byte_order_mark_is_no_prompt(
    name: str, line: str, llm: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if name != "-":
        (tmp_path / name).write_text("\ufeff" + line, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff" + line))
    file = name if name == "-" else str(tmp_path / name)
    generate.main(["m", "--prompts-file", file, "--json"], load=llm.load)
    assert json.loads(capsys.readouterr().out) == RECORD


def test_prompts_from_stdin(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    generate.main(["m", "--prompts-file", "-", "--json"], load=llm.load)
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["a", "b"]


def test_a_pipe_is_one_prompt(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n\nupon a time\n"))
    generate.main(["m"], load=llm.load)
    assert capsys.readouterr().out == "Once\n\nupon a time…好\n"


def test_a_terminal_is_no_prompt(llm: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(ConfigError, match="give either a prompt or --prompts-file FILE, or pipe a prompt in"):
        generate.main(["m"], load=llm.load)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


LINES = [
    {"prompt": "a", "temperature": 0, "max_tokens": 5, "stop": ["x"]},
    {"custom_id": "q", "messages": [{"role": "user", "content": "b"}], "n": 2, "max_new_tokens": 7},
    {"prompt": "c"},
]


@pytest.mark.parametrize("by_pipe", [False, True])
def test_a_line_has_parameters_of_its_own(
    by_pipe: bool, llm: FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    text, file = "\n".join(map(json.dumps, LINES)), tmp_path / "in.jsonl"
    file.write_text(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    llm.default_sampling = {"top_p": 0.9}
    generate.main(["m", "--prompts-file", "-" if by_pipe else str(file), "--json", "--seed", "3"], load=llm.load)
    assert llm.each_sampling == [
        SamplingParams(top_p=0.9, seed=3, temperature=0, max_tokens=5, stop=["x"]),
        SamplingParams(top_p=0.9, seed=3, n=2, max_tokens=7),
        SamplingParams(top_p=0.9, seed=3, max_tokens=generate.MAX_TOKENS),
    ]
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["a…好", "b…好", "b…好", "c…好"], "in the order of the lines"
    assert [record.get("index") for record in records] == [None, 0, 1, None]
    assert records[1]["id"] == "q" and records[1]["messages"] == LINES[1]["messages"] and "prompt" not in records[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the pipe brought no prompt"),
        (["Hi", "--prompts-file", "prompts.txt"], "give either a prompt or --prompts-file"),
        (["--prompts-file", "missing.txt"], "missing.txt: No such file"),
        (["--prompts-file", "empty.txt"], "empty.txt: no prompt in it"),
        (["--prompts-file", "bytes.txt"], "bytes.txt: 'utf-8' codec"),
        (["--prompts-file", "."], "--prompts-file .: Is a directory"),
        (["--prompts-file", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--prompts-file", "list.jsonl"], 'list.jsonl, line 1: not an object with a text "prompt"'),
        (
            ["--prompts-file", "both.jsonl"],
            'both.jsonl, line 1: not an object with a text "prompt", or with "messages"',
        ),
        (["--prompts-file", "unknown.jsonl"], "unknown.jsonl, line 2: there is no parameter temprature"),
        (["--prompts-file", "beams.jsonl"], "beams.jsonl, line 1: use_beam_search=True: beams are not searched"),
        (["--prompts-file", "range.jsonl"], "range.jsonl, line 1: temperature must be"),
        (["--prompts-file", "deep.jsonl"], "deep.jsonl, line 1: not JSON"),
        (["Hi", "--output", "nowhere/out.jsonl"], "there is no folder"),
        (["Hi", "there"], "unexpected argument 'there'"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    llm: FakeLLM, prompts: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    folder = prompts.parent
    monkeypatch.chdir(folder)
    (folder / "empty.txt").write_text("\n \n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\n")
    (folder / "bad.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    (folder / "list.jsonl").write_text("[1]\n")
    (folder / "both.jsonl").write_text('{"prompt": "x", "messages": []}')
    (folder / "unknown.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "temprature": 1}')
    (folder / "beams.jsonl").write_text('{"prompt": "x", "use_beam_search": true}')
    (folder / "range.jsonl").write_text('{"prompt": "x", "temperature": -1}')
    (folder / "deep.jsonl").write_text("[" * 100_000)
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    with pytest.raises(ConfigError) as error:
        generate.main(["m", *argv], load=llm.load)
    assert message in str(error.value)
    assert llm.config is None
