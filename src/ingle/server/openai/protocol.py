"""Requests of the OpenAI API as this server takes them, with the sampling fields that vLLM adds.

Sources: OpenAI's API reference (chat completions, completions) and vLLM's `extra_body` parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ingle.habits.sampling import REFUSED, SAME
from ingle.limits import limits
from ingle.request import (
    ABOVE_ZERO,
    LIMITED,
    MAX_INTEGER,
    MAX_SALT_CHARS,
    RANGES,
    SamplingParams,
    objection,
)
from ingle.server.body import FieldError, ModelRequest, Neutral, StrictModel, field_error, show
from ingle.server.limited import Fewer, ToolsWithin, Within
from ingle.server.openai import bound
from ingle.server.turn import thinking_kwargs
from ingle.structured import StructuredOutputs

# Known fields that this server does not support, with the values beside null that ask for nothing.
_UNSUPPORTED: Neutral = {
    **{name: neutral for name, (neutral, _) in REFUSED.items() if name not in ("best_of", "prompt")},
    "kv_transfer_params": (),
    "vllm_xargs": (),
}


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"must be a string or a list of strings, got {show(value)}")
    return tuple(strings)


def read_token_ids(value: Any) -> tuple[int, ...]:
    if not _is_token_ids(value):
        raise ValueError(f"must be a list of token ids, got {show(value)}")
    return tuple(value)


def _optional_token_ids(value: Any) -> tuple[int, ...] | None:
    return None if value is None else read_token_ids(value)


def _token_ids(value: Any) -> tuple[int, ...]:
    return _optional_token_ids(value) or ()


def _strings(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else value
    if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
        raise ValueError(f"must be a list of strings, got {show(value)}")
    return tuple(strings)


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


def texts_or_ids(value: Any) -> list[str] | list[list[int]]:
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
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Word = Annotated[str, Field(min_length=1)]
_Key = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
_Biases = Annotated[dict[_Key, Annotated[float, Field(ge=-100, le=100)]], Fewer("max_logit_bias", "entries")]
_Stops = _Word | Annotated[list[_Word], Fewer("max_stop_strings", "strings")]
_OneOrMore = Field(min_length=1)
_Some = Fewer("max_prompts", "prompts", 1)
_Prompts = (
    str
    | Annotated[list[str], _Some]
    | Annotated[list[TokenId], _OneOrMore]
    | Annotated[list[Annotated[list[TokenId], _OneOrMore]], _Some]
)
"""As the schema says it; their validators say more exactly what is wrong."""


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Usage so far in every chunk."""
    include_obfuscation: bool | None = None
    """Accepted; chunks are never padded."""


