"""An answer as a response: its items one after the other, as typed events or whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET
from pydantic_core import from_json

from ingle import events
from ingle.server.blocks import Block, Blocks, Closed, Grown, Opened, Step, blocks_of
from ingle.server.errors import ErrorBody
from ingle.server.generation import Generation
from ingle.server.openai.logprobs import chat_logprobs
from ingle.server.openai.responses import ChatTokenLogprob
from ingle.server.responses import answers
from ingle.server.responses.items import opaque
from ingle.server.responses.protocol import ResponsesRequest
from ingle.server.responses.tools import ToolOrigin, Tools
from ingle.server.streaming import named_event

_PREFIXES = {"text": "msg", "thought": "rs", "call": "fc"}


@dataclass(frozen=True)
class Kept:
    """What is done with a response that is whole."""

    put: Callable[[str, bytes, bytes], None]
    items: bytes
    """That it answers."""


class ResponseWriter:
    end = b""

    def __init__(self, body: ResponsesRequest, tools: Tools, generation: Generation, kept: Kept | None) -> None:
        self.streamed = bool(body.stream)
        self.generation = generation
        self._body = body
        self._tools = tools
        self._kept = kept
        self._hex = generation.id.rpartition("-")[2]
        self._id = f"resp_{self._hex}"
        self._created = int(time.time())
        self._summarizes = body.reasoning is not None and body.reasoning.wants_summary
        self._encrypts = "reasoning.encrypted_content" in (body.include or ())
        self._blocks = Blocks()
        self._finish: events.Finish | None = None
        self._number = -1

    def piece(self, together: Sequence[events.Event]) -> bytes:
        return b"".join(_written(told) for event in together for told in self._told(event))

    def whole(self, answer: events.Answer) -> answers.Response:
        assert answer.usage is not None
        choice = answer.choices[0]
        assert choice.finish is not None
        blocks = blocks_of(choice)
        for _ in blocks.ensure():
            pass
        return self._ended(blocks, choice.finish, answer.usage)

    def failed(self, status: int, body: ErrorBody) -> bytes:
        error = body.error
        code = "rate_limit_exceeded" if status == 429 else "server_error"
        response = self._response("failed", [], error=answers.ResponseError(error.code or code, error.message))
        told: list[answers.Event] = [
            answers.Failed(sequence_number=self._next(), response=response),
            answers.Error(
                sequence_number=self._next(), code=error.code or code, message=error.message, param=error.param
            ),
        ]
        return b"".join(map(_written, told))

    def _told(self, event: events.Event) -> Iterator[answers.Event]:
        match event:
            case events.Begin():
                begun = self._response("in_progress", [])
                yield answers.Created(sequence_number=self._next(), response=begun)
                yield answers.InProgress(sequence_number=self._next(), response=begun)
            case events.Finish():
                self._finish = event
            case events.Usage():
                assert self._finish is not None
                response = self._ended(self._blocks, self._finish, event)
                kind = answers.Completed if response.status == "completed" else answers.Incomplete
                yield kind(sequence_number=self._next(), response=response)
                return
        for step in self._blocks.steps([event]):
            yield from self._of_step(step)
        if isinstance(event, events.Finish):
            for step in self._blocks.ensure():
                yield from self._of_step(step)

    def _of_step(self, step: Step) -> Iterator[answers.Event]:
        block = step.block
        told = _STEPS[block.kind](self, step)
        if isinstance(step, Opened):
            item = self._item(block, "in_progress")
            yield answers.ItemAdded(sequence_number=self._next(), output_index=block.index, item=item)
        yield from told
        if isinstance(step, Closed):
            item = self._item(block, self._status)
            yield answers.ItemDone(sequence_number=self._next(), output_index=block.index, item=item)

    def _text_step(self, step: Step) -> Iterator[answers.Event]:
        at = self._at(step.block)
        match step:
            case Opened():
                yield answers.PartAdded(**at(), part=answers.OutputText(""))
            case Grown(_, text, logprobs) if text or self._body.scored:
                yield answers.TextDelta(**at(), delta=text, logprobs=self._logprobs(logprobs))
            case Closed(block):
                scored = self._logprobs(block.logprobs)
                yield answers.TextDone(**at(), text=block.text, logprobs=scored)
                yield answers.PartDone(**at(), part=answers.OutputText(block.text, scored))

    def _thought_step(self, step: Step) -> Iterator[answers.Event]:
        at = self._at(step.block)
        match step:
            case Opened() if self._summarizes:
                yield answers.SummaryAdded(**at(), part=answers.SummaryText(""))
            case Opened():
                yield answers.PartAdded(**at(), part=answers.ReasoningText(""))
            case Grown(_, text) if text:
                kind = answers.SummaryDelta if self._summarizes else answers.ThoughtDelta
                yield kind(**at(), delta=text)
            case Closed(block) if self._summarizes:
                yield answers.SummaryDone(**at(), text=block.text)
                yield answers.SummaryPartDone(**at(), part=answers.SummaryText(block.text))
            case Closed(block):
                yield answers.ThoughtDone(**at(), text=block.text)
                yield answers.PartDone(**at(), part=answers.ReasoningText(block.text))

    def _call_step(self, step: Step) -> Iterator[answers.Event]:
        """A custom tool's text comes whole: until then it is JSON."""
        block = step.block
        at = self._at(block)
        origin = self._origin(block)
        match step:
            case Grown(_, text) if text and not origin.custom:
                yield answers.ArgumentsDelta(**at(), delta=text)
            case Closed() if origin.custom:
                yield answers.InputDelta(**at(), delta=_input(block.text))
                yield answers.InputDone(**at(), input=_input(block.text))
            case Closed():
                yield answers.ArgumentsDone(**at(), name=origin.name, arguments=block.text)

    def _at(self, block: Block) -> Callable[[], dict[str, Any]]:
        """What every event within an item has."""
        item_id = self._item_id(block)
        return lambda: {"sequence_number": self._next(), "output_index": block.index, "item_id": item_id}

    def _next(self) -> int:
        self._number += 1
        return self._number

    @property
    def _status(self) -> answers.Status:
        """Of an item that ends now."""
        return "incomplete" if self._finish is not None and self._finish.reason == "length" else "completed"

    def _ended(self, blocks: Blocks, finish: events.Finish, used: events.Usage) -> answers.Response:
        cut = finish.reason == "length"
        last: answers.Status = "incomplete" if cut else "completed"
        output = [self._item(block, last if block is blocks.blocks[-1] else "completed") for block in blocks.blocks]
        response = self._response(
            last,
            output,
            completed_at=None if cut else int(time.time()),
            incomplete_details=answers.IncompleteDetails("max_output_tokens") if cut else None,
            usage=answers.usage_of(used),
        )
        if self._kept is not None:
            self._kept.put(self._id, msgspec.json.encode(response), self._kept.items)
        return response

    def _item(self, block: Block, status: answers.Status) -> answers.Item:
        """As it stands when it ends, or without its content while it is in progress."""
        item_id, begun = self._item_id(block), status == "in_progress"
        text = "" if begun else block.text
        if block.kind == "text":
            content = [] if begun else [answers.OutputText(text, self._logprobs(block.logprobs))]
            return answers.Message(id=item_id, status=status, content=content)
        if block.kind == "thought":
            return answers.Reasoning(
                id=item_id,
                status=status,
                summary=[answers.SummaryText(text)] if self._summarizes and not begun else [],
                content=[answers.ReasoningText(text)] if not self._summarizes and not begun else [],
                encrypted_content=opaque(text) if self._encrypts and not begun else UNSET,
            )
        assert block.call is not None
        origin, call_id = self._origin(block), block.call.id
        namespace = UNSET if origin.namespace is None else origin.namespace
        if origin.custom:
            given = "" if begun else _input(text)
            return answers.CustomToolCall(
                id=item_id, status=status, call_id=call_id, name=origin.name, namespace=namespace, input=given
            )
        return answers.FunctionToolCall(
            id=item_id, status=status, call_id=call_id, name=origin.name, namespace=namespace, arguments=text
        )

    def _item_id(self, block: Block) -> str:
        """It says which response has the item."""
        custom = block.call is not None and self._origin(block).custom
        return f"{'ctc' if custom else _PREFIXES[block.kind]}_{self._hex}{block.index:04x}"

    def _origin(self, block: Block) -> ToolOrigin:
        assert block.call is not None
        return self._tools.origin(block.call.name)

    def _logprobs(self, entries: Sequence[Any]) -> list[ChatTokenLogprob]:
        return chat_logprobs(self.generation.model.tokenizer, entries).content if self._body.scored else []

    def _response(self, status: answers.Status, output: list[answers.Item], **ended: Any) -> answers.Response:
        body, sampling = self._body, self.generation.prompts[0].params
        reasoning = body.reasoning
        return answers.Response(
            id=self._id,
            created_at=self._created,
            status=status,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            model=self.generation.model.name,
            output=output,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=answers.ReasoningConfig(
                body.effort, None if reasoning is None else reasoning.summary or reasoning.generate_summary
            ),
            safety_identifier=body.safety_identifier,
            store=self._kept is not None,
            temperature=sampling.temperature,
            text=answers.TextConfig(body.format, "medium" if body.text is None else body.text.verbosity or "medium"),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            truncation=body.truncation or "disabled",
            user=body.user,
            metadata=body.metadata or {},
            **ended,
        )


_STEPS: dict[str, Callable[[ResponseWriter, Step], Iterator[answers.Event]]] = {
    "text": ResponseWriter._text_step,
    "thought": ResponseWriter._thought_step,
    "call": ResponseWriter._call_step,
}


def _written(told: answers.Event) -> bytes:
    name = told.__struct_config__.tag
    assert isinstance(name, str)
    return named_event(name, told)


def _input(arguments: str) -> str:
    """The text for a custom tool, which is the one argument of its function, or what the model said instead."""
    try:
        value = from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments
