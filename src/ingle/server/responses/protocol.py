"""Requests of OpenAI's Responses API, as this server takes them.

Source: the types of OpenAI's Python client, and what Codex sends.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator, model_validator

from ingle.limits import limits
from ingle.request import MAX_INTEGER, objection
from ingle.server.body import FieldError, ModelRequest, Neutral, StrictModel, show
from ingle.server.limited import ToolsWithin, Within
from ingle.server.openai.protocol import Integer, StreamOptions
from ingle.server.tagged import OneOf, texts_or

_TEXT_ONLY = "this model takes text only"
REMARKS = frozenset(
    (
        "annotations",
        "caller",
        "client_metadata",
        "context",
        "context_management",
        "detail",
        "include_obfuscation",
        "logprobs",
        "max_tool_calls",
        "metadata",
        "mode",
        "personality",
        "phase",
        "prompt_cache_breakpoint",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "status",
        "user",
        "verbosity",
    )
)
"""Fields, wherever they stand, that are accepted for what they are: they change nothing in the answer."""


class TextPart(StrictModel):
    type: Literal["input_text", "output_text", "text", "summary_text", "reasoning_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str


class ImagePart(StrictModel):
    """One that a tool gave back: the model is told that there is one."""

    type: Literal["input_image"]
    detail: str | None = None
    image_url: str | None = None
    file_id: str | None = None


_REFUSED = dict.fromkeys(("input_image", "input_file", "input_audio", "image_url"), _TEXT_ONLY)
_PARTS = OneOf("content of a message", (TextPart, RefusalPart), refused=_REFUSED)
_OUTPUT_PARTS = OneOf(
    "the output of a tool", (TextPart, RefusalPart, ImagePart), refused={**_REFUSED, "image_url": _TEXT_ONLY}
)
Parts = list[TextPart | RefusalPart | ImagePart]
Content = Annotated[
    str | Parts, PlainValidator(texts_or(_PARTS), json_schema_input_type=str | list[TextPart | RefusalPart] | None)
]
Output = Annotated[str | Parts, PlainValidator(texts_or(_OUTPUT_PARTS), json_schema_input_type=str | Parts | None)]


class Item(StrictModel):
    """What every item may have."""

    type: str
    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"]
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = None


class ReasoningItem(Item):
    type: Literal["reasoning"]
    summary: list[TextPart] = Field(default_factory=list)
    content: list[TextPart] | None = None
    encrypted_content: str | None = None


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str
    caller: dict[str, Any] | None = None


class CustomCallItem(Item):
    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str
    caller: dict[str, Any] | None = None


class CallOutputItem(Item):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: Output = ""
    name: str | None = None
    namespace: str | None = None
    caller: dict[str, Any] | None = None


class ReferenceItem(Item):
    """An item of an answer that this server keeps."""

    type: Literal["item_reference"]
    id: str


class ForeignItem(Item):
    """What tools of OpenAI's servers did: it is left out of the prompt, and named."""


_ITEMS = OneOf(
    "an item of the input",
    (MessageItem, ReasoningItem, FunctionCallItem, CustomCallItem, CallOutputItem, ReferenceItem),
    refused=dict.fromkeys(
        ("compaction", "compaction_trigger", "context_compaction"), "this server does not compact conversations"
    ),
    other=ForeignItem,
)
AnyItem = MessageItem | ReasoningItem | FunctionCallItem | CustomCallItem | CallOutputItem | ReferenceItem | ForeignItem


def read_items(value: Any) -> Any:
    """An input as items. Those that do not say what they are say so by what they have."""
    if isinstance(value, str):
        return [MessageItem(type="message", role="user", content=value)]
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of items, got {show(value)}")
    if (text := limits().over("max_messages", len(value), f"has {len(value)} items")) is not None:
        raise ValueError(text)
    return _ITEMS.read_list([_typed(item) for item in value])


def _typed(item: Any) -> Any:
    if not isinstance(item, dict) or item.get("type") is not None:
        return item
    if "role" in item:
        return {**item, "type": "message"}
    return {**item, "type": "item_reference"} if "id" in item else item


class ReasoningOptions(StrictModel):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None

    @property
    def wants_summary(self) -> bool:
        return (self.summary or self.generate_summary) not in (None, "none")


class TextOptions(StrictModel):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesInput(ModelRequest):
    """What a prompt is made of."""

    UNSUPPORTED: ClassVar[Neutral] = {"conversation": (), "prompt": ()}

    input: Annotated[list[AnyItem], PlainValidator(read_items, json_schema_input_type=str | list[AnyItem])] = Field(
        default_factory=list
    )
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[dict[str, Any]], ToolsWithin()] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None
    personality: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def format(self) -> dict[str, Any]:
        """Of the answer's text."""
        return (None if self.text is None else self.text.format) or {"type": "text"}

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort


class InputTokensRequest(ResponsesInput):
    """Body of `POST /v1/responses/input_tokens`."""


_SAMPLING = frozenset(
    (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
    )
)
"""The first two are OpenAI's, the others vLLM's."""


class ResponsesRequest(ResponsesInput):
    """Body of `POST /v1/responses`."""

    UNSUPPORTED: ClassVar[Neutral] = {**ResponsesInput.UNSUPPORTED, "background": (False,)}

    model: str
    max_output_tokens: Integer | None = Field(None, ge=1, le=MAX_INTEGER)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    top_logprobs: Annotated[Integer, Within("max_logprobs")] | None = None
    include: list[str] | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] | None = None

    # Accepted for what they are: remarks that change nothing in the answer.
    client_metadata: dict[str, Any] | None = None
    context_management: list[Any] | None = None
    max_tool_calls: Integer | None = None
    """Of tools that OpenAI's servers run."""
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    @field_validator(*sorted(_SAMPLING), mode="after")
    @classmethod
    def _check_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.field_name is not None and (text := objection(info.field_name, value)):
            raise ValueError(text)
        return value

    @model_validator(mode="after")
    def _check_input(self) -> ResponsesRequest:
        if not self.input and self.previous_response_id is None:
            raise FieldError("input", " is required")
        return self

    @property
    def scored(self) -> bool:
        """Whether log probabilities are part of the answer."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())

    @property
    def sampling(self) -> dict[str, Any]:
        """What the client set."""
        given = {name: getattr(self, name) for name in _SAMPLING}
        given = {name: value for name, value in given.items() if value is not None}
        return given | {
            "max_tokens": self.max_output_tokens,
            "logprobs": (self.top_logprobs or 0) if self.scored else None,
        }
