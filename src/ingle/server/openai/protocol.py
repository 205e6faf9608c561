"""Requests of the OpenAI API as this server takes them, with the sampling fields that vLLM adds.

Sources: OpenAI's API reference (chat completions, completions) and vLLM's `extra_body` parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ingle.request import MAX_INTEGER, MAX_LOGPROBS, MAX_N, RANGES, SamplingParams, objection
from ingle.server.body import FieldError, ModelRequest, Neutral, StrictModel, field_error, show
from ingle.server.openai import bound
from ingle.structured import StructuredOutputs

# Known fields that this server does not support, with the values beside null that ask for nothing.
_UNSUPPORTED: Neutral = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "early_stopping": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "priority": (0,),
    "request_id": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": (),
}


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"must be a string or a list of strings, got {show(value)}")
    return tuple(strings)


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not _is_token_ids(ids):
        raise ValueError(f"must be a list of token ids, got {show(value)}")
    return tuple(ids)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int for entry in value)


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError(f"must be an object of token ids and numbers, got {show(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"has the key {show(key)}, which is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)):
            raise ValueError(f"has {show(bias)} for token {key}, which is not a number")
        biases[int(key)] = bias
    return biases


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """One prompt or several, as text or token ids: always a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return [value]
        if all(isinstance(entry, str) for entry in value):
            return value
        if all(_is_token_ids(entry) for entry in value):
            return value
    got = "an empty list" if value == [] else show(value)
    raise ValueError(f"must be a string, a list of strings, a list of token ids or a list of such lists, got {got}")


def _whole(value: Any) -> Any:
    """JSON has one kind of number, so 5.0 is 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]


SCHEMA_REF = "#/components/schemas/{model}"


def body_schema(model: type[StrictModel]) -> dict[str, Any]:
    """OpenAPI's description of an endpoint that reads `model` from its body."""
    schema = {"$ref": SCHEMA_REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class StreamOptions(StrictModel):
    UNSUPPORTED: ClassVar[Neutral] = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}

    include_usage: bool | None = None


_NUMBERS = RANGES.keys() - {"n", "max_tokens", "logprobs"}
"""Sampling parameters whose range is that of `SamplingParams`; the others have bounds of their own here."""


class GenerationRequest(ModelRequest):
    """What chat and completions have in common. None stands for the default, which may be the model's own."""

    n: Integer | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    seed: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        PlainValidator(_logit_bias, json_schema_input_type=dict[str, float] | None),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        PlainValidator(_stop_strings, json_schema_input_type=str | list[str] | None),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...],
        PlainValidator(_token_ids, json_schema_input_type=list[int] | None),
    ] = ()
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    max_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    """-1 means as many as the context holds."""
    prompt_logprobs: Integer | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    response_format: bound.ResponseFormat = None
    structured_outputs: bound.Structured = None
    guided_json: bound.GuidedJson = None
    guided_regex: bound.GuidedRegex = None
    guided_choice: bound.GuidedChoice = None
    guided_grammar: bound.GuidedGrammar = None

    # Accepted for what they are: remarks that change nothing in the answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator(*sorted(_NUMBERS), mode="after")
    @classmethod
    def _check_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.field_name is not None and (text := objection(info.field_name, value)):
            raise ValueError(text)
        return value

    @model_validator(mode="after")
    def _check_streaming(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", " is only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs", " is not available when stream is true")
        return self

    @model_validator(mode="after")
    def _check_bound(self) -> GenerationRequest:
        given = [name for name in bound.FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            raise FieldError(given[1], f" cannot be sent together with {given[0]}: both say what the answer follows")
        return self

    @property
    def binding(self) -> StructuredOutputs | None:
        """What the answer follows, whichever field says so."""
        return next((given for name in bound.FIELDS if (given := getattr(self, name)) is not None), None)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, **derived: int | None
    ) -> SamplingParams:
        """What the client set, before the model's `defaults`, before the neutral values; `derived` as it is.

        Raises `RequestError` naming a field that is out of range.
        """
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        given["structured_outputs"] = self.binding
        given = {name: value for name, value in given.items() if value is not None}
        most = None if max_tokens == -1 else max_tokens
        return SamplingParams(**{**defaults, **given, **derived, "max_tokens": most})


_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) & frozenset(GenerationRequest.model_fields)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    UNSUPPORTED: ClassVar[Neutral] = {**_UNSUPPORTED, "suffix": (), "prompt_embeds": ()}

    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    echo: bool | None = None
    best_of: Integer | None = None
    logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", " must be at least 1, or 0 with echo to score the prompt, got 0")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise FieldError("best_of", f" must equal n ({self.n or 1}), got {show(self.best_of)}")
        return self


class TextPart(StrictModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: str


_PARTS = TypeAdapter(Annotated[list[TextPart], FailFast()])


def _content(value: Any) -> str | list[dict[str, Any]]:
    """Text of a message: a string, or text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of text parts, got {show(value)}")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            error = FieldError(after=f" is {show(kind)}, but this model takes text only")
            raise ValidationError.from_exception_data("content", [field_error((index, "type"), kind, error)])
    return [part.model_dump() for part in _PARTS.validate_python(value)] or ""


class ChatMessage(StrictModel):
    UNSUPPORTED: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[dict[str, Any]], PlainValidator(_content, json_schema_input_type=str | list[TextPart])
    ]
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Neutral] = {
        **_UNSUPPORTED,
        "audio": (),
        "chat_template": (),
        "continue_final_message": (False,),
        "documents": ([],),
        "echo": (False,),
        "function_call": ("none",),
        "functions": ([],),
        "include_reasoning": (True,),
        "mm_processor_kwargs": (),
        "modalities": (["text"],),
        # No tools, so nothing to call in parallel.
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": (),
        "tool_choice": ("none",),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_completion_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", " is only allowed when logprobs is true")
        both = (self.max_tokens, self.max_completion_tokens)
        for name, value in zip(("max_tokens", "max_completion_tokens"), both, strict=True):
            if value == 0:
                raise FieldError(name, " must be at least 1, or -1 for as many as the context holds, got 0")
        if None not in both and both[0] != both[1]:
            raise FieldError(
                "max_tokens", f" ({both[0]}) and max_completion_tokens ({both[1]}) differ: send one of them"
            )
        return self
