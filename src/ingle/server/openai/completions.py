"""`POST /v1/completions`."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, NamedTuple

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import EngineRequest
from ingle.server.body import parse_body
from ingle.server.context import ServerContext
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation, Update, UsageCounter, plan_generation
from ingle.server.openai.logprobs import ScoredToken, completion_logprobs, joined, prompt_logprobs
from ingle.server.openai.protocol import CompletionRequest
from ingle.server.openai.responses import Completion, CompletionChoice, Usage
from ingle.server.respond import respond
from ingle.server.streaming import DONE_EVENT, event

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16


async def create_completion(request: Request) -> Response:
    return await respond(request, prepare_completion)


ENDPOINTS = (Endpoint("POST", "/v1/completions", create_completion, CompletionRequest),)


def prepare_completion(context: ServerContext, body: bytes) -> CompletionAnswer:
    """Validates and tokenizes. Raises `RequestError`."""
    completion = parse_body(CompletionRequest, body)
    context.check_model(completion.model)
    wanted = completion.prompt_logprobs
    sampling = completion.sampling_params(
        context.default_sampling,
        max_tokens=DEFAULT_MAX_TOKENS if completion.max_tokens is None else completion.max_tokens,
        logprobs=completion.logprobs,
        prompt_logprobs=completion.logprobs if completion.echo and wanted is None else wanted,
    )
    generation = plan_generation(
        context,
        "cmpl",
        completion.prompt,
        sampling,
        add_special_tokens=completion.add_special_tokens is not False,
        continues=True,
        param="prompt",
    )
    return CompletionAnswer(context, completion, generation)


class _Echo(NamedTuple):
    """A prompt at the head of the text that is returned."""

    text: str = ""
    starts: Sequence[int] = ()
    """Where each of its tokens begins, if their log probabilities are returned."""


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


class CompletionAnswer:
    def __init__(self, context: ServerContext, completion: CompletionRequest, generation: Generation) -> None:
        self.streamed = bool(completion.stream)
        self._context = context
        self._completion = completion.model_copy(update={"prompt": []})  # the requests have it, and more compactly
        self._generation = generation
        self.requests = generation.requests
        self._created = int(time.time())
        self._usage = UsageCounter(generation)
        echoes = [_echo(context.tokenizer, completion, prompt) for prompt in completion.prompt if completion.echo]
        n = completion.n or 1
        self._writers = [
            _ChoiceWriter(context, self._completion, request, echoes[index // n] if echoes else _Echo())
            for index, request in enumerate(generation.requests)
        ]

    async def whole(self) -> Completion:
        pieces: list[list[CompletionChoice]] = [[] for _ in self._writers]
        async with aclosing(self._generation.updates()) as updates:
            async for update in updates:
                self._usage.add(update)
                pieces[update.choice].append(self._writers[update.choice].piece(update))
        return self._completion_of([_join(of_one) for of_one in pieces], self._usage.usage())

    async def events(self) -> AsyncGenerator[bytes, None]:
        include_usage = self._completion.include_usage
        async with aclosing(self._generation.updates()) as updates:
            async for update in updates:
                self._usage.add(update)
                piece = self._writers[update.choice].piece(update)
                if piece.text or piece.logprobs or piece.finish_reason:
                    yield event(self._completion_of([piece], None if include_usage else UNSET))
        if include_usage:
            yield event(self._completion_of([], self._usage.usage()))
        yield DONE_EVENT

    def _completion_of(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(
            id=self._generation.id,
            created=self._created,
            model=self._context.model_names[0],
            choices=choices,
            usage=usage,
        )


class _ChoiceWriter:
    """Writes one choice in pieces: the chunks of a stream, or the parts of a whole. The first echoes the prompt."""

    def __init__(
        self, context: ServerContext, completion: CompletionRequest, request: EngineRequest, echo: _Echo
    ) -> None:
        self._tokenizer = context.tokenizer
        self._completion = completion
        self._request = request
        self._echo = echo
        self._begun = False

    def piece(self, update: Update) -> CompletionChoice:
        delta, of_prompt = update.delta, update.output.prompt_logprobs
        text = delta.text
        scored = [
            ScoredToken(entry.token_ids[0], len(self._echo.text) + start, entry)
            for start, entry in zip(delta.starts, delta.logprobs or (), strict=bool(delta.logprobs))
        ]
        if self._completion.echo and not self._begun:
            text = self._echo.text + text
            if of_prompt is not None and self._completion.logprobs is not None:
                of_echo = zip(self._request.prompt_token_ids, self._echo.starts, of_prompt, strict=True)
                scored = [*itertools.starmap(ScoredToken, of_echo), *scored]
        self._begun = True
        return CompletionChoice(
            index=update.choice,
            text=text,
            logprobs=None if self._completion.logprobs is None else completion_logprobs(self._tokenizer, scored),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            prompt_logprobs=(
                prompt_logprobs(self._tokenizer, of_prompt)
                if of_prompt is not None and self._completion.prompt_logprobs is not None
                else UNSET
            ),
        )


def _join(pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    first, last = pieces[0], pieces[-1]
    return CompletionChoice(
        index=first.index,
        text="".join(piece.text for piece in pieces),
        logprobs=None if first.logprobs is None else joined([piece.logprobs for piece in pieces if piece.logprobs]),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=first.prompt_logprobs,
    )
