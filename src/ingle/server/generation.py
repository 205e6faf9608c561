"""From prompts to text: one HTTP request fanned out to the engine, and its updates merged again."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple

from ingle.errors import EngineError, RequestError
from ingle.request import (
    EngineOutput,
    EngineRequest,
    SamplingParams,
    TokenIds,
    check_prompt,
    check_token_ids,
    token_ids,
)
from ingle.server.context import ServerContext
from ingle.server.openai.responses import PromptTokensDetails, Usage
from ingle.server.streaming import merge
from ingle.text.stop import automaton
from ingle.text.stream import TextDelta, TextStream

MAX_CHOICES = 1024
"""Most completions of one HTTP request: prompts times n."""

_MAX_CHARS_PER_TOKEN = 128
"""The longest tokens of today's vocabularies are runs of 128 spaces. Text that cannot fit is not worth tokenizing."""


class Update(NamedTuple):
    """What one step of the engine brought for one choice."""

    choice: int
    delta: TextDelta
    output: EngineOutput


@dataclass(frozen=True)
class Generation:
    """What one HTTP request asks of the engine. Choice i belongs to prompt i // n."""

    context: ServerContext
    id: str
    prompts: Sequence[TokenIds]
    requests: Sequence[EngineRequest]
    continues: bool
    """Whether the texts go on where their prompts end: those of a chat stand alone."""

    def updates(self) -> AsyncGenerator[Update, None]:
        """Updates of all choices as they come. Closing it aborts in the engine what still runs.

        Raises `RequestError` (500) when the engine fails on one of the requests, `EngineError` when it is dead.
        """
        return merge([self._run(index, request) for index, request in enumerate(self.requests)])

    async def _run(self, index: int, request: EngineRequest) -> AsyncGenerator[Update, None]:
        after = request.prompt_token_ids if self.continues else ()
        stream = TextStream(self.context.tokenizer, request.sampling, after)
        async with aclosing(self.context.engine.generate(request)) as outputs:
            async for output in outputs:
                self.context.queue.leave(request.id)
                if output.finish_reason == "error":
                    message = f"Generation of {request.id} failed: {output.error}"
                    raise RequestError(message, code="generation_failed", status=500)
                delta = stream.push(output)
                yield Update(index, delta, output)
                if delta.finish_reason is not None:
                    return
        raise EngineError("its output ended before the request was finished")


def plan_generation(
    context: ServerContext,
    prefix: str,
    prompts: Sequence[str | list[int]],
    sampling: SamplingParams,
    *,
    add_special_tokens: bool,
    continues: bool,
    param: str,
) -> Generation:
    """Tokenizes `prompts` and fans them out to `sampling.n` engine requests each, the i-th with `seed + i`.

    Raises `RequestError` for a prompt that is empty or too long (naming the field `param`), for token ids that the
    model does not have, and for too many choices.
    """
    if (num_choices := len(prompts) * sampling.n) > MAX_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts with n={sampling.n} make {num_choices} choices, at most {MAX_CHOICES} are taken",
            param=param,
        )
    check_token_ids(sampling, context.engine.info.vocab_size)
    automaton(sampling.stop)  # made here, off the event loop, where it may take a while
    generation_id = f"{prefix}-{uuid.uuid4().hex}"
    requests: list[EngineRequest] = []
    prompts_token_ids: list[TokenIds] = []
    for prompt in prompts:
        ids = _encode(context, prompt, add_special_tokens, param) if isinstance(prompt, str) else prompt
        max_tokens = _max_tokens(context, ids, sampling.max_tokens, param)
        prompt_token_ids = token_ids(ids)
        prompts_token_ids.append(prompt_token_ids)
        for i in range(sampling.n):
            own = sampling.of_choice(i, max_tokens)
            request_id = f"{generation_id}-{len(requests)}"
            requests.append(EngineRequest(request_id, prompt_token_ids, own, context.tokenizer.eos_token_ids))
    return Generation(context, generation_id, prompts_token_ids, requests, continues)


class UsageCounter:
    """Counts what a request used, from its updates. Each prompt counts once, whatever n."""

    def __init__(self, generation: Generation) -> None:
        self._num_prompt_tokens = sum(map(len, generation.prompts))
        self._choices_per_prompt = len(generation.requests) // len(generation.prompts)
        self._num_completion_tokens = 0
        self._num_cached_tokens = [0] * len(generation.prompts)

    def add(self, update: Update) -> None:
        self._num_completion_tokens += len(update.delta.token_ids)
        prompt_index, nth = divmod(update.choice, self._choices_per_prompt)
        # The later choices of a prompt find in the cache what the first one computed: that saved the client nothing.
        if nth == 0:
            cached = max(self._num_cached_tokens[prompt_index], update.output.num_cached_tokens)
            self._num_cached_tokens[prompt_index] = cached

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            total_tokens=self._num_prompt_tokens + self._num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(sum(self._num_cached_tokens)),
        )


def check_num_chars(context: ServerContext, num_chars: int, param: str) -> None:
    """Raises `RequestError` for a text that is too long whatever its tokens are."""
    max_model_len = context.engine.info.max_model_len
    if num_chars > max_model_len * _MAX_CHARS_PER_TOKEN:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens, which cannot hold {num_chars} characters.",
            param=param,
            code="context_length_exceeded",
        )


def _encode(context: ServerContext, text: str, add_special_tokens: bool, param: str) -> list[int]:
    check_num_chars(context, len(text), param)
    return context.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _max_tokens(context: ServerContext, prompt: list[int], max_tokens: int | None, param: str) -> int:
    info = context.engine.info
    try:
        return check_prompt(prompt, max_tokens, vocab_size=info.vocab_size, max_model_len=info.max_model_len)
    except RequestError as error:
        raise RequestError(str(error), param=param, code=error.code, status=error.status) from error
