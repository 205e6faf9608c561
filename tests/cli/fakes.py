"""A stand-in for `ingle.LLM`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ingle.config import EngineConfig, TextConfig
from ingle.request import CompletionOutput, RequestOutput, SamplingParams


class FakeLLM:
    """Answers "echo: <last message>" word by word, and notes what it was asked.

    `on_word(n)` runs before the n-th word of an answer, counted from 0.
    """

    def __init__(self, default_sampling: dict[str, Any] | None = None) -> None:
        self.default_sampling = default_sampling or {}
        self.config: EngineConfig | None = None
        self.text: TextConfig | None = None
        self.conversations: list[list[dict[str, Any]]] = []
        self.sampling: SamplingParams | None = None
        self.closed_after: list[int] = []
        self.on_word: Callable[[int], None] = lambda n: None

    def load(self, config: EngineConfig, text: TextConfig) -> FakeLLM:
        self.config, self.text = config, text
        return self

    def stream_chat(
        self, messages: Sequence[dict[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        self.conversations.append([dict(message) for message in messages])
        self.sampling = sampling_params
        sent = 0
        try:
            for word in ["echo:", *messages[-1]["content"].split()]:
                self.on_word(sent)
                yield word if sent == 0 else f" {word}"
                sent += 1
        finally:
            self.closed_after.append(sent)

    def generate(
        self, prompts: Sequence[str], sampling_params: SamplingParams, *, use_tqdm: bool
    ) -> list[RequestOutput]:
        self.sampling = sampling_params
        return [
            RequestOutput(f"{i}", prompt, [1, 2, 3], [CompletionOutput(0, f"{prompt}…好", [4, 5], "stop", "\n")])
            for i, prompt in enumerate(prompts)
        ]
