"""One turn of a conversation, which the model is to take: what every chat protocol asks for, however it says so."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from ingle.errors import RequestError
from ingle.request import SamplingParams, stopping_at
from ingle.server.generation import Generation, plan_generation
from ingle.server.models import ServedModel
from ingle.structured import StructuredOutputs
from ingle.text.changing_lines import without_changing_lines
from ingle.text.chat_template import ChatTemplate
from ingle.text.formats.declared import tool_format
from ingle.text.formats.forced import calls_schema
from ingle.text.formats.of_model import Formats
from ingle.text.formats.stream import Telling

Message = Mapping[str, Any]
"""As chat templates know them: `role`, `content` (text, text parts, or none), and where they have them `name`,
`tool_calls` (`{"id", "type": "function", "function": {"name", "arguments"}}`, arguments as JSON text or as an object),
`tool_call_id` of a tool's result, and `reasoning_content`, what was thought before an answer."""
Tool = Mapping[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`"""


@dataclass(frozen=True)
class Params:
    """What the protocol calls its fields, for errors."""

    messages: str = "messages"
    tools: str = "tools"
    tool_choice: str = "tool_choice"
    thinking_budget: str = "thinking_token_budget"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Messages, and how they are to be answered."""

    messages: Sequence[Message]
    sampling: SamplingParams
    prefix: str
    """Of the answer's id: `chatcmpl`."""
    name: str | None = None
    """Of the request, as the client calls it: the rest of the answer's id."""
    tools: Sequence[Tool] = ()
    """Functions that the model may call. Without any, nothing in the answer is taken for a call."""
    tool_choice: Literal["auto", "none", "required"] = "auto"
    """`none`: the model does not hear of the tools; `required`: it must call one."""
    tool_name: str | None = None
    """The one that it must call."""
    parallel_tool_calls: bool = True
    """False: the answer ends with its first call."""
    thinking_budget: int | None = None
    """Most tokens of thoughts: then they are ended with words to that effect, and the answer follows."""
    documents: Sequence[Mapping[str, Any]] = ()
    """For templates that take some."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, such as `enable_thinking`."""
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    """The answer goes on where the last message ends."""
    add_special_tokens: bool = False
    """Beside those that the template writes."""
    params: Params = Params()

    @property
    def required(self) -> tuple[str, ...]:
        """Names of the tools of which one must be called; empty where that is the model's choice."""
        if self.tool_name is not None:
            return (self.tool_name,)
        return tuple(map(tool_name, self.tools)) if self.tool_choice == "required" else ()

    @property
    def required_schema(self) -> dict[str, Any]:
        """The JSON schema of an answer that calls what is `required`."""
        tools = [tool for tool in self.tools if tool_name(tool) in self.required]
        return calls_schema(tools, parallel=self.parallel_tool_calls and self.tool_name is None)


def tool_name(tool: Tool) -> str:
    name: str = tool["function"]["name"]
    return name


def thinking_kwargs(effort: str | None, thinks: bool | None = None) -> dict[str, Any]:
    """Variables by which templates let a model think, much or little or not: they have several names for it."""
    kwargs: dict[str, Any] = {}
    if effort not in (None, "none"):
        kwargs["reasoning_effort"] = "low" if effort == "minimal" else effort
    if thinks is None and effort is not None:
        thinks = effort != "none"
    if thinks is not None:
        kwargs |= {"enable_thinking": thinks, "thinking": thinks}
    return kwargs


def plan_turn(model: ServedModel, turn: Turn) -> Generation:
    """Renders and tokenizes. Thoughts and calls in the answer come as events of their own. Raises `RequestError`."""
    prompt = turn_prompt(model, turn)
    return plan_generation(
        model,
        turn.prefix,
        [prompt],
        stopping_at(_bound(turn), model.tokenizer.chat_stops),
        add_special_tokens=turn.add_special_tokens,
        continues=turn.continue_final_message,
        param=turn.params.messages,
        name=turn.name,
        telling=_with_budget(telling_of(model.text.formats, turn, prompt), model, turn),
    )


def _bound(turn: Turn) -> SamplingParams:
    """What must be called outranks what an answer that calls nothing is bound to. Raises `RequestError`."""
    if not turn.required:
        return turn.sampling
    try:
        calls = StructuredOutputs(json=json.dumps(turn.required_schema), asked_as=turn.params.tools)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{turn.params.tools}: {error}", param=turn.params.tools) from None
    return msgspec.structs.replace(turn.sampling, structured_outputs=calls)


def telling_of(formats: Formats, turn: Turn, prompt: str) -> Telling | None:
    """What is to be told apart in the answers; None where they are nothing but text."""
    if turn.required:  # whatever the model's own is: `calls_schema` is what its grammar is made of
        own = formats.reasoning
        reasoning = None if own is not None and own.channels else own  # whose header the prompt has
        return Telling(Formats(tool_format("json"), reasoning), turn.tools, parallel=turn.parallel_tool_calls)
    tools = turn.tools if turn.tool_choice != "none" and formats.read_calls else ()
    if not tools and not formats.read_thoughts:
        return None
    last = turn.messages[-1] if turn.continue_final_message else None
    thinking = formats.reasoning is not None and formats.reasoning.begun_by(prompt, last)
    return Telling(formats, tools, thinking, "" if formats.template is None else prompt, turn.parallel_tool_calls)


def _with_budget(telling: Telling | None, model: ServedModel, turn: Turn) -> Telling | None:
    """A model that does not think keeps within any budget."""
    if telling is None or turn.thinking_budget is None or not telling.formats.read_thoughts:
        return telling
    ending = telling.formats.ending
    if ending is None:
        raise RequestError(
            f"{turn.params.thinking_budget} cannot be kept: nobody knows what ends the thoughts of this model",
            param=turn.params.thinking_budget,
        )
    ids = model.tokenizer.encode(ending, add_special_tokens=False)
    return replace(telling, budget=turn.thinking_budget, ending=ids)


def turn_prompt(model: ServedModel, turn: Turn) -> str:
    """The text that the model is to go on with. Raises `RequestError`."""
    model.prompts.check_writes()
    template = _template(model, turn)
    model.prompts.check_num_chars(sum(_num_chars(turn.messages)) + sum(_num_chars(turn.tools)), turn.params.messages)
    prompt = template.prompt(
        _steady(turn.messages),
        tools=list(turn.tools) if turn.tools and turn.tool_choice != "none" else None,
        documents=list(turn.documents) or None,
        add_generation_prompt=turn.add_generation_prompt,
        continue_final_message=turn.continue_final_message,
        chat_template_kwargs=turn.template_kwargs,
    )
    reasoning = model.text.formats.reasoning
    bound = bool(turn.required) or turn.sampling.structured_outputs is not None
    if bound and reasoning is not None and reasoning.header and reasoning.begun_by(prompt):
        return prompt.rstrip() + reasoning.header  # which a grammar has no place for
    return prompt


def _steady(messages: Sequence[Message]) -> Sequence[Message]:
    """Without what agents put before their instructions and change each time: it would cost the prefix cache."""
    first = messages[0] if messages else {}
    content = first.get("content")
    if first.get("role") not in ("system", "developer") or not isinstance(content, str | list):
        return messages
    if isinstance(content, str):
        kept: str | list[Any] = without_changing_lines(content)
    else:
        texts = [without_changing_lines(part["text"]) for part in content[:1] if isinstance(part.get("text"), str)]
        kept = [*({**content[0], "text": text} for text in texts if text), *content[len(texts) :]]
    return messages if kept == content else [*([{**first, "content": kept}] if kept else []), *messages[1:]]


def _template(model: ServedModel, turn: Turn) -> ChatTemplate:
    if model.chat_template is None:
        raise RequestError(
            "This model has no chat template. Start the server with --chat-template FILE, or use /v1/completions.",
            param=turn.params.messages,
            code="chat_template_missing",
        )
    return model.chat_template


def _num_chars(value: Any) -> Iterator[int]:
    """Of every text in it."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield len(value)
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, Sequence):
            waiting += value
