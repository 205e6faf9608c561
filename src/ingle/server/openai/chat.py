"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle import events
from ingle.request import TokenLogprobs
from ingle.server.endpoints import Endpoint
from ingle.server.errors import error_event
from ingle.server.generation import Generation
from ingle.server.models import ServedModel
from ingle.server.openai.extras import Extras
from ingle.server.openai.logprobs import chat_logprobs, prompt_logprobs, token_name
from ingle.server.openai.protocol import ChatCompletionRequest
from ingle.server.openai.responses import (
    DONE_EVENT,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessageAnswer,
    PromptLogprobs,
    PromptProgress,
    Usage,
    usage_of,
)
from ingle.server.respond import respond
from ingle.server.streaming import event
from ingle.server.turn import Turn, plan_turn


async def create_chat_completion(request: Request) -> Response:
    """The next message of a conversation, plain or streamed."""
    return await respond(request, ChatCompletionRequest, prepare_chat)


ENDPOINTS = (
    Endpoint("POST", "/v1/chat/completions", create_chat_completion, ChatCompletionRequest, ChatCompletion, ChatChunk),
)


def prepare_chat(model: ServedModel, chat: ChatCompletionRequest) -> ChatWriter:
    """Renders and tokenizes. Raises `RequestError`."""
    return ChatWriter(chat, plan_turn(model, chat_turn(model, chat)))


def chat_turn(model: ServedModel, chat: ChatCompletionRequest) -> Turn:
    sampling = chat.sampling_params(
        model.default_sampling,
        max_tokens=chat.max_tokens if chat.max_completion_tokens is None else chat.max_completion_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
    return Turn(
        prefix="chatcmpl",
        messages=[message.for_template() for message in chat.messages],
        sampling=sampling,
        template_kwargs=chat.chat_template_kwargs or {},
        add_generation_prompt=chat.add_generation_prompt is not False,
        add_special_tokens=bool(chat.add_special_tokens),
    )


class ChatWriter:
    """Writes an answer as chunks of a chat completion, or as a whole one."""

    end = DONE_EVENT
    failed = staticmethod(error_event)

    def __init__(self, chat: ChatCompletionRequest, generation: Generation) -> None:
        self.streamed = bool(chat.stream)
        self.generation = generation
        self._include_usage = chat.include_usage
        self._extras = Extras(chat, generation)
        self._token_name = token_name(generation.model.tokenizer, chat.return_tokens_as_token_ids)
        self._include_logprobs = bool(chat.logprobs)
        self._created = int(time.time())

    def piece(self, together: Sequence[events.Event]) -> bytes:
        self._extras.count(together)
        progress = self._extras.progress(together)
        before = b"" if progress is None else self._chunk([], progress=progress)
        return before + b"".join(map(self._chunks, together))

    def whole(self, answer: events.Answer) -> ChatCompletion:
        assert answer.usage is not None
        return ChatCompletion(
            id=self.generation.id,
            created=self._created,
            model=self.generation.model.name,
            choices=[self._choice(index, choice) for index, choice in sorted(answer.choices.items())],
            usage=usage_of(answer.usage),
            prompt_logprobs=self._prompt_logprobs(answer.choices[0]),
            prompt_token_ids=self._extras.prompt_token_ids(),
        )

    def _chunks(self, told: events.Event) -> bytes:
        match told:
            case events.Begin(choice):
                delta = ChatDelta(role="assistant", content="")
                prompt = self._extras.prompt_token_ids() if choice == 0 else UNSET
                return self._chunk([ChatChunkChoice(index=choice, delta=delta)], prompt_token_ids=prompt)
            case events.Text(choice, text, ids, logprobs) if text or logprobs or self._extras.wants_token_ids:
                delta, told_ids = ChatDelta(content=text), self._extras.token_ids(ids)
                scored = self._logprobs(logprobs)
                return self._chunk([ChatChunkChoice(index=choice, delta=delta, logprobs=scored, token_ids=told_ids)])
            case events.Finish(choice, reason, stop):
                delta = ChatDelta()
                ended = ChatChunkChoice(index=choice, delta=delta, finish_reason=reason, stop_reason=stop)
                return self._chunk([ended])
            case events.Usage() if self._include_usage:
                return self._chunk([], usage_of(told))
        return b""

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | None = None,
        *,
        prompt_token_ids: list[int] | UnsetType = UNSET,
        progress: PromptProgress | UnsetType = UNSET,
    ) -> bytes:
        chunk = ChatChunk(
            id=self.generation.id,
            created=self._created,
            model=self.generation.model.name,
            choices=choices,
            usage=self._extras.chunk_usage if usage is None else usage,
            prompt_token_ids=prompt_token_ids,
            prompt_progress=progress,
        )
        return event(chunk)

    def _choice(self, index: int, choice: events.Choice) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessageAnswer(content=choice.text),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=self._extras.token_ids(choice.token_ids),
        )

    def _logprobs(self, entries: Iterable[TokenLogprobs] | None) -> ChatLogprobs | None:
        if not self._include_logprobs:
            return None
        return chat_logprobs(self.generation.model.tokenizer, entries or (), self._token_name)

    def _prompt_logprobs(self, choice: events.Choice) -> PromptLogprobs | UnsetType:
        if choice.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self.generation.model.tokenizer, choice.prompt_logprobs)
