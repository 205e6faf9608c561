"""The text side of a model, and what the user may replace in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle.config import TextConfig
from ingle.errors import ConfigError, IngleError, ModelError
from ingle.text.load import _given_template, default_sampling, load_text_side
from tests.text import toys


def test_a_given_template_replaces_the_models_own(smollm2_gguf: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    template = load_text_side(smollm2_gguf, TextConfig(str(file))).chat_template
    assert template is not None and template.render([{"role": "user", "content": "你好"}]) == "<你好>"


@pytest.mark.parametrize("given", ["{% for %}", "{{ raise_exception('no') }}", "missing.jinja"])
def test_a_given_template_that_cannot_work_fails_at_the_start(smollm2_gguf: Path, given: str) -> None:
    with pytest.raises(ConfigError, match="--chat-template"):
        load_text_side(smollm2_gguf, TextConfig(given))


def test_sampling_defaults_come_from_the_generation_config(tmp_path: Path) -> None:
    assert default_sampling(tmp_path) == {}
    config = {"temperature": 0.6, "top_k": 20, "do_sample": True, "max_length": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert default_sampling(tmp_path) == {"temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        default_sampling(tmp_path)


def test_a_given_template_that_leaves_out_what_is_asked_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = toys.write_folder(tmp_path / "model", toys.byte_level())
    with pytest.raises(
        ConfigError, match=r"--chat-template cannot render a user's message: messages\[0\] would be lost"
    ):
        load_text_side(folder, TextConfig("{{ bos_token }}<|assistant|>"))
    template = load_text_side(
        folder, TextConfig("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}")
    )
    assert template.chat_template is not None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({}, {}),
        (
            {"temp": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "penalty_repeat": 1.1},
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1},
        ),
        ({"temp": 0.0, "top_k": 0, "mirostat": 2, "xtc_probability": 0.5}, {"temperature": 0.0, "top_k": 0}),
    ],
)
def test_sampling_defaults_come_from_a_gguf_files_metadata(
    tmp_path: Path, stored: dict[str, Any], expected: dict[str, Any]
) -> None:
    metadata = {f"general.sampling.{key}": value for key, value in stored.items()}
    path = toys.write_gguf(tmp_path / "model.gguf", metadata | toys.sentence_piece_metadata())
    assert default_sampling(path) == expected
    assert load_text_side(path).default_sampling == expected


@pytest.mark.parametrize(
    "config",
    [{"top_p": 0}, {"top_k": 50.5}, {"temperature": -1}, {"temperature": True}, {"min_p": "0.1"}, {"top_p": 1e999}],
    ids=str,
)
def test_a_sampling_default_that_no_request_could_ask_for_is_left_out(
    config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, **config}))
    assert default_sampling(tmp_path) == {"repetition_penalty": 1.1}
    assert next(iter(config)) in caplog.text


def test_a_shipped_template_goes_by_its_name_and_a_file_of_that_name_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("../templates/tigerbot", "tigerbot.jinja", "no-such-template"):
        with pytest.raises(IngleError, match=r"cannot be read: .*; give a file, .* brings: tigerbot"):
            load_text_side(tmp_path, TextConfig(name))
    shipped = _given_template(TextConfig("tigerbot"))
    assert shipped is not None and "### Instruction:" in shipped
    Path("tigerbot").write_text("{{ 'mine' }}")
    assert _given_template(TextConfig("tigerbot")) == "{{ 'mine' }}"
