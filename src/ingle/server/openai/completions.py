"""`POST /v1/completions`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle import events
from ingle.server.endpoints import Endpoint
from ingle.server.errors import error_event
from ingle.server.generation import Generation, plan_generation
from ingle.server.models import ServedModel
from ingle.server.openai.extras import Extras
from ingle.server.openai.logprobs import ScoredToken, completion_logprobs, prompt_logprobs, token_name
from ingle.server.openai.protocol import CompletionRequest
from ingle.server.openai.responses import DONE_EVENT, Completion, CompletionChoice, Usage, usage_of
from ingle.server.respond import respond
from ingle.server.streaming import event
from ingle.text.infill import infilled, stopping_with

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request) -> Response:
    """What follows a prompt, or several, plain or streamed."""
    return await respond(request, CompletionRequest, prepare_completion)


ENDPOINTS = (Endpoint("POST", "/v1/completions", create_completion, CompletionRequest, Completion, Completion),)


def prepare_completion(model: ServedModel, completion: CompletionRequest) -> CompletionWriter:
    """Tokenizes. Raises `RequestError`."""
    wanted = completion.prompt_logprobs
    ranked = completion.num_computed > (completion.n or 1)
    sampling = completion.sampling_params(
        model.default_sampling,
        max_tokens=DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens,
        n=completion.num_computed,
        logprobs=0 if ranked and completion.logprobs is None else completion.logprobs,
        prompt_logprobs=completion.logprobs if completion.echo and wanted is None else wanted,
    )
    prompts: Sequence[str | list[int]] = completion.prompt
    if completion.suffix:
        prompts, ends = infilled(model.tokenizer, prompts, completion.suffix)
        sampling = stopping_with(sampling, ends)
    generation = plan_generation(
        model,
        "cmpl",
        prompts,
        sampling,
        add_special_tokens=completion.add_special_tokens is not False,
        continues=True,
        param="prompt",
        name=completion.request_id,
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
    failed = staticmethod(error_event)

    def __init__(self, completion: CompletionRequest, generation: Generation) -> None:
        self.streamed = bool(completion.stream)
        self.generation = generation
        self._tokenizer = generation.model.tokenizer
        self._completion = completion.model_copy(update={"prompt": []})  # the requests have it, and more compactly
        self._extras = Extras(completion, generation)
        self._token_name = token_name(self._tokenizer, completion.return_tokens_as_token_ids)
        self._created = int(time.time())
        self._echoes = [_echo(self._tokenizer, completion, prompt) for prompt in completion.prompt if completion.echo]

    def piece(self, together: Sequence[events.Event]) -> bytes:
        told = events.fold(together)
        self._extras.count(together)
        choices = [self._choice(index, choice) for index, choice in told.choices.items()]
        if told.usage is not None:
            return event(self._completion_of(choices, usage_of(told.usage))) if self._completion.include_usage else b""
        progress = self._extras.progress(together)
        shown = [c for c in choices if c.text or c.logprobs or c.finish_reason or c.token_ids or c.prompt_token_ids]
        if not shown and progress is None:
            return b""
        chunk = self._completion_of(shown, self._extras.chunk_usage)
        chunk.prompt_progress = UNSET if progress is None else progress
        return event(chunk)

    def whole(self, answer: events.Answer) -> Completion:
        assert answer.usage is not None
        choices = [self._choice(index, choice) for index, choice in self._best(answer)]
        return self._completion_of(choices, usage_of(answer.usage))

    def _best(self, answer: events.Answer) -> Iterator[tuple[int, events.Choice]]:
        """Of each prompt's choices the `n` likeliest, in falling order of a token's mean log probability."""
        num_wanted, num_computed = self._completion.n or 1, self._completion.num_computed
        if num_wanted == num_computed:
            yield from sorted(answer.choices.items())
            return
        for prompt_index in range(len(self.generation.prompts)):
            of_prompt = [answer.choices[prompt_index * num_computed + number] for number in range(num_computed)]
            for number, choice in enumerate(sorted(of_prompt, key=_mean_logprob, reverse=True)[:num_wanted]):
                yield prompt_index * num_wanted + number, choice

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
            logprobs=None if completion.logprobs is None else completion_logprobs(self._token_name, scored),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            prompt_logprobs=(
                prompt_logprobs(self._tokenizer, of_prompt)
                if of_prompt is not None and completion.prompt_logprobs is not None
                else UNSET
            ),
            prompt_token_ids=UNSET if choice.begin is None else self._extras.prompt_token_ids(prompt_index),
            token_ids=self._extras.token_ids(choice.token_ids),
        )


def _mean_logprob(choice: events.Choice) -> float:
    entries = choice.logprobs or ()
    return sum(entry.logprobs[0] for entry in entries) / max(len(entries), 1)


def _scored(choice: events.Choice, num_echoed: int) -> list[ScoredToken]:
    """A choice's tokens, where it stands behind so many characters of its prompt."""
    entries = choice.logprobs or ()
    return [
        ScoredToken(entry.token_ids[0], num_echoed + start, entry)
        for start, entry in zip(choice.starts, entries, strict=bool(entries))
    ]
