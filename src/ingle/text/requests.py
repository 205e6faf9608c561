"""From prompts to what is asked of the engine, and from its tokens to events: the same offline and in the server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingle.errors import RequestError
from ingle.request import EngineRequest, SamplingParams, TokenIds, check_sampling, room_for, vocabulary_ids
from ingle.text.stop import automaton
from ingle.text.stream import TextStream

if TYPE_CHECKING:
    from ingle.channel import EngineInfo
    from ingle.text.tokenizer import Tokenizer

_MAX_CHARS_PER_TOKEN = 128
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

    def stream(self, choice: int) -> TextStream:
        """For the outputs of one of the requests, as events of that choice."""
        return TextStream(self.tokenizer, self.params, self.token_ids if self.continues else (), choice)


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
    ) -> PromptRequests:
        """The `params.n` requests of a prompt, the i-th with `seed + i`, each with the next of `request_ids`.

        Raises `RequestError` for a prompt that is empty or too long, naming the field `param`, and for token ids that
        the model does not have.
        """
        check_sampling(params, self.info.vocab_size)
        # Made here, off a server's event loop, where they may take a while.
        automaton(params.stop)
        wanted = params.structured_outputs
        grammar = None if wanted is None else self.tokenizer.grammars.grammar(wanted)
        if isinstance(prompt, str):
            self.check_num_chars(len(prompt), param)
            prompt = self.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        try:
            token_ids = vocabulary_ids(prompt, self.info.vocab_size)
            max_tokens = room_for(len(token_ids), params.max_tokens, self.info.max_model_len)
        except RequestError as error:
            raise RequestError(str(error), param=param, code=error.code, status=error.status) from error
        ends = self.tokenizer.eos_token_ids
        requests = [
            EngineRequest(next(request_ids), token_ids, params.of_choice(index, max_tokens), ends, grammar)
            for index in range(params.n)
        ]
        return PromptRequests(self.tokenizer, params, token_ids, requests, continues)

    def check_num_chars(self, num_chars: int, param: str) -> None:
        """Raises `RequestError` for a text that is too long whatever its tokens are."""
        max_model_len = self.info.max_model_len
        if num_chars > max_model_len * _MAX_CHARS_PER_TOKEN:
            raise RequestError(
                f"This model's maximum context length is {max_model_len} tokens, "
                f"which cannot hold {num_chars} characters.",
                param=param,
                code="context_length_exceeded",
            )
