"""From the engine's tokens to the events of one choice, with thoughts and calls of tools told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from ingle.events import Event, Finish, Text
from ingle.request import EngineOutput, EngineRequest, FinishReason, SamplingParams, TokenLogprobs, token_ids
from ingle.text.formats.of_model import Formats
from ingle.text.formats.parser import Parser
from ingle.text.stream import TextStream

if TYPE_CHECKING:
    from ingle.text.formats.template_parser import TemplateParser
    from ingle.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Telling:
    """What is to be told apart in the answers to a prompt."""

    formats: Formats
    tools: Sequence[Mapping[str, Any]] = ()
    thinking: bool = False
    """The prompt ends within thoughts."""
    prompt: str = ""
    """Of which a model's own template reads the end."""
    parallel: bool = True
    """Whether there may be several calls; else an answer ends with the first."""
    budget: int | None = None
    """Most tokens of thoughts."""
    ending: Sequence[int] = ()
    """Tokens that end them."""

    @property
    def marks(self) -> Iterator[str]:
        """What the parser needs to see of tokens that a text leaves out."""
        yield from self.formats.template_marks
        if self.formats.reasoning is not None:
            yield from self.formats.reasoning.marks
        if self.formats.tools is not None and self.tools:
            yield from self.formats.tools.marks

    def parser(self, choice: int) -> Parser | TemplateParser:
        if self.formats.template is not None:
            from ingle.text.formats.template_parser import TemplateParser

            template, prompt = self.formats.template, self.prompt
            return TemplateParser(template, self.tools, prompt=prompt, parallel=self.parallel, choice=choice)
        return Parser(self.formats, self.tools, thinking=self.thinking, parallel=self.parallel, choice=choice)


class ToldStream:
    """A `TextStream` whose text is read as it grows. Token for token, so that nothing depends on how they come."""

    def __init__(
        self, telling: Telling, tokenizer: Tokenizer, sampling: SamplingParams, after: Sequence[int], choice: int
    ) -> None:
        self._stream = TextStream(tokenizer, sampling, after, choice, tokenizer.special_tokens_of(telling.marks))
        self._parser = telling.parser(choice)
        self._choice = choice
        self._scored = sampling.logprobs is not None
        self._budget, self._ending = telling.budget, list(telling.ending)
        self._token_ids: list[int] = []
        """All so far, where the thoughts have a budget."""
        self._num_thought_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return self._stream.num_tokens

    def push(self, output: EngineOutput) -> list[Event]:
        """What the engine's next output of this request brings; nothing after the end of the text."""
        events: list[Event] = []
        for each in _one_by_one(output):
            if self.finish_reason is not None or self.thinks_too_long:
                break
            events += self._take(each)
        return list(_together(events))

    @property
    def thinks_too_long(self) -> bool:
        """The thoughts have used up their budget: what the engine gives now is not wanted."""
        budget = self._budget
        return budget is not None and self._parser.thinking and self._num_thought_tokens >= budget

    def end_thoughts(self, request: EngineRequest) -> tuple[EngineRequest, list[Event]]:
        """The request that goes on behind thoughts that are ended here, and what that tells.

        Its answer may be as long as is left of that of `request`, which is none if the stream has finished with this.
        """
        most = request.sampling.max_tokens
        left = len(self._ending) if most is None else max(0, most - self._stream.num_tokens)
        self._budget, events = None, list[Event]()
        for token_id in self._ending[:left]:
            scores = [TokenLogprobs([token_id], [0.0], 1)] if self._scored else None
            events += self._take(EngineOutput(request.id, [token_id], logprobs=scores))
            if self.finish_reason is not None:
                break
        if self.finish_reason is None and most is not None and self._stream.num_tokens >= most:
            events += self._take(EngineOutput(request.id, [], "length"))
        used = self._stream.num_tokens
        sampling = msgspec.structs.replace(
            request.sampling,
            max_tokens=None if most is None else most - used,
            min_tokens=max(0, request.sampling.min_tokens - used),
            prompt_logprobs=None,
        )
        prompt = request.prompt_token_ids + token_ids(self._token_ids)
        again = msgspec.structs.replace(
            request, id=f"{request.id}-answer", prompt_token_ids=prompt, sampling=sampling, return_progress=False
        )
        return again, list(_together(events))

    def _take(self, output: EngineOutput) -> Iterator[Event]:
        if self._ending:
            self._token_ids += output.token_ids
        return self._told(self._stream.push(output))

    def _told(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            match event:
                case Text():
                    before = self._parser.thinking
                    found = self._parser.push(event.text)
                    if before or self._parser.thinking:
                        self._num_thought_tokens += len(event.token_ids)
                    yield msgspec.structs.replace(event, text="")
                    yield from found
                    if self._parser.ended:
                        yield from self._end("stop", None)
                        return
                case Finish(reason=reason, stop=stop):
                    yield from self._end(reason, stop)
                case _:
                    yield event

    def _end(self, reason: FinishReason, stop: int | str | None) -> Iterator[Event]:
        yield from self._parser.flush()
        if reason == "stop" and self._parser.num_calls:
            reason = "tool_calls"
        self.finish_reason = reason
        yield Finish(self._choice, reason, stop, self._num_thought_tokens)


def _one_by_one(output: EngineOutput) -> Iterator[EngineOutput]:
    """An output of several tokens as one for each."""
    if len(output.token_ids) < 2:
        yield output
        return
    last = len(output.token_ids) - 1
    for index, token_id in enumerate(output.token_ids):
        yield msgspec.structs.replace(
            output,
            token_ids=[token_id],
            logprobs=None if output.logprobs is None else output.logprobs[index : index + 1],
            finish_reason=output.finish_reason if index == last else None,
            stop_token_id=output.stop_token_id if index == last else None,
        )


def _together(events: Iterable[Event]) -> Iterator[Event]:
    """Texts that follow each other as one."""
    texts: list[Text] = []
    for event in events:
        if isinstance(event, Text):
            texts.append(event)
            continue
        yield from _joined(texts)
        texts = []
        yield event
    yield from _joined(texts)


def _joined(texts: Sequence[Text]) -> Iterator[Text]:
    if len(texts) < 2:
        yield from texts
        return
    scored = [text.logprobs for text in texts if text.logprobs is not None]
    logprobs: list[TokenLogprobs] | None = [entry for each in scored for entry in each] if scored else None
    yield Text(
        texts[0].choice,
        "".join(text.text for text in texts),
        [token_id for text in texts for token_id in text.token_ids],
        logprobs,
        [start for text in texts for start in text.starts],
    )
