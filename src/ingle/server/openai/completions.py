"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle.request import EngineRequest, TokenLogprobs
from ingle.server.body import parse_body
from ingle.server.context import ServerContext
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation, Update, UsageCounter, plan_generation
from ingle.server.openai.logprobs import CompletionLogprobsWriter, joined, prompt_logprobs
from ingle.server.openai.protocol import CompletionRequest
from ingle.server.openai.responses import Completion, CompletionChoice, Usage
from ingle.server.respond import respond
from ingle.server.streaming import DONE_EVENT, event

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
        param="prompt",
    )
    return CompletionAnswer(context, completion, generation)


def _echoes(context: ServerContext, completion: CompletionRequest) -> list[str]:
    """What each prompt's choices start with: its text if echo was asked for."""
    if not completion.echo:
        return [""] * len(completion.prompt)
    skip_special_tokens = completion.skip_special_tokens is not False
    return [
        prompt if isinstance(prompt, str) else context.tokenizer.decode(prompt, skip_special_tokens=skip_special_tokens)
        for prompt in completion.prompt
    ]


class CompletionAnswer:
    def __init__(self, context: ServerContext, completion: CompletionRequest, generation: Generation) -> None:
        self.streamed = bool(completion.stream)
        self._context = context
        self._completion = completion
        self._generation = generation
        self._created = int(time.time())
        self._usage = UsageCounter(generation)
        echoes = _echoes(context, completion)
        self._writers = [
            _ChoiceWriter(context, completion, request, echoes[index // (completion.n or 1)])
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
        self, context: ServerContext, completion: CompletionRequest, request: EngineRequest, echo: str
    ) -> None:
        self._tokenizer = context.tokenizer
        self._completion = completion
        self._request = request
        self._echo = echo
        self._logprobs = CompletionLogprobsWriter(context.tokenizer)
        self._begun = False

    def piece(self, update: Update) -> CompletionChoice:
        delta, of_prompt = update.delta, update.output.prompt_logprobs
        text = delta.text
        scored: list[tuple[int, TokenLogprobs | None]] = [(entry.token_ids[0], entry) for entry in delta.logprobs or ()]
        if self._completion.echo and not self._begun:
            text = self._echo + text
            if of_prompt is not None:
                scored = [*zip(self._request.prompt_token_ids, of_prompt, strict=True), *scored]
        self._begun = True
        return CompletionChoice(
            index=update.choice,
            text=text,
            logprobs=None if self._completion.logprobs is None else self._logprobs.write(scored),
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
