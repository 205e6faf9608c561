"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ingle import events
from ingle.request import FinishReason, TokenLogprobs
from ingle.server.endpoints import Endpoint
from ingle.server.errors import error_event
from ingle.server.generation import Generation
from ingle.server.models import ServedModel
from ingle.server.openai.extras import Extras
from ingle.server.openai.logprobs import chat_logprobs, prompt_logprobs, token_name
from ingle.server.openai.protocol import ChatCompletionRequest
from ingle.server.openai.responses import (
    DONE_EVENT,
    CalledFunction,
    CalledFunctionDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessageAnswer,
    ChatToolCall,
    ChatToolCallDelta,
    PromptLogprobs,
    PromptProgress,
    Usage,
    usage_of,
)
from ingle.server.respond import respond
from ingle.server.streaming import event
from ingle.server.turn import Turn, plan_turn
from ingle.text.formats.words import text_of


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
        name=chat.request_id,
        messages=[message.for_template() for message in chat.messages],
        sampling=sampling,
        tools=[tool.for_template() for tool in chat.tools or ()],
        tool_choice="required" if chat.tool_choice == "required" else "none" if chat.tool_choice == "none" else "auto",
        tool_name=chat.tool_name,
        parallel_tool_calls=chat.parallel_tool_calls is not False,
        thinking_budget=chat.thinking_token_budget,
        documents=chat.documents or (),
        template_kwargs=chat.template_kwargs,
        add_generation_prompt=chat.add_generation_prompt is not False,
        continue_final_message=bool(chat.continue_final_message),
        add_special_tokens=bool(chat.add_special_tokens),
    )


def _echoed(chat: ChatCompletionRequest) -> str:
    """The last message, at the head of the text that is returned."""
    last = chat.messages[-1]
    if not chat.echo or last.role != "assistant":
        return ""
    return text_of(last.content)


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
        self._include_reasoning = chat.include_reasoning is not False
        self._ends_with_stop = chat.tool_name is not None  # as OpenAI's do when the client named the function
        self._echo = _echoed(chat)
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
                delta = ChatDelta(role="assistant", content=self._echo)
                prompt = self._extras.prompt_token_ids() if choice == 0 else UNSET
                return self._chunk([ChatChunkChoice(index=choice, delta=delta)], prompt_token_ids=prompt)
            case events.Text(choice, text, ids, logprobs) if (
                text or self._extras.wants_token_ids or (logprobs and self._include_logprobs)
            ):
                delta, told_ids = ChatDelta(content=text), self._extras.token_ids(ids)
                scored = self._logprobs(logprobs)
                return self._chunk([ChatChunkChoice(index=choice, delta=delta, logprobs=scored, token_ids=told_ids)])
            case events.Thought(choice, text) if self._include_reasoning:
                return self._delta(choice, ChatDelta(reasoning_content=text, reasoning=text))
            case events.ToolCall(choice, index, id, name):
                function = CalledFunctionDelta(name=name, arguments="")
                call = ChatToolCallDelta(index=index, id=id, type="function", function=function)
                return self._delta(choice, ChatDelta(tool_calls=[call]))
            case events.Arguments(choice, index, text):
                call = ChatToolCallDelta(index=index, function=CalledFunctionDelta(arguments=text))
                return self._delta(choice, ChatDelta(tool_calls=[call]))
            case events.Finish(choice, reason, stop):
                delta, reason = ChatDelta(), self._reason(reason) or reason
                ended = ChatChunkChoice(index=choice, delta=delta, finish_reason=reason, stop_reason=stop)
                return self._chunk([ended])
            case events.Usage() if self._include_usage:
                return self._chunk([], usage_of(told))
        return b""

    def _delta(self, choice: int, delta: ChatDelta) -> bytes:
        return self._chunk([ChatChunkChoice(index=choice, delta=delta)])

    def _reason(self, reason: FinishReason | None) -> FinishReason | None:
        return "stop" if reason == "tool_calls" and self._ends_with_stop else reason

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
            message=self._message(choice),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=self._reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
            token_ids=self._extras.token_ids(choice.token_ids),
        )

    def _message(self, choice: events.Choice) -> ChatMessageAnswer:
        text = self._echo + choice.text
        calls = [
            ChatToolCall(id=call.begin.id, function=CalledFunction(call.begin.name, call.arguments))
            for _, call in sorted(choice.calls.items())
            if call.begin is not None
        ]
        thought: str | UnsetType = (choice.thought or UNSET) if self._include_reasoning else UNSET
        return ChatMessageAnswer(
            content=text if text or not calls else None,
            tool_calls=calls or UNSET,
            reasoning_content=thought,
            reasoning=thought,
        )

    def _logprobs(self, entries: Iterable[TokenLogprobs] | None) -> ChatLogprobs | None:
        if not self._include_logprobs:
            return None
        return chat_logprobs(self.generation.model.tokenizer, entries or (), self._token_name)

    def _prompt_logprobs(self, choice: events.Choice) -> PromptLogprobs | UnsetType:
        if choice.prompt_logprobs is None:
            return UNSET
        return prompt_logprobs(self.generation.model.tokenizer, choice.prompt_logprobs)
