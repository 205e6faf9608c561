"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from ingle import events
from ingle.request import SamplingParams
from ingle.server.answer_format import bound_params
from ingle.server.anthropic.answers import (
    BlockDelta,
    BlockStart,
    BlockStop,
    ContentAnswer,
    InputDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    Ping,
    SignatureDelta,
    StopDelta,
    StopReason,
    StreamEvent,
    TextAnswer,
    TextDelta,
    ThinkingAnswer,
    ThinkingDelta,
    TokenCount,
    ToolUseAnswer,
    Usage,
    usage_of,
)
from ingle.server.anthropic.conversation import conversation_of, tools_of
from ingle.server.anthropic.errors import OVERLOADED, AnthropicError, error_event
from ingle.server.anthropic.protocol import CountTokensRequest, MessagesInput, MessagesRequest
from ingle.server.blocks import Block, Blocks, Closed, Grown, Opened, Step, blocks_of
from ingle.server.body import UnknownFields
from ingle.server.endpoints import Endpoint
from ingle.server.generation import Generation
from ingle.server.models import ServedModel
from ingle.server.respond import respond, respond_at_once
from ingle.server.streaming import named_event
from ingle.server.turn import Params, Turn, plan_turn, thinking_kwargs, turn_prompt

SIGNATURE = "dW5zaWduZWQ="
"""Clients send thoughts back with what they were signed with, and some drop those without. Nobody checks it here."""
_PARAMS = Params(thinking_budget="thinking.budget_tokens")
_CHOICES: Mapping[str, Literal["required", "none"]] = {"any": "required", "none": "none"}


async def create_message(request: Request) -> Response:
    """Anthropic's Messages API."""
    skipped = UnknownFields.of(request)
    return await respond(request, MessagesRequest, lambda model, body: prepare_message(model, body, skipped))


async def count_tokens(request: Request) -> Response:
    """What the prompt of such a message would take."""
    skipped = UnknownFields.of(request)

    def counted(model: ServedModel, body: CountTokensRequest) -> TokenCount:
        turn = _turn(body, SamplingParams(max_tokens=None), skipped)
        return TokenCount(len(model.tokenizer.encode(turn_prompt(model, turn), add_special_tokens=False)))

    return await respond_at_once(request, CountTokensRequest, counted)


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/messages",
        create_message,
        MessagesRequest,
        answers=Message,
        chunks=StreamEvent,
        error=AnthropicError,
        statuses=(OVERLOADED,),
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        count_tokens,
        CountTokensRequest,
        answers=TokenCount,
        error=AnthropicError,
        statuses=(OVERLOADED,),
    ),
)


def prepare_message(model: ServedModel, body: MessagesRequest, skipped: UnknownFields) -> MessageWriter:
    """Renders and tokenizes. Raises `RequestError`."""
    given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    stops = tuple(body.stop_sequences or ())
    given |= {"stop": stops, "max_tokens": body.max_tokens}
    sampling = bound_params(body.format, "output_config.format", {**model.default_sampling, **given})
    return MessageWriter(body, plan_turn(model, _turn(body, sampling, skipped)))


def _turn(body: MessagesInput, sampling: SamplingParams, skipped: UnknownFields) -> Turn:
    conversation = conversation_of(body)
    tools, skipped_tools = tools_of(body.tools)
    skipped.skip([*conversation.skipped, *skipped_tools])
    choice, continues = body.tool_choice, conversation.ends_with_answer()
    return Turn(
        prefix="msg",
        messages=conversation.messages,
        sampling=sampling,
        tools=tools,
        tool_choice=_CHOICES.get(choice.type, "auto") if choice else "auto",
        tool_name=choice.name if choice and choice.type == "tool" else None,
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        thinking_budget=None if body.thinking is None else body.thinking.budget_tokens,
        template_kwargs=_thinking(body),
        continue_final_message=continues,
        params=_PARAMS,
    )


def _thinking(body: MessagesInput) -> dict[str, Any]:
    """Variables by which templates let a model think, or not. Without a word of it, the model's own way is taken."""
    kind = None if body.thinking is None else body.thinking.type
    return thinking_kwargs(body.effort, kind == "enabled" if kind in ("enabled", "disabled") else None)


