"""What the catalog says of a model, against what its own files and the user say."""

from __future__ import annotations

from pathlib import Path

import pytest

from ingle.config import TextConfig
from ingle.errors import ConfigError
from ingle.text.load import has_chat_template, load_text_side
from ingle.text.recommended import Recommended
from tests.text import toys

SAYS = Recommended({"temperature": 0.2, "top_p": 0.9}, None, "the catalog")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(toys.byte_level_json())
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "own {{ messages[0].content }}"}')
    return tmp_path


def test_sampling_where_the_files_say_none(folder: Path) -> None:
    side = load_text_side(folder, recommended=SAYS)
    assert (side.default_sampling, side.sampling_source) == ({"temperature": 0.2, "top_p": 0.9}, "the catalog")
    (folder / "generation_config.json").write_text('{"top_k": 20}')
    side = load_text_side(folder, recommended=SAYS)
    assert (side.default_sampling, side.sampling_source) == ({"top_k": 20}, "generation_config.json")


def test_template(folder: Path) -> None:
    says = Recommended({}, "tigerbot", "the catalog")
    hello = [{"role": "user", "content": "Hello"}]
    side = load_text_side(folder, recommended=says)
    assert side.chat_template is not None and "### Instruction:\nHello" in side.chat_template.prompt(hello)
    assert "the chat template is tigerbot, by the catalog" in side.notices
    side = load_text_side(folder, TextConfig(chat_template="given {{ messages[0].content }}"), says)
    assert side.chat_template is not None and side.chat_template.prompt(hello) == "given Hello"
    assert not any("the catalog" in notice for notice in side.notices)
    assert has_chat_template(folder, recommended=says)
    (folder / "tokenizer_config.json").unlink()
    assert has_chat_template(folder, recommended=says) and not has_chat_template(folder, recommended=SAYS)


def test_template_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the catalog: chat_template 'nosuch' cannot be read.*tigerbot"):
        load_text_side(folder, recommended=Recommended({}, "nosuch", "the catalog"))