REMARKS = frozenset(
    (
        *("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
        *("spaces_between_special_tokens", "store", "verbosity", "stream_options.include_obfuscation"),
        *("messages[].cache_control", "messages[].content[].cache_control", "tools[].cache_control"),
    )
)
"""Fields that are accepted for what they are: remarks that change nothing in the answer."""


def _bounds(schema: dict[str, Any]) -> None:
    """Says of each number what it may be."""
    for name, of_field in schema.get("properties", {}).items():
        kinds = [kind for kind in of_field.get("anyOf", ()) if kind.get("type") in ("integer", "number")]
        if name in _NUMBERS and kinds:
            lowest, highest = RANGES[name]
            highest = getattr(limits(), LIMITED[name]) if name in LIMITED else highest
            kinds[0] |= {"exclusiveMinimum" if name in ABOVE_ZERO else "minimum": lowest, "maximum": highest}


_NUMBERS = RANGES.keys() - {"n", "max_tokens", "logprobs"}
"""Sampling parameters whose range is that of `SamplingParams`; the others have bounds of their own here."""


class GenerationRequest(ModelRequest):
    """What chat and completions have in common. None stands for the default, which may be the model's own."""

    model_config = ConfigDict(json_schema_extra=_bounds)
    ALIASES: ClassVar[Mapping[str, str]] = SAME

    n: Annotated[Integer, Within("max_n", 1)] | None = None
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
        PlainValidator(_logit_bias, json_schema_input_type=_Biases | None),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        PlainValidator(_stop_strings, json_schema_input_type=_Stops | None),
    ] = ()
    stop_token_ids: Annotated[
        tuple[int, ...],
        PlainValidator(_token_ids, json_schema_input_type=list[TokenId] | None),
    ] = ()
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Integer | None = None
    max_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    """-1 means as many as the context holds."""
    prompt_logprobs: Integer | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    allowed_token_ids: Annotated[
        tuple[int, ...] | None,
        PlainValidator(_optional_token_ids, json_schema_input_type=list[TokenId] | None),
    ] = None
    bad_words: Annotated[
        tuple[str, ...],
        PlainValidator(_strings, json_schema_input_type=Annotated[list[_Word], Fewer("max_bad_words", "words")] | None),
    ] = ()
    truncate_prompt_tokens: Integer | None = None
    priority: Integer | None = None
    cache_salt: str | None = Field(None, max_length=MAX_SALT_CHARS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_progress: bool | None = None
    """Chunks that say how much of the prompt is read."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    response_format: bound.ResponseFormat = None
    structured_outputs: bound.Structured = None
    guided_json: bound.GuidedJson = None
    guided_regex: bound.GuidedRegex = None
    guided_choice: bound.GuidedChoice = None
    guided_grammar: bound.GuidedGrammar = None

    # `REMARKS`
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = Field(None, max_length=128)
    service_tier: str | None = None
    spaces_between_special_tokens: bool | None = None
    store: bool | None = None
    verbosity: str | None = None

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
    def continuous_usage(self) -> bool:
        options = self.stream_options
        return self.include_usage and options is not None and bool(options.continuous_usage_stats)

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
        given["return_progress"] = bool(self.return_progress and self.stream)
        most = None if max_tokens == -1 else max_tokens
        return SamplingParams(**{**defaults, **given, **derived, "max_tokens": most})


_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__) & frozenset(GenerationRequest.model_fields)


class CompletionRequest(GenerationRequest):
    """Body of `POST /v1/completions`."""

    UNSUPPORTED: ClassVar[Neutral] = {**_UNSUPPORTED, "prompt_embeds": ()}

    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(texts_or_ids, json_schema_input_type=_Prompts),
    ]
    echo: bool | None = None
    best_of: Annotated[Integer, Within("max_best_of", 1)] | None = None
    """So many are computed, and the `n` of them that are likeliest per token returned."""
    logprobs: Annotated[Integer, Within("max_logprobs")] | None = None
    suffix: str | None = None
    """What follows the text that is wanted, for models with tokens for that."""

    @model_validator(mode="after")
    def _check_prompts(self) -> CompletionRequest:
        count = len(self.prompt)
        if (text := limits().over("max_prompts", count, f"has {count} prompts")) is not None:
            raise FieldError("prompt", f" {text}")
        return self

    @model_validator(mode="after")
    def _check_max_tokens(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError("max_tokens", " must be at least 1, or 0 with echo to score the prompt, got 0")
        return self

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise FieldError("best_of", f" must be at least n ({self.n or 1}), got {show(self.best_of)}")
        if self.num_computed > (self.n or 1) and self.stream:
            raise FieldError("best_of", " may be greater than n only when stream is false: the best are known at last")
        return self

    @model_validator(mode="after")
    def _check_echo(self) -> CompletionRequest:
        for name in ("suffix", "truncate_prompt_tokens"):
            if self.echo and getattr(self, name):
                raise FieldError("echo", f" returns the prompt as it was sent, which {name} changes: send one of them")
        return self

    @property
    def num_computed(self) -> int:
        """Completions of each prompt."""
        return max(self.best_of or 1, self.n or 1)


class TextPart(StrictModel):
    """One part of a message's content."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None
    """Of Anthropic's clients: prompts are cached here without being told."""


_PARTS = TypeAdapter(Annotated[list[TextPart], FailFast()])


def _content(value: Any) -> str | list[dict[str, Any]] | None:
    """Text of a message: a string, or text parts; None beside calls of tools."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of text parts, got {show(value)}")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            error = FieldError(after=f" is {show(kind)}, but this model takes text only")
            raise ValidationError.from_exception_data("content", [field_error((index, "type"), kind, error)])
    return [{"type": "text", "text": part.text} for part in _PARTS.validate_python(value)] or ""


class FunctionCall(StrictModel):
    """A call that was made: arguments are JSON text, or an object of those who parsed it."""

    name: str = Field(min_length=1)
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    index: Integer | None = None
    """Some clients send back the delta of a stream."""
    function: FunctionCall


class FunctionDefinition(StrictModel):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class ChatTool(StrictModel):
    type: Literal["function"]
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = None

    def for_template(self) -> dict[str, Any]:
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        function.setdefault("description", "")
        function.setdefault("parameters", {"type": "object", "properties": {}})
        return {"type": self.type, "function": function}


class NamedFunction(StrictModel):
    name: str = Field(min_length=1)


class NamedTool(StrictModel):
    type: Literal["function"]
    function: NamedFunction


def _tool_choice(value: Any) -> str | NamedTool | None:
    if value is None or value in ("none", "auto", "required"):
        return value  # type: ignore[no-any-return]
    if not isinstance(value, dict):
        raise ValueError(f'must be "auto", "none", "required" or an object that names a function, got {show(value)}')
    return NamedTool.model_validate(value)


class ChatMessage(StrictModel):
    UNSUPPORTED: ClassVar[Neutral] = {
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": ("",),
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        str | list[dict[str, Any]] | None,
        PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None),
    ] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    reasoning_content: str | None = None
    """What was thought before the content."""
    reasoning: str | None = None
    """The same, as vLLM and OpenRouter name it."""
    cache_control: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_content(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", f" is only allowed in a message of the assistant, not of role {self.role}")
        told = self.content is not None or self.tool_calls or self.thought is not None
        if (not told and self.role != "tool") or (self.content is None and self.role not in ("assistant", "tool")):
            raise FieldError("content", " is required")
        return self

    @property
    def thought(self) -> str | None:
        return self.reasoning if self.reasoning_content is None else self.reasoning_content

    def for_template(self) -> dict[str, Any]:
        content = "" if self.content is None and self.role == "tool" else self.content  # a tool that says nothing
        message: dict[str, Any] = {"role": self.role, "content": content, "name": self.name}
        message |= {"tool_call_id": self.tool_call_id, "reasoning_content": self.thought}
        calls = [call.model_dump(exclude_none=True, exclude={"index"}) for call in self.tool_calls or ()]
        return {name: value for name, value in message.items() if value is not None} | (
            {"tool_calls": calls} if calls else {}
        )


_REPLACED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "functions": (([],), "tools"),
    "function_call": (("none", "auto"), "tool_choice"),
}
"""Fields of OpenAI's first way to call functions, the values that ask for nothing, and what took their place."""


class ChatCompletionRequest(GenerationRequest):
    """Body of `POST /v1/chat/completions`."""

    UNSUPPORTED: ClassVar[Neutral] = {
        **_UNSUPPORTED,
        "audio": (),
        "chat_template": (),
        "mm_processor_kwargs": (),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
        **{name: neutral for name, (neutral, _) in _REPLACED.items()},
    }

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1), Fewer("max_messages", "messages")]
    max_completion_tokens: Integer | None = Field(None, ge=-1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Within("max_logprobs")] | None = None
    tools: Annotated[list[ChatTool], ToolsWithin()] | None = None
    tool_choice: Annotated[
        str | NamedTool | None,
        PlainValidator(_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | NamedTool | None),
    ] = None
    """Without it the model chooses, if there are tools."""
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """For the chat template; none switches thoughts off, where it can."""
    thinking_token_budget: Integer | None = Field(None, ge=0, le=MAX_INTEGER)
    """Most tokens of thoughts, which are then ended."""
    include_reasoning: bool | None = None
    """False leaves the thoughts out of the answer."""
    echo: bool | None = None
    """Begin the answer with the last message, if it is the assistant's."""
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Go on where the last message ends."""
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    """For chat templates that take some."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted: no model here has such a switch."""

    @classmethod
    def _refused(cls, name: str, value: Any) -> FieldError | None:
        if name not in _REPLACED:
            return super()._refused(name, value)
        neutral, instead = _REPLACED[name]
        if value is None or value in neutral:
            return None
        return FieldError(after=f" is not served: send {instead} instead", code="unsupported_argument")

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
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", " and add_generation_prompt cannot both be true")
        return self

    @model_validator(mode="after")
    def _check_tool_choice(self) -> ChatCompletionRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise FieldError("tool_choice", " is only allowed when tools are given")
        if self.tool_name is not None and self.tool_name not in names:
            raise FieldError("tool_choice", f" names {show(self.tool_name)}, which is none of the tools")
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise FieldError("tools", f" has two functions named {show(twice)}")
        return self

    @property
    def tool_name(self) -> str | None:
        """The function that the answer must call."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the template."""
        return thinking_kwargs(self.reasoning_effort) | (self.chat_template_kwargs or {})
