"""What vLLM and llama.cpp add to answers of the OpenAI API: usage so far, token ids, progress of the prompt."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from msgspec import UNSET, UnsetType

from ingle import events
from ingle.request import TokenIds
from ingle.server.generation import Generation
from ingle.server.openai.protocol import GenerationRequest
from ingle.server.openai.responses import PromptProgress, Usage, usage_of


class Extras:
    """What one request wants of them, and what its answer has come to so far."""

    def __init__(self, asked: GenerationRequest, generation: Generation) -> None:
        self.wants_token_ids = bool(asked.return_token_ids)
        self._tells_progress = bool(asked.return_progress)
        self._include_usage = asked.include_usage
        self._continuous = asked.continuous_usage
        self._generation = generation
        self._num_cached_tokens = self._num_completion_tokens = self._num_thought_tokens = 0
        self._started_s = time.monotonic()

    def count(self, together: Iterable[events.Event]) -> None:
        """Takes note of events before they are written."""
        for told in together:
            if isinstance(told, events.Text):
                self._num_completion_tokens += len(told.token_ids)
            elif isinstance(told, events.Begin) and told.choice % self._generation.prompts[0].params.n == 0:
                self._num_cached_tokens += told.num_cached_tokens
            elif isinstance(told, events.Finish):
                self._num_thought_tokens += told.num_thought_tokens

    @property
    def chunk_usage(self) -> Usage | UnsetType | None:
        """The `usage` of a chunk before the last: null where that comes at the end."""
        if not self._include_usage:
            return UNSET
        if not self._continuous:
            return None
        num_prompt_tokens = sum(len(prompt.token_ids) for prompt in self._generation.prompts)
        used = (self._num_cached_tokens, self._num_completion_tokens, self._num_thought_tokens)
        return usage_of(events.Usage(num_prompt_tokens, *used))

    def token_ids(self, ids: Sequence[int]) -> list[int] | UnsetType:
        return list(ids) if self.wants_token_ids else UNSET

    def prompt_token_ids(self, prompt_index: int = 0) -> list[int] | UnsetType:
        return self.token_ids(self._prompt(prompt_index))

    def progress(self, together: Iterable[events.Event]) -> PromptProgress | None:
        """Of the last event that says how much of a prompt is read, if one does."""
        if not self._tells_progress:
            return None
        told = next((told for told in reversed([*together]) if isinstance(told, events.Progress)), None)
        if told is None:
            return None
        return PromptProgress(
            total=len(self._prompt(told.choice // self._generation.prompts[0].params.n)),
            cache=told.num_cached_tokens,
            processed=told.num_prompt_read,
            time_ms=round((time.monotonic() - self._started_s) * 1000),
        )

    def _prompt(self, index: int) -> TokenIds:
        return self._generation.prompts[index].token_ids
