"""Fill-in-the-middle: the prompt in which a model of code was trained to write what stands between two texts.

Each format is what its model's authors publish; a tokenizer has one if it has all of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ingle.errors import RequestError
from ingle.request import SamplingParams

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

BEFORE, AFTER = "{before}", "{after}"
"""The two texts, among the tokens of a format."""
_MARK = "\u263a"
"""Stands before a text that is amid another, for tokenizers that put a space before every text."""


@dataclass(frozen=True)
class InfillFormat:
    name: str
    pieces: tuple[str, ...]
    ends: tuple[str, ...] = ()
    """Tokens that end the middle, beside the model's own end tokens, where the tokenizer has them."""

    @property
    def tokens(self) -> tuple[str, ...]:
        return tuple(piece for piece in self.pieces if piece not in (BEFORE, AFTER))


FORMATS = (
    InfillFormat(
        "Qwen2.5-Coder, CodeGemma",
        ("<|fim_prefix|>", BEFORE, "<|fim_suffix|>", AFTER, "<|fim_middle|>"),
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<|im_end|>"),
    ),
    InfillFormat(
        "StarCoder, Granite Code",
        ("<fim_prefix>", BEFORE, "<fim_suffix>", AFTER, "<fim_middle>"),
        ("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    InfillFormat("SantaCoder", ("<fim-prefix>", BEFORE, "<fim-suffix>", AFTER, "<fim-middle>"), ("<|endoftext|>",)),
    InfillFormat("CodeLlama", ("▁<PRE>", BEFORE, "▁<SUF>", AFTER, "▁<MID>"), ("▁<EOT>",)),
    InfillFormat(
        "DeepSeek-Coder",
        ("<｜fim▁begin｜>", BEFORE, "<｜fim▁hole｜>", AFTER, "<｜fim▁end｜>"),
        ("<｜end▁of▁sentence｜>", "<|EOT|>"),
    ),
    InfillFormat(
        "CodeGeeX, GLM-4", ("<|code_prefix|>", BEFORE, "<|code_suffix|>", AFTER, "<|code_middle|>"), ("<|endoftext|>",)
    ),
    InfillFormat("Codestral", ("[SUFFIX]", AFTER, "[PREFIX]", BEFORE)),
)


def infill_format(tokenizer: Tokenizer) -> InfillFormat | None:
    """The first whose tokens the tokenizer has, as tokens that a text may spell."""
    return next((each for each in FORMATS if all(_token_id(tokenizer, token) for token in each.tokens)), None)


def infilled(
    tokenizer: Tokenizer, prompts: Sequence[str | list[int]], suffix: str
) -> tuple[list[list[int]], tuple[int, ...]]:
    """The prompts for what stands between each of these and `suffix`, and the tokens that end it.

    Raises `RequestError` for a model that knows no such prompts.
    """
    form = infill_format(tokenizer)
    if form is None:
        raise RequestError(
            "suffix asks for the text between prompt and suffix, but this model's tokenizer has no tokens for that "
            "(such as <|fim_middle|>): use a model of code that was trained for it, or leave suffix out",
            param="suffix",
            code="unsupported_argument",
        )
    after = _amid(tokenizer, suffix)
    ends = (_token_id(tokenizer, token) for token in form.ends)
    return [_prompt(tokenizer, form, prompt, after) for prompt in prompts], tuple(i for i in ends if i is not None)


def stopping_with(sampling: SamplingParams, token_ids: Sequence[int]) -> SamplingParams:
    """`sampling` with more tokens that end the text, unless it wants to go on past every end."""
    more = tuple(token_id for token_id in token_ids if token_id not in sampling.stop_token_ids)
    if sampling.ignore_eos:
        return sampling
    return msgspec.structs.replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *more))


def _prompt(tokenizer: Tokenizer, form: InfillFormat, prompt: str | list[int], after: list[int]) -> list[int]:
    starts = tokenizer.encode("", add_special_tokens=True)
    before = tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else prompt
    ids = [] if tokenizer.bos_token_id is None else [i for i in starts if i == tokenizer.bos_token_id][:1]
    for piece in form.pieces:
        if piece == BEFORE:
            ids += before
        elif piece == AFTER:
            ids += after
        else:
            token_id = _token_id(tokenizer, piece)
            assert token_id is not None, "the format is the tokenizer's"
            ids.append(token_id)
    return ids


def _amid(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text without the space that some tokenizers put before each."""
    mark = tokenizer.encode(_MARK, add_special_tokens=False)
    marked = tokenizer.encode(_MARK + text, add_special_tokens=False)
    if marked[: len(mark)] == mark:
        return marked[len(mark) :]
    return tokenizer.encode(text, add_special_tokens=False)


def _token_id(tokenizer: Tokenizer, token: str) -> int | None:
    return tokenizer.token_id(token)
