"""Fill-in-the-middle: the prompts that models of code were trained on."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as Backend

from ingle.errors import RequestError
from ingle.request import SamplingParams
from ingle.text.infill import AFTER, BEFORE, FORMATS, InfillFormat, infill_format, infilled, stopping_with
from ingle.text.tokenizer import Tokenizer

from .toys import byte_level, sentence_piece


def tokenizer_with(backend: Backend, *tokens: str, bos: str | None = None) -> Tokenizer:
    backend.add_special_tokens(list(tokens))
    special = {} if bos is None else {"bos_token": bos}
    return Tokenizer(backend, special_tokens=special, eos_token_ids=(), chat_template=None)


@pytest.mark.parametrize("form", FORMATS, ids=[form.name for form in FORMATS])
def test_the_prompt_is_as_its_model_was_trained(form: InfillFormat) -> None:
    tokenizer = tokenizer_with(byte_level(), *form.tokens, *form.ends)
    assert infill_format(tokenizer) == form
    before, after = "def f(x):\n    return ", "\n\nprint(f(1))"
    (ids, other), ends = infilled(tokenizer, [before, tokenizer.encode("ab")], after)
    text = "".join({BEFORE: before, AFTER: after}.get(piece, piece) for piece in form.pieces)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(other, skip_special_tokens=False) == text.replace(before, "ab")
    assert ends == tuple(tokenizer.token_id(end) for end in form.ends)


def test_formats_are_told_by_all_of_their_tokens() -> None:
    for form in FORMATS:
        tokenizer = tokenizer_with(byte_level(), *form.tokens[:-1])
        assert infill_format(tokenizer) is None
        with pytest.raises(RequestError, match="no tokens for that") as caught:
            infilled(tokenizer, ["a"], "b")
        assert caught.value.param == "suffix"


def test_no_space_comes_before_what_follows_the_middle() -> None:
    """As CodeLlama's own tokenizer writes it: what is before has the space of a text's start, what is after has not."""
    tokenizer = tokenizer_with(sentence_piece(), "▁<PRE>", "▁<SUF>", "▁<MID>")
    ((ids,), _) = infilled(tokenizer, ["ab"], "ab")
    assert [tokenizer.spelling(i) for i in ids] == ["▁<PRE>", "▁", "a", "b", "▁<SUF>", "a", "b", "▁<MID>"]


def test_its_ends_are_stops_unless_nothing_is() -> None:
    assert stopping_with(SamplingParams(stop_token_ids=(3,)), (5, 3)).stop_token_ids == (3, 5)
    assert stopping_with(SamplingParams(ignore_eos=True), (5,)).stop_token_ids == ()
