"""From prompts to what is asked of the engine, and from its tokens to events: the same offline and in the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ingle.errors import RequestError
from ingle.limits import limits
from ingle.request import EngineRequest, SamplingParams, TokenIds, check_sampling, room_for, vocabulary_ids
from ingle.text.formats.stream import Telling, ToldStream
from ingle.text.hidden_stops import StopTable, stop_table
from ingle.text.stream import TextStream

if TYPE_CHECKING:
    from ingle.channel import EngineInfo
    from ingle.text.tokenizer import Tokenizer

MAX_CHARS_PER_TOKEN = 128
"""The longest tokens of today's vocabularies are runs of 128 spaces. Text that cannot fit is not worth tokenizing."""


@dataclass(frozen=True)
class PromptRequests:
    """One prompt, asked of the engine `params.n` times."""

    tokenizer: Tokenizer
    params: SamplingParams
    token_ids: TokenIds
    requests: Sequence[EngineRequest]
    continues: bool
    """Whether the texts go on where the prompt ends: those of a chat stand alone."""
    telling: Telling | None = None
    """What is told apart in the answers."""
    stops: StopTable | None = None
    """Kept for the streams, which look for it by the stop strings."""

    def stream(self, choice: int) -> TextStream | ToldStream:
        """For the outputs of one of the requests, as events of that choice."""
        after = self.token_ids if self.continues else ()
        if self.telling is not None:
            return ToldStream(self.telling, self.tokenizer, self.params, after, choice)
        return TextStream(self.tokenizer, self.params, after, choice)


def check_num_tokens(num_tokens: int) -> None:
    """Raises `RequestError` for a prompt of more tokens than the flag allows, whatever the context holds."""
    text = limits().over("max_prompt_tokens", num_tokens, f"the prompt has {num_tokens} tokens")
    if text is not None:
        raise RequestError(text, param="prompt", code="prompt_too_long")


@dataclass(frozen=True)
class PromptReader:
    """Makes requests of prompts, for one model. Here each prompt is checked, once for all its choices."""

    tokenizer: Tokenizer
    info: EngineInfo

    def read(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        request_ids: Iterator[str],
        *,
        add_special_tokens: bool = True,
        continues: bool = True,
        param: str = "prompt",
        telling: Telling | None = None,
    ) -> PromptRequests:
        """The `params.n` requests of a prompt, the i-th with `seed + i`, each with the next of `request_ids`.

        Raises `RequestError` for a prompt that is empty or too long, naming the field `param`, and for token ids that
        the model does not have.
        """
        self.check_writes()
        ends = self.tokenizer.eos_token_ids
        params = self._spelled(params)
        check_sampling(params, self.info.vocab_size, ends)
        stops = stop_table(params.stop, self.tokenizer)  # here, off a server's event loop, where it may take a while
        wanted = params.structured_outputs
        grammar = None if wanted is None else self.tokenizer.grammars.grammar(wanted)
        if isinstance(prompt, str):
            self.check_num_chars(len(prompt), param)
            prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        prompt = self._truncated(prompt, params)
        try:
            token_ids = vocabulary_ids(prompt, self.info.vocab_size)
            check_num_tokens(len(token_ids))
            max_tokens = room_for(len(token_ids), params.max_tokens, self.info.max_model_len)
        except RequestError as error:
            raise RequestError(str(error), param=param, code=error.code, status=error.status) from error
        requests = [
            EngineRequest(
                next(request_ids),
                token_ids,
                params.of_choice(index, max_tokens),
                ends,
                priority=params.priority,
                cache_salt=params.cache_salt,
                return_progress=params.return_progress,
                grammar=grammar,
            )
            for index in range(params.n)
        ]
        return PromptRequests(self.tokenizer, params, token_ids, requests, continues, telling, stops)

    def _spelled(self, params: SamplingParams) -> SamplingParams:
        """With the tokens of `bad_words`: as the text may begin with them, and as they stand after a space."""
        if not params.bad_words:
            return params
        spellings = (before + word.strip() for word in params.bad_words for before in ("", " "))
        spelled = (tuple(self.tokenizer.encode(text, add_special_tokens=False)) for text in spellings)
        more = dict.fromkeys((*params.bad_token_ids, *filter(None, spelled)))
        return msgspec.structs.replace(params, bad_words=(), bad_token_ids=tuple(more))

    def _truncated(self, prompt: Sequence[int], params: SamplingParams) -> Sequence[int]:
        most = params.truncate_prompt_tokens
        if most is None or len(prompt) <= most:
            return prompt
        if most == -1:
            num_wanted = 1 if params.max_tokens is None else params.max_tokens
            most = max(self.info.max_model_len - num_wanted, 1)
        return prompt[max(len(prompt) - most, 0) :]

    def check_writes(self) -> None:
        """Raises `RequestError` for a model that writes no text."""
        if not self.info.writes_text:
            raise RequestError(
                "This is an embedding model: it makes vectors of texts (/v1/embeddings, LLM.embed) and writes none.",
                code="model_not_supported",
            )

    def check_num_chars(self, num_chars: int, param: str) -> None:
        """Raises `RequestError` for a text that is too long whatever its tokens are."""
        if (text := limits().over("max_prompt_chars", num_chars, f"the prompt has {num_chars} characters")) is not None:
            raise RequestError(text, param=param, code="prompt_too_long")
        max_model_len = self.info.max_model_len
        if num_chars > max_model_len * MAX_CHARS_PER_TOKEN:
            raise RequestError(
                f"This model's maximum context length is {max_model_len} tokens, "
                f"which cannot hold {num_chars} characters.",
                param=param,
                code="context_length_exceeded",
            )
