"""Requests of Anthropic's Messages API, as this server takes them.

Source: the types of Anthropic's Python client, and what Claude Code sends.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from ingle.request import MAX_INTEGER, objection, stop_objection
from ingle.server.body import FieldError, ModelRequest, Neutral, StrictModel, show
from ingle.server.limited import Fewer, ToolsWithin
from ingle.server.openai.protocol import Integer
from ingle.server.tagged import OneOf, texts_or

TEXT_ONLY = "this model takes text only"
REMARKS = frozenset(
    (
        "allowed_callers",
        "betas",
        "cache_control",
        "caller",
        "citations",
        "context_management",
        "data",
        "defer_loading",
        "diagnostics",
        "eager_input_streaming",
        "inference_geo",
        "input_examples",
        "media_type",
        "metadata",
        "service_tier",
        "signature",
        "speed",
        "strict",
        "task_budget",
        "toolset_name",
        "user_profile_id",
        "workspace_id",
    )
)
"""Fields, wherever they stand, that are accepted for what they are: they change nothing in the answer."""


class Block(StrictModel):
    """What every block may have. Everything is cached here, so nobody need ask for it."""

    type: str
    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None


_TEXTS = OneOf("a part of a text", (TextBlock,), refused=dict.fromkeys(("image", "document"), TEXT_ONLY))


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Block):
    """Thoughts of another server, which only that can read."""

    type: Literal["redacted_thinking"]
    data: str | None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: dict[str, Any] | None = None
    toolset_name: str | None = None


class TextSource(StrictModel):
    type: Literal["text"]
    media_type: str | None = None
    data: str


class ContentSource(StrictModel):
    type: Literal["content"]
    content: Annotated[
        str | list[TextBlock], PlainValidator(texts_or(_TEXTS), json_schema_input_type=str | list[TextBlock])
    ]


_SOURCES = OneOf(
    "a document's source",
    (TextSource, ContentSource),
    refused=dict.fromkeys(("base64", "url", "file"), "documents are taken as text only"),
)


class DocumentBlock(Block):
    """Plain text is read; other documents are refused."""

    type: Literal["document"]
    source: Annotated[
        TextSource | ContentSource, PlainValidator(_SOURCES.read, json_schema_input_type=TextSource | ContentSource)
    ]
    title: str | None = None
    context: str | None = None
    citations: dict[str, Any] | None = None


class SearchResultBlock(Block):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    citations: dict[str, Any] | None = None


class ToolReferenceBlock(Block):
    type: Literal["tool_reference"]
    tool_name: str


class ImageBlock(Block):
    """One that a tool gave back: the model is told that there is one."""

    type: Literal["image"]
    source: dict[str, Any] | None = None


class ForeignBlock(Block):
    """Calls of tools that Anthropic's servers run, and their results: they are left out of the prompt, and named."""


_RESULT_BLOCKS = OneOf(
    "content of a tool's result",
    (TextBlock, DocumentBlock, SearchResultBlock, ToolReferenceBlock, ImageBlock),
    other=ForeignBlock,
)


ResultBlock = TextBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock | ImageBlock | ForeignBlock


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        str | list[ResultBlock],
        PlainValidator(texts_or(_RESULT_BLOCKS), json_schema_input_type=str | list[ResultBlock] | None),
    ] = ""
    is_error: bool | None = None
    toolset_name: str | None = None


_BLOCKS = OneOf(
    "content of a message",
    (
        TextBlock,
        ThinkingBlock,
        RedactedThinkingBlock,
        ToolUseBlock,
        ToolResultBlock,
        DocumentBlock,
        SearchResultBlock,
    ),
    refused={"image": TEXT_ONLY, "container_upload": TEXT_ONLY},
    other=ForeignBlock,
)
AnyBlock = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | DocumentBlock
    | SearchResultBlock
    | ForeignBlock
)


class InputMessage(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[
        str | list[AnyBlock], PlainValidator(texts_or(_BLOCKS), json_schema_input_type=str | list[AnyBlock])
    ]


class InputTool(StrictModel):
    """A tool that the client runs; those that Anthropic's servers would run have another `type` and are skipped."""

    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None
    input_examples: list[Any] | None = None
    allowed_callers: list[str] | None = None

    @property
    def is_custom(self) -> bool:
        return self.type in (None, "custom")

    @model_validator(mode="after")
    def _check_schema(self) -> InputTool:
        if self.is_custom and self.input_schema is None:
            raise FieldError("input_schema", " is required")
        return self


class ToolChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if self.type == "tool" and not self.name:
            raise FieldError("name", " is required when type is tool")
        return self


class Thinking(StrictModel):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Integer | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Thinking:
        if self.type == "enabled" and self.budget_tokens is None:
            raise FieldError("budget_tokens", " is required when type is enabled")
        return self


class OutputConfig(StrictModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: dict[str, Any] | None = None
    task_budget: dict[str, Any] | None = None


class MessagesInput(ModelRequest):
    """What a prompt is made of."""

    UNSUPPORTED: ClassVar[Neutral] = {"mcp_servers": ([],), "container": ()}

    model: str
    messages: Annotated[list[InputMessage], FailFast(), Field(min_length=1), Fewer("max_messages", "messages")]
    system: Annotated[
        str | list[TextBlock],
        PlainValidator(texts_or(_TEXTS), json_schema_input_type=str | list[TextBlock] | None),
    ] = ""
    tools: Annotated[list[InputTool], ToolsWithin()] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    """As beta versions of the API have it."""

    # Accepted for what they are: remarks that change nothing in the answer, or what this server does anyway.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    """What to drop from a conversation to make room. All of it is kept."""
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    speed: str | None = None
    diagnostics: dict[str, Any] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None
    betas: list[str] | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> MessagesInput:
        names = [tool.name for tool in self.tools or ()]
        if (twice := next((name for name, count in Counter(names).items() if count > 1), None)) is not None:
            raise FieldError("tools", f" has two of the name {show(twice)}")
        return self

    @property
    def effort(self) -> str | None:
        return None if self.output_config is None else self.output_config.effort

    @property
    def format(self) -> dict[str, Any] | None:
        """Of the answer: `{"type": "json_schema", "schema": ...}`."""
        return self.output_format or (None if self.output_config is None else self.output_config.format)


class CountTokensRequest(MessagesInput):
    """Body of `POST /v1/messages/count_tokens`."""


class MessagesRequest(MessagesInput):
    """Body of `POST /v1/messages`."""

    max_tokens: Integer = Field(ge=0, le=MAX_INTEGER)
    """0 reads the prompt, so that it is in the cache, and answers nothing."""
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    stream: bool | None = None

    @field_validator("temperature", "top_p", "top_k", mode="after")
    @classmethod
    def _check_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.field_name is not None and (text := objection(info.field_name, value)):
            raise ValueError(text)
        return value

    @field_validator("stop_sequences", mode="after")
    @classmethod
    def _check_stops(cls, stops: list[str] | None) -> list[str] | None:
        if (text := stop_objection(stops or [])) is not None:
            raise ValueError(text)
        return stops or []

    @model_validator(mode="after")
    def _check_choice(self) -> MessagesRequest:
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return self
        names = [tool.name for tool in self.tools or () if tool.is_custom]
        if not names:
            raise FieldError("tool_choice", f" is {choice.type}, but tools names none that can be called")
        if choice.type == "tool" and choice.name not in names:
            raise FieldError("tool_choice", f" names {show(choice.name)}, which is not in tools")
        return self
