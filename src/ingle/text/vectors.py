"""From texts to requests for vectors, and from what comes back to numbers: the same offline and in the server."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from ingle.errors import RequestError
from ingle.pooling import ModelPooling
from ingle.request import NO_TOKENS, EngineRequest, Pooling, TokenIds, vocabulary_ids
from ingle.text.requests import MAX_CHARS_PER_TOKEN, PromptReader

if TYPE_CHECKING:
    from ingle.channel import EngineInfo
    from ingle.text.tokenizer import Tokenizer

Side = Literal["left", "right"]
_WORD = "a"


@dataclass(frozen=True)
class Reading:
    """How texts become tokens."""

    add_special_tokens: bool = True
    prompt_name: str | None = None
    """Of the model's prompts, the one that goes before each text."""
    truncate: int | None = None
    """Tokens that are kept of one that is longer; -1 for as many as the model takes. None refuses it."""
    side: Side = "right"
    """Where tokens are left out."""


@dataclass(frozen=True)
class TextReader:
    """Makes requests for vectors of texts, for one model."""

    tokenizer: Tokenizer
    info: EngineInfo
    pooling: ModelPooling

    @property
    def max_tokens(self) -> int:
        return min(self.info.max_model_len, self.pooling.max_tokens or self.info.max_model_len)

    def read(
        self, text: str | Sequence[int], pooling: Pooling, reading: Reading, request_id: str, param: str
    ) -> EngineRequest:
        """Raises `RequestError`, naming the field `param`, for a text that is empty or too long, and for token ids and
        prompts that the model does not have."""
        keep, prompt = self._kept(reading.truncate), self._prompt(reading.prompt_name)
        if isinstance(text, str):
            if keep is None:
                PromptReader(self.tokenizer, self.info).check_num_chars(len(text), param)
            else:  # what is left out anyway need not be tokenized
                most = keep * MAX_CHARS_PER_TOKEN
                text = text[:most] if reading.side == "right" else text[-most:]
            ids = self.tokenizer.encode(prompt + text, add_special_tokens=reading.add_special_tokens)
            around = self._around if reading.add_special_tokens else (0, 0)
        else:
            ids, around = list(text), (0, 0)
        if keep is not None and len(ids) > keep:
            ids = _cut(ids, keep, around, reading.side)
        return self.request(ids, pooling, request_id, param)

    def request(self, ids: Sequence[int], pooling: Pooling, request_id: str, param: str) -> EngineRequest:
        """Raises `RequestError` as `read` does."""
        if not ids:
            raise RequestError(f"{param} is empty: a vector is made of one token at least", param=param)
        if len(ids) > self.max_tokens:
            raise RequestError(
                f"This model takes texts of up to {self.max_tokens} tokens, but {param} has {len(ids)}: shorten it, or "
                "send truncate_prompt_tokens.",
                param=param,
                code="context_length_exceeded",
            )
        if pooling.dimensions is not None and not 1 <= pooling.dimensions <= self.info.hidden_size:
            raise RequestError(
                f"dimensions must be from 1 to {self.info.hidden_size}, got {pooling.dimensions}", param="dimensions"
            )
        return EngineRequest(request_id, self._known(ids, param), NO_TOKENS, pooling=pooling)

    def _known(self, ids: Sequence[int], param: str) -> TokenIds:
        try:
            return vocabulary_ids(ids, self.info.vocab_size)
        except RequestError as error:
            raise RequestError(str(error), param=param) from error

    def _kept(self, truncate: int | None) -> int | None:
        if truncate is not None and truncate != -1 and not 1 <= truncate <= self.max_tokens:
            raise RequestError(
                f"truncate_prompt_tokens must be from 1 to {self.max_tokens}, or -1 for that, got {truncate}",
                param="truncate_prompt_tokens",
            )
        return self.max_tokens if truncate == -1 else truncate

    def _prompt(self, name: str | None) -> str:
        prompts = self.pooling.prompts
        name = self.pooling.default_prompt if name is None else name
        if name is not None and name not in prompts:
            has = f"it has {', '.join(prompts)}" if prompts else "it has none"
            raise RequestError(f"prompt_name {name!r:.60} is no prompt of this model: {has}", param="prompt_name")
        return "" if name is None else prompts[name]

    @cached_property
    def _around(self) -> tuple[int, int]:
        """How many tokens the tokenizer puts before a text, and after it: those are kept."""
        alone = self.tokenizer.encode(_WORD, add_special_tokens=False)
        whole = self.tokenizer.encode(_WORD)
        before = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        return before, len(whole) - before - len(alone)


def _cut(ids: list[int], keep: int, around: tuple[int, int], side: Side) -> list[int]:
    before, after = around if keep > sum(around) else (0, 0)
    inner, room = ids[before : len(ids) - after], keep - before - after
    kept = inner[:room] if side == "right" else inner[len(inner) - room :]
    return [*ids[:before], *kept, *ids[len(ids) - after :]]


def numbers(pooled: bytes) -> list[float]:
    """Of what the engine answers."""
    values = array("f")
    values.frombytes(pooled)
    return values.tolist()
