"""Answers of the Responses API."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ingle import events
from ingle.server.openai.responses import ChatTokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(msgspec.Struct, tag="output_text"):
    text: str
    logprobs: list[ChatTokenLogprob] = []
    annotations: list[None] = []


class ReasoningText(msgspec.Struct, tag="reasoning_text"):
    text: str


class SummaryText(msgspec.Struct, tag="summary_text"):
    text: str


class Message(msgspec.Struct, tag="message", kw_only=True):
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class Reasoning(msgspec.Struct, tag="reasoning", kw_only=True):
    id: str
    status: Status
    summary: list[SummaryText]
    content: list[ReasoningText]
    encrypted_content: str | UnsetType = UNSET


class FunctionToolCall(msgspec.Struct, tag="function_call", kw_only=True):
    id: str
    status: Status
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    arguments: str


class CustomToolCall(msgspec.Struct, tag="custom_tool_call", kw_only=True):
    id: str
    status: Status
    call_id: str
    name: str
    namespace: str | UnsetType = UNSET
    input: str


Item = Message | Reasoning | FunctionToolCall | CustomToolCall


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


def usage_of(used: events.Usage) -> Usage:
    return Usage(
        used.num_prompt_tokens,
        InputTokensDetails(used.num_cached_tokens),
        used.num_completion_tokens,
        OutputTokensDetails(used.num_thought_tokens),
        used.num_prompt_tokens + used.num_completion_tokens,
    )


class IncompleteDetails(msgspec.Struct):
    reason: Literal["max_output_tokens"]


class ResponseError(msgspec.Struct):
    code: str
    message: str


class ReasoningConfig(msgspec.Struct):
    effort: str | None = None
    summary: str | None = None


class TextConfig(msgspec.Struct):
    format: dict[str, Any]
    verbosity: str | None = None


class Response(msgspec.Struct, kw_only=True):
    """What was asked for stands in it again."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    truncation: str
    usage: Usage | None = None
    user: str | None
    metadata: dict[str, Any]


class Event(msgspec.Struct, kw_only=True, tag_field="type"):
    """Of a stream; they are numbered."""

    sequence_number: int


class Created(Event, kw_only=True, tag="response.created"):
    response: Response


class InProgress(Event, kw_only=True, tag="response.in_progress"):
    response: Response


class Completed(Event, kw_only=True, tag="response.completed"):
    response: Response


class Incomplete(Event, kw_only=True, tag="response.incomplete"):
    response: Response


class Failed(Event, kw_only=True, tag="response.failed"):
    response: Response


class Error(Event, kw_only=True, tag="error"):
    code: str | None
    message: str
    param: str | None


class OfItem(Event, kw_only=True):
    output_index: int


class ItemAdded(OfItem, kw_only=True, tag="response.output_item.added"):
    item: Item


class ItemDone(OfItem, kw_only=True, tag="response.output_item.done"):
    item: Item


class Within(OfItem, kw_only=True):
    item_id: str


class PartAdded(Within, kw_only=True, tag="response.content_part.added"):
    content_index: int = 0
    part: OutputText | ReasoningText


class PartDone(Within, kw_only=True, tag="response.content_part.done"):
    content_index: int = 0
    part: OutputText | ReasoningText


class TextDelta(Within, kw_only=True, tag="response.output_text.delta"):
    content_index: int = 0
    delta: str
    logprobs: list[ChatTokenLogprob]


class TextDone(Within, kw_only=True, tag="response.output_text.done"):
    content_index: int = 0
    text: str
    logprobs: list[ChatTokenLogprob]


class ThoughtDelta(Within, kw_only=True, tag="response.reasoning_text.delta"):
    content_index: int = 0
    delta: str


class ThoughtDone(Within, kw_only=True, tag="response.reasoning_text.done"):
    content_index: int = 0
    text: str


class SummaryAdded(Within, kw_only=True, tag="response.reasoning_summary_part.added"):
    summary_index: int = 0
    part: SummaryText


class SummaryPartDone(Within, kw_only=True, tag="response.reasoning_summary_part.done"):
    summary_index: int = 0
    part: SummaryText


class SummaryDelta(Within, kw_only=True, tag="response.reasoning_summary_text.delta"):
    summary_index: int = 0
    delta: str


class SummaryDone(Within, kw_only=True, tag="response.reasoning_summary_text.done"):
    summary_index: int = 0
    text: str


class ArgumentsDelta(Within, kw_only=True, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(Within, kw_only=True, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


class InputDelta(Within, kw_only=True, tag="response.custom_tool_call_input.delta"):
    delta: str


class InputDone(Within, kw_only=True, tag="response.custom_tool_call_input.done"):
    input: str


StreamEvent = (
    Created
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | Error
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ThoughtDelta
    | ThoughtDone
    | SummaryAdded
    | SummaryPartDone
    | SummaryDelta
    | SummaryDone
    | ArgumentsDelta
    | ArgumentsDone
    | InputDelta
    | InputDone
)


class InputTokens(msgspec.Struct):
    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"


class Deleted(msgspec.Struct):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class ItemList(msgspec.Struct):
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"
