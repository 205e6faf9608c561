"""What a conversation becomes, as it is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from ingle.text.load import load_text_side
from tests.cli.conftest import Run
from tests.text import toys

SAID = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "好"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return toys.write_folder(tmp_path / "model", toys.byte_level(), chat_template__jinja=template)


def test_the_prompt_its_ids_and_its_tokens(ingle: Run, folder: Path) -> None:
    shown = ingle("render", str(folder), "Hi", "--system", "Be brief.")
    prompt = "<s>system: Be brief.\n<s>user: Hi\nassistant:"
    ids = load_text_side(folder).tokenizer.encode(prompt, add_special_tokens=False)
    assert shown.code == 0 and shown.out.startswith(f"{prompt}\n--- {len(ids)} tokens\n")
    assert len(shown.out.splitlines()) == 3 + 1 + len(ids)
    assert ingle("render", str(folder), "Hi", "--system", "Be brief.", "--ids").out.split() == list(map(str, ids))
    record = json.loads(ingle("render", str(folder), "Hi", "--system", "Be brief.", "--json").out)
    assert record["prompt"] == prompt and record["token_ids"] == ids and len(record["tokens"]) == len(ids)


@pytest.mark.parametrize("form", ["list", "lines", "request", "stdin"])
def test_messages_of_a_file(ingle: Run, folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {
        "lines": "\n".join(map(json.dumps, SAID)),
        "request": json.dumps({"model": "m", "messages": SAID}),
    }.get(form, json.dumps(SAID))
    file = folder / "said.json"
    file.write_text(text)
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    shown = ingle("render", str(folder), "--messages", "-" if form == "stdin" else str(file))
    assert shown.out.startswith("<s>user: x\n<s>assistant: y\n<s>user: 好\nassistant:\n--- ")


def test_parts_of_a_character_are_bytes(ingle: Run, smollm2_gguf: Path) -> None:
    assert r"b'\xe4\xbd'" in ingle("render", str(smollm2_gguf), "你好").out


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ("MODEL hi --messages x.json", "give either a question or --messages FILE"),
        ("MODEL --messages no-such.json", "--messages no-such.json: No such file or directory"),
        ("MODEL --chat-template no-such.jinja", "--chat-template 'no-such.jinja' cannot be read"),
    ],
)
def test_mistakes(ingle: Run, folder: Path, argv: str, error: str) -> None:
    result = ingle("render", *(str(folder) if word == "MODEL" else word for word in argv.split()))
    assert result.code == 2 and error in result.err and not result.out


def test_a_model_without_a_template(ingle: Run, tmp_path: Path) -> None:
    plain = toys.write_folder(tmp_path / "plain", toys.byte_level())
    assert "has no chat template: give one with --chat-template FILE" in ingle("render", str(plain)).err
