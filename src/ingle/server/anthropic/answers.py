"""Answers of Anthropic's Messages API. What its schema requires and this server knows nothing of is null."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ingle import events

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextAnswer(msgspec.Struct, tag="text"):
    text: str
    citations: None = None


class ThinkingAnswer(msgspec.Struct, tag="thinking"):
    thinking: str
    signature: str


class Caller(msgspec.Struct, frozen=True):
    type: Literal["direct"] = "direct"
    """The model, and no program that it wrote."""


class ToolUseAnswer(msgspec.Struct, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]
    caller: Caller = Caller()


ContentAnswer = TextAnswer | ThinkingAnswer | ToolUseAnswer


class OutputTokensDetails(msgspec.Struct):
    thinking_tokens: int


class Usage(msgspec.Struct):
    """Prompt tokens are told apart: those of the cache, and the others."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    output_tokens_details: OutputTokensDetails
    cache_creation_input_tokens: int = 0
    """All that is read is cached, and costs nothing more."""
    cache_creation: None = None
    inference_geo: None = None
    server_tool_use: None = None
    service_tier: None = None


def usage_of(used: events.Usage) -> Usage:
    return Usage(
        used.num_prompt_tokens - used.num_cached_tokens,
        used.num_completion_tokens,
        used.num_cached_tokens,
        OutputTokensDetails(used.num_thought_tokens),
    )


class Message(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ContentAnswer]
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None = None
    container: None = None
    usage: Usage


class MessageStart(msgspec.Struct, tag="message_start"):
    message: Message


class Ping(msgspec.Struct, tag="ping"):
    pass


class BlockStart(msgspec.Struct, tag="content_block_start"):
    index: int
    content_block: ContentAnswer


class TextDelta(msgspec.Struct, tag="text_delta"):
    text: str


class ThinkingDelta(msgspec.Struct, tag="thinking_delta"):
    thinking: str


class SignatureDelta(msgspec.Struct, tag="signature_delta"):
    signature: str


class InputDelta(msgspec.Struct, tag="input_json_delta"):
    partial_json: str


class BlockDelta(msgspec.Struct, tag="content_block_delta"):
    index: int
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class BlockStop(msgspec.Struct, tag="content_block_stop"):
    index: int


class StopDelta(msgspec.Struct):
    stop_reason: StopReason
    stop_sequence: str | None
    stop_details: None = None
    container: None = None


class MessageDelta(msgspec.Struct, tag="message_delta"):
    delta: StopDelta
    usage: Usage


class MessageStop(msgspec.Struct, tag="message_stop"):
    pass


StreamEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop


class TokenCount(msgspec.Struct):
    input_tokens: int


class ModelInfo(msgspec.Struct, kw_only=True):
    type: Literal["model"] = "model"
    id: str
    display_name: str
    created_at: str
    """As RFC 3339 writes it."""
    max_input_tokens: int
    max_tokens: int


class ModelPage(msgspec.Struct, kw_only=True):
    data: list[ModelInfo]
    has_more: bool
    first_id: str | None
    last_id: str | None