class MessageWriter:
    """Writes an answer as the events of a message, or as a whole one."""

    end = b""
    failed = staticmethod(error_event)

    def __init__(self, body: MessagesRequest, generation: Generation) -> None:
        self.streamed = bool(body.stream)
        self.generation = generation
        self._id = generation.id.replace("-", "_")
        self._max_tokens = body.max_tokens
        self._stops = frozenset(body.stop_sequences or ())
        self._shows_thoughts = body.thinking is None or body.thinking.display != "omitted"
        self._blocks = Blocks()
        self._finish: events.Finish | None = None

    def piece(self, together: Sequence[events.Event]) -> bytes:
        return b"".join(named_event(_name(told), told) for event in together for told in self._told(event))

    def whole(self, answer: events.Answer) -> Message:
        assert answer.usage is not None
        choice = answer.choices[0]
        assert choice.finish is not None
        blocks = blocks_of(choice)
        stop = self._stop(choice.finish, blocks)
        return self._message(
            [self._content(block) for block in blocks.blocks],
            usage_of(answer.usage),
            stop,
        )

    def _told(self, event: events.Event) -> Iterator[StreamEvent]:
        if isinstance(event, events.Begin):
            num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.generation.prompts)
            begun = usage_of(events.Usage(num_prompt_tokens, event.num_cached_tokens, 0))
            yield MessageStart(self._message([], begun, None))
            yield Ping()
        for step in self._blocks.steps([event]):
            yield from self._of_step(step)
        if isinstance(event, events.Finish):
            self._finish = event
        elif isinstance(event, events.Usage):
            assert self._finish is not None
            yield MessageDelta(self._stop(self._finish, self._blocks), usage_of(event))
            yield MessageStop()

    def _of_step(self, step: Step) -> Iterator[StreamEvent]:
        block = step.block
        match step:
            case Opened():
                yield BlockStart(block.index, self._empty(block))
            case Grown(_, text) if text:
                if block.kind == "text":
                    yield BlockDelta(block.index, TextDelta(text))
                elif block.kind == "call":
                    yield BlockDelta(block.index, InputDelta(text))
                elif self._shows_thoughts:
                    yield BlockDelta(block.index, ThinkingDelta(text))
            case Closed():
                if block.kind == "thought":
                    yield BlockDelta(block.index, SignatureDelta(SIGNATURE))
                yield BlockStop(block.index)

    def _empty(self, block: Block) -> ContentAnswer:
        """As a stream begins it."""
        if block.call is not None:
            return ToolUseAnswer(block.call.id, block.call.name, {})
        return TextAnswer("") if block.kind == "text" else ThinkingAnswer("", "")

    def _content(self, block: Block) -> ContentAnswer:
        if block.call is not None:
            return ToolUseAnswer(block.call.id, block.call.name, _input(block.text))
        if block.kind == "text":
            return TextAnswer(block.text)
        return ThinkingAnswer(block.text if self._shows_thoughts else "", SIGNATURE)

    def _message(self, content: list[ContentAnswer], usage: Usage, stop: StopDelta | None) -> Message:
        return Message(
            id=self._id,
            model=self.generation.model.name,
            content=content,
            stop_reason=None if stop is None else stop.stop_reason,
            stop_sequence=None if stop is None else stop.stop_sequence,
            usage=usage,
        )

    def _stop(self, finish: events.Finish, blocks: Blocks) -> StopDelta:
        if isinstance(finish.stop, str) and finish.stop in self._stops:
            return StopDelta("stop_sequence", finish.stop)
        reason: StopReason = "tool_use" if blocks.has_call else "end_turn"
        if finish.reason == "length":
            room = self.generation.requests[0].sampling.max_tokens
            cut = room is not None and room < self._max_tokens
            reason = "model_context_window_exceeded" if cut else "max_tokens"
        return StopDelta(reason, None)


def _name(told: StreamEvent) -> str:
    name = told.__struct_config__.tag
    assert isinstance(name, str)
    return name


def _input(arguments: str) -> dict[str, Any]:
    """What of a call's arguments is there, as Anthropic's client reads those of a stream."""
    try:
        value = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
