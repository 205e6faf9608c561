"""From prompts to events: one HTTP request fanned out to the engine, and what comes of it merged again."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property

from ingle.errors import EngineError, RequestError
from ingle.events import Begin, Event, Finish, Text, Usage
from ingle.limits import limits
from ingle.request import EngineRequest, SamplingParams
from ingle.server.models import ServedModel
from ingle.server.statistics import Choices, Measured
from ingle.server.streaming import merge
from ingle.text.formats.stream import Telling, ToldStream
from ingle.text.requests import PromptRequests
from ingle.text.stream import TextStream


@dataclass(frozen=True)
class Generation:
    """What one HTTP request asks of the engine. Choice i belongs to prompt i // n."""

    model: ServedModel
    id: str
    """Of the answer; requests have ids that no client chooses."""
    prompts: Sequence[PromptRequests]

    @cached_property
    def requests(self) -> Sequence[EngineRequest]:
        return [request for prompt in self.prompts for request in prompt.requests]

    async def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """The events of all choices as they come; those that one step brought for a choice come together.

        Closing it aborts in the engine what still runs. Raises `RequestError` (500) when the engine fails on one of the
        requests, `EngineError` when it is dead.
        """
        num_cached_tokens = num_completion_tokens = num_thought_tokens = 0
        together = ((prompt, Choices(self.model.statistics, prompt.params.n)) for prompt in self.prompts)
        asked = ((*each, request) for each in together for request in each[0].requests)
        async with aclosing(merge([self._run(index, *each) for index, each in enumerate(asked)])) as steps:
            async for events in steps:
                for event in events:
                    # The later choices of a prompt find in the cache what the first one computed: that saved the
                    # client nothing.
                    if isinstance(event, Begin) and event.choice % self.prompts[0].params.n == 0:
                        num_cached_tokens += event.num_cached_tokens
                    elif isinstance(event, Text):
                        num_completion_tokens += len(event.token_ids)
                    elif isinstance(event, Finish):
                        num_thought_tokens += event.num_thought_tokens
                yield events
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        yield [Usage(num_prompt_tokens, num_cached_tokens, num_completion_tokens, num_thought_tokens)]

    async def _run(
        self, choice: int, prompt: PromptRequests, choices: Choices, request: EngineRequest
    ) -> AsyncGenerator[Sequence[Event], None]:
        stream = prompt.stream(choice)
        with Measured(self.model.statistics, request, choices) as measured:
            while True:
                async with aclosing(self._steps(stream, request, measured)) as steps:
                    async for events in steps:
                        yield events
                if not isinstance(stream, ToldStream) or not stream.thinks_too_long:
                    return
                request, events = stream.end_thoughts(request)
                measured.reason = stream.finish_reason
                yield events
                if stream.finish_reason is not None:
                    return

    async def _steps(
        self, stream: TextStream | ToldStream, request: EngineRequest, measured: Measured
    ) -> AsyncGenerator[Sequence[Event], None]:
        """Up to the end of the answer, or of the budget of its thoughts."""
        if isinstance(stream, ToldStream) and stream.thinks_too_long:
            self.model.queue.leave(request.id)
            return
        async with aclosing(self.model.engine.generate(request)) as outputs:
            async for output in outputs:
                if output.num_prompt_read is None:
                    self.model.queue.begun(request.id)
                if output.refused:
                    message = f"{request.id} is refused: {output.error}"
                    raise RequestError(message, param="structured_outputs", code="invalid_grammar")
                if output.busy:
                    raise RequestError(output.error or "", code="server_busy", status=503)
                if output.finish_reason == "error":
                    message = f"Generation of {request.id} failed: {output.error}"
                    raise RequestError(message, code="generation_failed", status=500)
                events = stream.push(output)
                measured.took(output, stream.finish_reason)
                yield events
                if stream.finish_reason is not None:
                    return
                if isinstance(stream, ToldStream) and stream.thinks_too_long:
                    return
        raise EngineError("its output ended before the request was finished")


def plan_generation(
    model: ServedModel,
    prefix: str,
    prompts: Sequence[str | list[int]],
    sampling: SamplingParams,
    *,
    add_special_tokens: bool,
    continues: bool,
    param: str,
    name: str | None = None,
    telling: Telling | None = None,
) -> Generation:
    """Tokenizes `prompts` and fans them out to `sampling.n` engine requests each, the i-th with `seed + i`.

    The answer's id is the `prefix` and a `name`, which the client may have chosen.

    Raises `RequestError` for a prompt that is empty or too long (naming the field `param`), for token ids that the
    model does not have, and for too many choices.
    """
    num_choices = len(prompts) * sampling.n
    made = f"{len(prompts)} prompts with n={sampling.n} make {num_choices} choices"
    if (text := limits().over("max_choices", num_choices, made)) is not None:
        raise RequestError(text, param=param)
    generation_id = f"{prefix}-{uuid.uuid4().hex}"
    request_ids = (f"{generation_id}-{number}" for number in itertools.count())
    shown_id = generation_id if name is None else f"{prefix}-{name}"
    reader = model.prompts
    read = [
        reader.read(
            prompt,
            sampling,
            request_ids,
            add_special_tokens=add_special_tokens,
            continues=continues,
            param=param,
            telling=telling,
        )
        for prompt in prompts
    ]
    return Generation(model, shown_id, read)
