"""`POST /v1/completions`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle import events
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation, plan_generation
from ingle.server.models import ServedModel
from ingle.server.openai.logprobs import ScoredToken, completion_logprobs, prompt_logprobs
from ingle.server.openai.protocol import CompletionRequest
from ingle.server.openai.responses import DONE_EVENT, Completion, CompletionChoice, Usage, more_used, usage_of
from ingle.server.respond import respond
from ingle.server.streaming import event

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request) -> Response:
    return await respond(request, CompletionRequest, prepare_completion)


ENDPOINTS = (Endpoint("POST", "/v1/completions", create_completion, CompletionRequest),)


def prepare_completion(model: ServedModel, completion: CompletionRequest) -> CompletionWriter:
    """Tokenizes. Raises `RequestError`."""
    wanted = completion.prompt_logprobs
    sampling = completion.sampling_params(
        model.default_sampling,
        max_tokens=DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens,
        logprobs=completion.logprobs,
        prompt_logprobs=completion.logprobs if completion.echo and wanted is None else wanted,
    )
    generation = plan_generation(
        model,
        "cmpl",
        completion.prompt,
        sampling,
        add_special_tokens=completion.add_special_tokens is not False,
        continues=True,
        param="prompt",
    )
    return CompletionWriter(completion, generation)


class _Echo(NamedTuple):
    """A prompt at the head of the text that is returned."""

    text: str = ""
    starts: Sequence[int] = ()
    """Where each of its tokens begins, if their log probabilities are returned."""


_NO_ECHO = _Echo()


def _echo(tokenizer: Tokenizer, completion: CompletionRequest, prompt: str | list[int]) -> _Echo:
    """A text as it was sent; token ids as they decode, but for a last character that the answer may finish."""
    scored = completion.logprobs is not None
    if isinstance(prompt, str):
        add_special_tokens = completion.add_special_tokens is not False
        return _Echo(prompt, tokenizer.starts(prompt, add_special_tokens) if scored else ())
    detokenizer = tokenizer.detokenizer(completion.skip_special_tokens is not False)
    text, num_chars, starts = [], 0, []
    for token_id in prompt:
        starts.append(num_chars + detokenizer.num_held if scored else 0)
        text.append(detokenizer.push(token_id))
        num_chars += len(text[-1])
    return _Echo("".join(text) + detokenizer.settle(), starts)


class CompletionWriter:
    """Writes an answer as chunks of a completion, or as a whole one: both alike, of few events or all."""

    end = DONE_EVENT

    def __init__(self, completion: CompletionRequest, generation: Generation) -> None:
        self.streamed = bool(completion.stream)
        self.generation = generation
        self._tokenizer = generation.model.tokenizer
        self._completion = completion.model_copy(update={"prompt": []})  # the requests have it, and more compactly
        self._include_usage = completion.include_usage
        self._so_far = events.Usage(sum(len(prompt.token_ids) for prompt in generation.prompts), 0, 0)
        self._created = int(time.time())
        self._echoes = [_echo(self._tokenizer, completion, prompt) for prompt in completion.prompt if completion.echo]

    def piece(self, together: Sequence[events.Event]) -> bytes:
        told, include_usage = events.fold(together), self._include_usage
        if self._completion.continuous_usage:
            self._so_far = more_used(self._so_far, together)
        choices = [self._choice(index, choice) for index, choice in told.choices.items()]
        if told.usage is None:
            shown = [choice for choice in choices if choice.text or choice.logprobs or choice.finish_reason]
            usage = usage_of(self._so_far) if self._completion.continuous_usage else None
            return event(self._completion_of(shown, usage if include_usage else UNSET)) if shown else b""
        return event(self._completion_of(choices, usage_of(told.usage))) if include_usage else b""

    def whole(self, answer: events.Answer) -> Completion:
        assert answer.usage is not None
        choices = [self._choice(index, choice) for index, choice in sorted(answer.choices.items())]
        return self._completion_of(choices, usage_of(answer.usage))

    def _completion_of(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self.generation.id,
            created=self._created,
            model=self.generation.model.name,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, choice: events.Choice) -> CompletionChoice:
        """One choice, or a piece of it. The one that begins it echoes the prompt."""
        prompt_index, completion = index // (self._completion.n or 1), self._completion
        echo = self._echoes[prompt_index] if self._echoes else _NO_ECHO
        text, scored, of_prompt = choice.text, _scored(choice, len(echo.text)), choice.prompt_logprobs
        if choice.begin is not None:
            text = echo.text + text
            if completion.echo and of_prompt is not None and completion.logprobs is not None:
                prompt_token_ids = self.generation.prompts[prompt_index].token_ids
                of_echo = zip(prompt_token_ids, echo.starts, of_prompt, strict=True)
                scored = [*itertools.starmap(ScoredToken, of_echo), *scored]
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if completion.logprobs is None else completion_logprobs(self._tokenizer, scored),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_logprobs=(
                prompt_logprobs(self._tokenizer, of_prompt)
                if of_prompt is not None and completion.prompt_logprobs is not None
                else UNSET
            ),
        )


def _scored(choice: events.Choice, num_echoed: int) -> list[ScoredToken]:
    """A choice's tokens, where it stands behind so many characters of its prompt."""
    entries = choice.logprobs or ()
    return [
        ScoredToken(entry.token_ids[0], num_echoed + start, entry)
        for start, entry in zip(choice.starts, entries, strict=bool(entries))
    ]
