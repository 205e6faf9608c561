"""Text to token ids and back, for models of every origin."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from ingle.errors import RequestError
from ingle.text.chat_template import ChatTemplate
from ingle.text.detokenizer import Decoding, Detokenizer, decoding_of

log = logging.getLogger(__name__)

_BRIEF_CHARS = 2048
"""Encoded within a millisecond."""
_LEAST_STOP_CHARS = 4
"""Fewer might stand in any answer."""


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a language model's files say beside it. Safe to use from any thread."""

    chat_template: str | None
    """The source of the model's chat template."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, ... as chat templates name them."""
    eos_token_ids: tuple[int, ...]
    """Every token that ends an answer: the end tokens of the model's files and of its chat template."""
    chat_stops: tuple[str, ...]
    """What ends an answer in a chat template that has no token for it: the text that leads to the next question."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Iterable[int],
        chat_template: str | None,
    ) -> None:
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._decoding: Decoding = decoding_of(backend)
        self._added_ids = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        self.special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        self.special_token_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        end_of_turn, self.chat_stops = self._after_an_answer()
        ends = [*eos_token_ids, self._id_of("eos_token"), end_of_turn]
        self.eos_token_ids = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))

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

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; those that the vocabulary lacks leave no trace."""
        text: str = self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, skip_special_tokens: bool) -> Detokenizer:
        """For the tokens of one new sequence."""
        return self._decoding.detokenizer(self.special_token_ids if skip_special_tokens else frozenset())

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for amid a text, which may be part of a character; empty for an unknown id."""
        return self._decoding.token_bytes(token_id)

    def token(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _after_an_answer(self) -> tuple[int | None, tuple[str, ...]]:
        """The token that the chat template writes after what the assistant said, or else the text."""
        if self.chat_template is None:
            return None, ()
        template, answer = ChatTemplate(self.chat_template, self.special_tokens), "what the assistant said"
        turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": answer}]
        try:
            _, found, tail = template.render(turns, add_generation_prompt=False).rpartition(answer)
            ends = [token for token in self._added_ids if found and token.strip() and tail.lstrip().startswith(token)]
            if ends:
                return self._added_ids[max(ends, key=len)], ()
            turns.append({"role": "user", "content": "another question"})
            _, found, tail = template.render(turns, add_generation_prompt=False).rpartition(answer)
        except RequestError as error:
            log.warning("the chat template does not render a question and an answer: %s", error)
            return None, ()
        between, asked, _ = tail.partition("another question")
        stop = between.rstrip() if found and asked else ""
        return None, (stop,) if len(stop.strip()) >= _LEAST_STOP_CHARS else ()
