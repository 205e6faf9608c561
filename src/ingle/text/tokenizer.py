"""Text to token ids and back, for models of every origin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import cached_property
from itertools import pairwise
from typing import Any

import tokenizers

from ingle.errors import RequestError
from ingle.text.answer_end import AnswerEnd, answer_end, call_ends
from ingle.text.detokenizer import Decoding, Detokenizer, decoding_of
from ingle.text.grammar import GrammarCheck, Vocabulary

_BRIEF_CHARS = 2048
"""Encoded within a millisecond."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a language model's files say beside it. Safe to use from any thread."""

    chat_template: str | None
    """The source of the model's chat template."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... as chat templates name them."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer: the end tokens of the model's files and of its chat template."""
    response_template: Any
    """What the model's files declare of its answers, as it stands there; None where they do not."""
    chat_stops: tuple[str, ...]
    """What ends an answer in a chat template that has no token there: the text that leads to the next question."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int],
        chat_template: str | None,
        symbols: Mapping[str, int] | None = None,
        response_template: Any = None,
    ) -> None:
        """`symbols` are more tokens that a text may spell out, beside the backend's added ones."""
        self.response_template = response_template
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decoding: Decoding = decoding_of(backend)
        self._added_ids = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        self.special_tokens = dict(special_tokens)
        chat_template = None if chat_template is None else chat_template.removeprefix("\ufeff")  # of a file it was in
        self.chat_template = chat_template
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        spelled = {**(symbols or {}), **self._added_ids}
        end = AnswerEnd() if chat_template is None else answer_end(chat_template, special_tokens, spelled)
        self.chat_stops = end.stops
        of_calls = call_ends(chat_template or "", spelled)
        ends = [*eos_token_ids, self._id_of("eos_token"), *map(spelled.get, (*end.tokens, *of_calls))]
        self.eos_token_ids = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))

    def hold_against(self, vocab_size: int) -> list[str]:
        """Drops end tokens that a model of `vocab_size` tokens cannot give. Returns what to tell the user."""
        notices, has = [], f"the model has {vocab_size} tokens, from 0 to {vocab_size - 1}"
        if self.bos_token_id is not None and self.bos_token_id >= vocab_size:
            notices.append(f"prompts begin with token {self.bos_token_id} and will be refused: {has}")
        beyond = [token_id for token_id in self.eos_token_ids if token_id >= vocab_size]
        if beyond:
            self.eos_token_ids = tuple(token_id for token_id in self.eos_token_ids if token_id not in beyond)
            left = "" if self.eos_token_ids else "; no other is left: only stop strings and max_tokens end an answer"
            notices.append(f"end token {', '.join(map(str, beyond))} is left out: {has}{left}")
        return notices

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. Special tokens spelled out in the text become what they name, as in transformers.

        `add_special_tokens` adds those that the model wants around a plain text, such as BOS. Raises `RequestError`
        for text that is no Unicode.
        """
        try:
            if len(text) <= _BRIEF_CHARS:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
            else:  # as the library encodes many texts: other threads run meanwhile
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            token_ids: list[int] = encoding.ids
        except TypeError as error:  # what `tokenizers` says to half of a surrogate pair, which JSON can spell
            raise RequestError("the text holds half of a surrogate pair: send valid Unicode", param="prompt") from error
        return token_ids

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a text alone, in which no special token is more than what it is spelled with."""
        cuts = [0, *(start + 1 for start, _, _ in self.hidden_tokens_in(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [token_id for part in parts for token_id in self.encode(part, add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; those that the vocabulary lacks leave no trace."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def starts(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Where in `text` each token of `encode` begins: one that ends a character, where that does.

        Those that are added around the text begin, and end, where they stand.
        """
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        starts, covered = [], 0
        for (start, end), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            # White space that the library trims off a token is the token's, as its text is.
            starts.append(covered if added else min(start, covered))
            covered = covered if added else max(covered, end)
        return starts

    def detokenizer(
        self, skip_special_tokens: bool, after: Sequence[int] = (), shown: Set[int] = frozenset()
    ) -> Detokenizer:
        """For the tokens of one new sequence, or those that follow a prompt. `shown` special tokens are not skipped."""
        return self._decoding.detokenizer(self.special_token_ids - shown if skip_special_tokens else frozenset(), after)

    def special_tokens_of(self, texts: Iterable[str]) -> frozenset[int]:
        """The special tokens among what spells `texts`."""
        ids = {self.token_id(text) for text in texts}
        return frozenset(token_id for token_id in ids if token_id in self.special_token_ids)

    def hidden_tokens_in(self, text: str) -> list[tuple[int, int, int]]:
        """Where `text` spells tokens that the text of an answer may leave out: special ones and those that end it.

        As (start, end, token id); of several at one place the longest counts.
        """
        found, at = [], 0
        while at < len(text):
            sizes = self._hidden_sizes.get(text[at], ())
            size = next((size for size in sizes if text[at : at + size] in self._hidden_ids), 0)
            if size:
                found.append((at, at + size, self._hidden_ids[text[at : at + size]]))
            at += size or 1
        return found

    @cached_property
    def _hidden_ids(self) -> dict[str, int]:
        ids = self.special_token_ids | set(self.eos_token_ids)
        return {token: token_id for token_id in ids if (token := self._backend.id_to_token(token_id))}

    @cached_property
    def _hidden_sizes(self) -> dict[str, list[int]]:
        """Lengths of the tokens that begin with a character, longest first."""
        sizes: dict[str, set[int]] = {}
        for token in self._hidden_ids:
            sizes.setdefault(token[0], set()).add(len(token))
        return {first: sorted(lengths, reverse=True) for first, lengths in sizes.items()}

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for amid a text, which may be part of a character; empty for an unknown id."""
        return self._decoding.token_bytes(token_id)

    def token(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def spelling(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty for an unknown id."""
        return self._backend.id_to_token(token_id) or ""

    def vocabulary(self) -> dict[str, int]:
        """Every token, as its file spells it, and its id."""
        tokens: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return tokens

    @cached_property
    def grammars(self) -> GrammarCheck:
        """Tries grammars that answers shall follow, before the engine hears of them."""
        special = {token_id: self.token_bytes(token_id) for token_id in self._never_inside(self.vocab_size)}
        return GrammarCheck(special, [id for id in self.eos_token_ids if id < self.vocab_size], self.vocab_size)

    def for_grammars(self, vocab_size: int) -> Vocabulary:
        """The tokens of a model that has so many. Takes tenths of a second."""
        return Vocabulary(
            tokens=[self.token_bytes(token_id) for token_id in range(vocab_size)],
            special_ids=self._never_inside(vocab_size),
            end_ids=[token_id for token_id in self.eos_token_ids if token_id < vocab_size],
            encode=lambda text: self.encode(text, add_special_tokens=False),
        )

    def _never_inside(self, vocab_size: int) -> list[int]:
        """Tokens whose text no answer has inside that follows a grammar, unless that names them."""
        return sorted(id for id in self.special_token_ids.union(self.eos_token_ids) if id < vocab_size)

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_id(token)
