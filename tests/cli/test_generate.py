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
    assert first == RECORD
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either a prompt or --prompts-file"),
        (["Hi", "--prompts-file", "prompts.txt"], "give either a prompt or --prompts-file"),
        (["--prompts-file", "missing.txt"], "missing.txt: No such file"),
        (["--prompts-file", "empty.txt"], "empty.txt: no prompt in it"),
        (["--prompts-file", "bytes.txt"], "bytes.txt: 'utf-8' codec"),
        (["--prompts-file", "."], "--prompts-file .: Is a directory"),
        (["--prompts-file", "bad.jsonl"], "bad.jsonl, line 2: not JSON"),
        (["--prompts-file", "list.jsonl"], 'list.jsonl, line 1: not an object with a text "prompt"'),
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
    (folder / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError) as error:
        generate.main(["m", *argv], load=llm.load)
    assert message in str(error.value)
    assert llm.config is None
