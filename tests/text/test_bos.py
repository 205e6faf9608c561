"""A prompt that begins otherwise than the model's texts is noticed when the model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from ingle.text.bos import bos_notice, text_bos
from ingle.text.chat_template import ChatTemplate
from ingle.text.load import load_text_side
from ingle.text.tokenizer import Tokenizer
from tests.text import toys


def backend(*, adds_bos: bool) -> Backend:
    made = toys.byte_level()
    made.add_special_tokens(["<s>"])
    if adds_bos:
        made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return made


PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("adds_bos", "source", "notice"),
    [
        (True, "{{ bos_token }}" + PLAIN, None),
        (True, "<s>" + PLAIN, None),
        (True, PLAIN, "begins a prompt without <s>"),
        (True, "{{ bos_token }}<s>" + PLAIN, "writes <s> twice"),
        (False, PLAIN, None),
        (False, "{{ bos_token }}" + PLAIN, None),
        (False, "{{ bos_token }}{{ bos_token }}" + PLAIN, "writes <s> twice"),
        (True, "{{ raise_exception('no') }}", None),
    ],
)
def test_what_is_noticed(adds_bos: bool, source: str, notice: str | None) -> None:
    special = {"bos_token": "<s>"}
    tokenizer = Tokenizer(backend(adds_bos=adds_bos), special_tokens=special, eos_token_ids=(), chat_template=None)
    assert (text_bos(tokenizer) is not None) == adds_bos
    told = bos_notice(tokenizer, ChatTemplate(source, special))
    assert told is None if notice is None else notice in str(told)


def test_it_is_among_the_notices_of_a_model(tmp_path: Path) -> None:
    backend(adds_bos=True).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    (notice,) = load_text_side(tmp_path).notices
    assert "without <s>" in notice
