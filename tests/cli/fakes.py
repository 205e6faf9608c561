"""A stand-in for `ingle.LLM`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ingle.channel import EngineInfo
from ingle.config import EngineConfig, TextConfig
from ingle.errors import RequestError
from ingle.events import Begin, Event, Finish, Text, Usage
from ingle.request import CompletionOutput, RequestOutput, SamplingParams
from ingle.text.chat_template import ChatTemplate

INFO = EngineInfo(
    max_model_len=100,
    vocab_size=256,
    max_num_seqs=4,
    num_pages=10,
    page_size=16,
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    product_dtype="float32",
    factors=["float32"],
    kernels="none",
    family="fake",
    writes_text=True,
    hidden_size=64,
    num_parameters=12_000,
    stored_types={"F32": 12_000},
    expanded_types=[],
    kept_types=[],
    weight_bytes=48_000,
    kv_cache_bytes=4096,
    notices=[],
    timings_s={},
)


class FakeStream(Iterator[Event]):
    """The events of an answer of some words. Tokens are words, of the answer and of the messages."""

    def __init__(self, llm: FakeLLM, words: Sequence[str], num_prompt_tokens: int, max_tokens: int | None) -> None:
        self._llm, self._words, self._num_prompt_tokens = llm, words[:max_tokens], num_prompt_tokens
        self._was_cut = len(self._words) < len(words)
        self._closed = self._ended = False
        self._sent = 0
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        self._closed = True
        if not self._ended:
            self._ended = True
            self._llm.closed_after.append(self._sent)

    def _run(self) -> Iterator[Event]:
        yield Begin(0)
        for word in self._words:
            self._llm.on_word(self._sent)
            if self._closed:
                return
            yield Text(0, word if self._sent == 0 else f" {word}", [self._sent])
            self._sent += 1
        yield Finish(0, "length" if self._was_cut else "stop")
        yield Usage(self._num_prompt_tokens, 0, self._sent)


class FakeLLM:
    """Answers "echo: <last message>" word by word, and notes what it was asked.

    `on_word(n)` runs before the n-th word of an answer, counted from 0.
    """

    def __init__(self, default_sampling: dict[str, Any] | None = None) -> None:
        self.default_sampling = default_sampling or {}
        self.info = INFO
        self.chat_template: ChatTemplate | None = ChatTemplate("{{ messages[-1].content }}", {})
        self.config: EngineConfig | None = None
        self.text: TextConfig | None = None
        self.conversations: list[list[dict[str, Any]]] = []
        self.sampling: SamplingParams | None = None
        self.each_sampling: list[SamplingParams] = []
        self.closed_after: list[int] = []
        self.on_word: Callable[[int], None] = lambda n: None

    def load(self, config: EngineConfig, text: TextConfig) -> FakeLLM:
        self.config, self.text = config, text
        return self

    def chat_events(
        self, messages: Sequence[dict[str, Any]], sampling_params: SamplingParams | None = None
    ) -> FakeStream:
        self.conversations.append([dict(message) for message in messages])
        self.sampling = sampling_params
        size = self.num_prompt_tokens(messages)
        if size >= self.info.max_model_len:
            raise RequestError("the context is full.", code="context_length_exceeded")
        max_tokens = sampling_params.max_tokens if sampling_params is not None else None
        room = self.info.max_model_len - size
        words = ["echo:", *messages[-1]["content"].split()]
        return FakeStream(self, words, size, room if max_tokens is None else min(max_tokens, room))

    def num_prompt_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        return sum(len(message["content"].split()) for message in messages)

    def answers(
        self, questions: Sequence[str | list[Any]], sampling_params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """The last comes first."""
        self.each_sampling, self.sampling = list(sampling_params), sampling_params[0]
        for index, question in reversed(list(enumerate(questions))):
            asked = question if isinstance(question, str) else question[-1]["content"]
            texts = [CompletionOutput(n, f"{asked}…好", [4, 5], "stop", "\n") for n in range(sampling_params[index].n)]
            yield index, RequestOutput(f"{index}", asked, [1, 2, 3], texts)
