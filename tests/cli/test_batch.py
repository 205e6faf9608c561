"""`ingle batch`: what is refused before a model is loaded, and a whole run that is cut off and gone on with."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingle.cli.main import main
from ingle.text.sandbox import sandboxes
from tests.vectors import save_model

MODEL = "smollm2:135m"


@pytest.fixture(autouse=True)
def later_tests_render() -> Iterator[None]:
    """The end of a batch, which here is not that of its process, ends what renders templates."""
    yield
    sandboxes.forget()


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines))
    return path


def read(path: Path) -> dict[str, Any]:
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each for each in lines}


@pytest.mark.parametrize(
    ("lines", "words", "says"),
    [
        ([line("a")], ["in.jsonl", "-m", MODEL], "needs an OUTPUT"),
        ([line("a")], ["in.jsonl", "out.jsonl"], "give the model as --model"),
        ([line("a")], ["gone.jsonl", "out.jsonl", "-m", MODEL], "gone.jsonl: there is no such file"),
        ([line("a")], ["in.jsonl", "no/out.jsonl", "-m", MODEL], "there is no folder"),
        ([line("a")], ["in.jsonl", "in.jsonl", "-m", MODEL], "is INPUT itself"),
        ([line("a")], ["-i", "https://x/in.jsonl", "-o", "out.jsonl", "-m", MODEL], "is no file of this machine"),
        ([], ["in.jsonl", "out.jsonl", "-m", MODEL], "it has no line"),
        (["{"], ["in.jsonl", "out.jsonl", "-m", MODEL], "in.jsonl, line 1: the line is no request"),
        ([line("a"), "", line("a")], ["in.jsonl", "out.jsonl", "-m", MODEL], "line 3: custom_id is that of line 1"),
        ([line("a", "/v1/files")], ["in.jsonl", "out.jsonl", "-m", MODEL], "url '/v1/files' is none of"),
        ([line("a", stream=True)], ["in.jsonl", "out.jsonl", "-m", MODEL], "a batch has no streams"),
    ],
)
def test_what_is_refused_at_once(
    lines: list[Any],
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", *lines)
    assert main(["batch", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_that_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "tiny")
    asked = {"prompt": "x", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    lines = [
        line("one", **asked),
        line("two", model="mine", **asked),
        line("vector", "/v1/embeddings", input="x", dimensions=4),
        line("bad", prompt="x", max_tokens=-5),
    ]
    source, output = write(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    rest = ["--model", str(model), "--kv-cache-memory", "8MiB", "--device", "cpu", "--max-model-len", "64"]
    assert main(["batch", "in.jsonl", "out.jsonl", *rest]) == 2
    assert "1 lines ask for the model 'mine', and this one is tiny: --served-model-name" in capsys.readouterr().err
    rest += ["--served-model-name", "mine"]

    assert main(["batch", "in.jsonl", "out.jsonl", *rest]) == 0
    assert "4 of 4 lines are answered, 1 of them with an error" in capsys.readouterr().err
    found = read(output)
    assert found.keys() == {"one", "two", "vector", "bad"}
    body = found["one"]["response"]["body"]
    assert body["usage"]["completion_tokens"] == 3 and body["choices"] == found["two"]["response"]["body"]["choices"]
    assert len(found["vector"]["response"]["body"]["data"][0]["embedding"]) == 4
    assert found["bad"]["response"]["status_code"] == 400 and found["bad"]["error"] is None

    kept = [each for each in output.read_text().splitlines(keepends=True) if '"two"' not in each]
    output.write_text("".join(kept) + '{"custom_id": "tw')  # the power went
    write(source, *lines[:3], line("bad", **asked))
    assert main(["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--retry-failed", *rest]) == 0
    error = capsys.readouterr().err
    assert "2 of 4 lines are answered in out.jsonl already" in error and "4 of 4 lines are answered\n" in error
    again = read(output)
    assert again["one"] == found["one"] and again["vector"] == found["vector"]
    assert again["bad"]["response"]["status_code"] == 200
    assert main(["batch", "in.jsonl", "out.jsonl", *rest]) == 0
    assert capsys.readouterr().err == "ingle: 4 of 4 lines are answered in out.jsonl already\n"

    with output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(["batch", "in.jsonl", "out.jsonl", *rest]) == 2
    assert "another `ingle batch` writes to it" in capsys.readouterr().err
    output.write_text("hello\n")
    assert main(["batch", "in.jsonl", "out.jsonl", *rest]) == 2
    assert "no line of answers" in capsys.readouterr().err and output.read_text() == "hello\n"
