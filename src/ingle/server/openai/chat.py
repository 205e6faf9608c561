"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle.errors import RequestError
from ingle.request import FinishReason, TokenLogprobs, stopping_at
from ingle.server.body import parse_body
from ingle.server.context import ServerContext
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation, Update, UsageCounter, check_num_chars, plan_generation
from ingle.server.openai.logprobs import chat_logprobs, prompt_logprobs
from ingle.server.openai.protocol import ChatCompletionRequest
from ingle.server.openai.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessageAnswer,
    PromptLogprobs,
    Usage,
)
from ingle.server.respond import respond
from ingle.server.streaming import DONE_EVENT, event


async def create_chat_completion(request: Request) -> Response:
    return await respond(request, prepare_chat)


ENDPOINTS = (Endpoint("POST", "/v1/chat/completions", create_chat_completion, ChatCompletionRequest),)


def prepare_chat(context: ServerContext, body: bytes) -> ChatAnswer:
    """Validates, renders and tokenizes. Raises `RequestError`."""
    chat = parse_body(ChatCompletionRequest, body)
    context.check_model(chat.model)
    sampling = chat.sampling_params(
        context.default_sampling,
        max_tokens=chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
    generation = plan_generation(
        context,
        "chatcmpl",
        [_render(context, chat)],
        stopping_at(sampling, context.tokenizer.chat_stops),
        # The template writes the special tokens itself.
        add_special_tokens=bool(chat.add_special_tokens),
        continues=False,
        param="messages",
    )
    return ChatAnswer(context, chat, generation)


def _render(context: ServerContext, chat: ChatCompletionRequest) -> str:
    if context.chat_template is None:
        raise RequestError(
            "This model has no chat template. Start the server with --chat-template FILE, or use /v1/completions.",
            param="messages",
            code="chat_template_missing",
        )
    check_num_chars(context, sum(len(message.content) for message in chat.messages), "messages")
    return context.chat_template.prompt(
        [message.for_template() for message in chat.messages],
        add_generation_prompt=chat.add_generation_prompt is not False,
        chat_template_kwargs=chat.chat_template_kwargs,
    )


@dataclass
class _Choice:
    """What has been generated of one choice."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, update: Update) -> None:
        self.text.append(update.delta.text)
        self.logprobs += update.delta.logprobs or ()
        self.prompt_logprobs = self.prompt_logprobs or update.output.prompt_logprobs
        self.finish_reason = update.delta.finish_reason
        self.stop_reason = update.delta.stop_reason


class ChatAnswer:
    def __init__(self, context: ServerContext, chat: ChatCompletionRequest, generation: Generation) -> None:
        self.streamed = bool(chat.stream)
        self._context = context
        self._chat = chat
        self._generation = generation
        self.requests = generation.requests
        self._created = int(time.time())
        self._usage = UsageCounter(generation)

    async def whole(self) -> ChatCompletion:
        choices = [_Choice() for _ in self._generation.requests]
        async with aclosing(self._generation.updates()) as updates:
            async for update in updates:
                self._usage.add(update)
                choices[update.choice].add(update)
        return ChatCompletion(
            id=self._generation.id,
            created=self._created,
            model=self._context.model_names[0],
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=self._usage.usage(),
            prompt_logprobs=self._prompt_logprobs(choices[0]),
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        unnamed = set(range(len(self._generation.requests)))
        async with aclosing(self._generation.updates()) as updates:
            async for update in updates:
                self._usage.add(update)
                choices = self._chunk_choices(update)
                if update.choice in unnamed:
                    unnamed.remove(update.choice)
                    role = ChatDelta(role="assistant", content="")
                    choices.insert(0, ChatChunkChoice(index=update.choice, delta=role))
                if choices:
                    yield b"".join(self._event([choice]) for choice in choices)
        if self._chat.include_usage:
            yield self._event([], self._usage.usage())
        yield DONE_EVENT

    def _chunk_choices(self, update: Update) -> list[ChatChunkChoice]:
        index, delta = update.choice, update.delta
        choices = []
        if delta.text or delta.logprobs:
            content = ChatDelta(content=delta.text)
            choices.append(ChatChunkChoice(index=index, delta=content, logprobs=self._logprobs(delta.logprobs)))
        if delta.finish_reason is not None:
            end = ChatChunkChoice(
                index=index, delta=ChatDelta(), finish_reason=delta.finish_reason, stop_reason=delta.stop_reason
            )
            choices.append(end)
        return choices

    def _event(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> bytes:
        chunk = ChatChunk(
            id=self._generation.id,
            created=self._created,
            model=self._context.model_names[0],
            choices=choices,
            usage=usage if self._chat.include_usage else UNSET,
        )
        return event(chunk)

    def _choice(self, index: int, choice: _Choice) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessageAnswer(content="".join(choice.text)),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
        )

    def _logprobs(self, entries: list[TokenLogprobs] | None) -> ChatLogprobs | None:
        return chat_logprobs(self._context.tokenizer, entries or ()) if self._chat.logprobs else None

    def _prompt_logprobs(self, choice: _Choice) -> PromptLogprobs | UnsetType:
        if choice.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self._context.tokenizer, choice.prompt_logprobs)
