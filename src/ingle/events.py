"""An answer as it comes, in events that no protocol has shaped yet; the whole answer is their fold.

Of each choice come `Begin`, then any number of `Text`, then `Finish`; last comes `Usage`, of all choices together.
`Progress` comes before all, if asked for.
What is told apart within a text, thoughts and calls of tools, is an event of its own, made between the text and the
protocols; `Text` then holds the rest, and all tokens. The failure of a whole request is no event: it is raised, and
each protocol has its way to say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from ingle.request import FinishReason, TokenLogprobs


class Begin(msgspec.Struct, frozen=True):
    """The prompt is read and the first token of this choice is there, though maybe no text yet."""

    choice: int
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, the first None; if asked for."""


class Text(msgspec.Struct, frozen=True):
    """Tokens, and the text that is safe to show since.

    `text` may lag behind `token_ids`: unfinished characters and possible stop strings are held back.
    """

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One per entry of `token_ids`, if asked for."""
    starts: list[int] = []
    """Where in the choice's text each of `token_ids` begins, in characters, if log probabilities were asked for.

    Tokens that the text does not show begin where they stand, and those that a stop string cut off beyond its end.
    """


class Thought(msgspec.Struct, frozen=True):
    """More of what the model thinks before it answers."""

    choice: int
    text: str


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool begins. Calls come one after the other."""

    choice: int
    index: int
    """Among the choice's calls."""
    id: str
    name: str


class Arguments(msgspec.Struct, frozen=True):
    """More of the JSON object that is handed to the tool of the call `index`."""

    choice: int
    index: int
    text: str


class Finish(msgspec.Struct, frozen=True):
    """The last of a choice."""

    choice: int
    reason: FinishReason
    stop: int | str | None = None
    """The stop string or stop token id that ended the text; None when an end token or a limit did."""
    num_thought_tokens: int = 0
    """Of the choice's tokens, those of thoughts and of what encloses them."""


class Usage(msgspec.Struct, frozen=True):
    """What all choices took together. Each prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompts' tokens."""
    num_completion_tokens: int
    num_thought_tokens: int = 0
    """Of the completion's tokens."""


class Progress(msgspec.Struct, frozen=True):
    """So much of the prompt is read; comes before `Begin`, if asked for."""

    choice: int
    num_prompt_read: int
    num_cached_tokens: int


Event = Progress | Begin | Text | Thought | ToolCall | Arguments | Finish | Usage


class Call(msgspec.Struct):
    """What some events, or all of them, say of one call of a tool."""

    begin: ToolCall | None = None
    pieces: list[str] = []

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class Run(msgspec.Struct):
    """What came of one kind, with nothing of another kind between."""

    kind: type[Text] | type[Thought] | type[ToolCall]
    call: int = 0
    """Index of the call."""
    num_chars: int = 0
    num_tokens: int = 0
    """That came with it, or before it without any text."""


class Choice(msgspec.Struct):
    """What some events, or all of them, say of one choice."""

    begin: Begin | None = None
    pieces: list[str] = []
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    starts: list[int] = []
    thoughts: list[str] = []
    calls: dict[int, Call] = {}
    """By index."""
    runs: list[Run] = []
    """In which order texts, thoughts and calls came."""
    num_tokens_since: int = 0
    """That came after the last of them."""
    finish: Finish | None = None

    @property
    def thought(self) -> str:
        return "".join(self.thoughts)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.finish is None else self.finish.reason

    @property
    def stop_reason(self) -> int | str | None:
        return None if self.finish is None else self.finish.stop

    @property
    def prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        return None if self.begin is None else self.begin.prompt_logprobs

    def grow(self, kind: type[Text] | type[Thought] | type[ToolCall], num_chars: int, call: int = 0) -> None:
        """Of `num_chars` more, in the last run if it is of that kind, or else in a new one."""
        last = self.runs[-1] if self.runs else None
        if last is None or last.kind is not kind or last.call != call:
            self.runs.append(last := Run(kind, call))
        last.num_chars += num_chars
        last.num_tokens += self.num_tokens_since
        self.num_tokens_since = 0

    def replay(self) -> Iterator[Event]:
        """Events that fold to this choice, in the order in which they came: two for each run, tokens and content."""
        if self.begin is not None:
            yield self.begin
        number = 0 if self.begin is None else self.begin.choice
        read = dict.fromkeys((Text, Thought, *self.calls), 0)
        num_tokens = 0
        for run in self.runs:
            yield from self._tokens(number, num_tokens, num_tokens + run.num_tokens)
            num_tokens += run.num_tokens
            key = run.call if run.kind is ToolCall else run.kind
            span = slice(read[key], read[key] + run.num_chars)
            if run.kind is Text:
                yield Text(number, self.text[span], [])
            elif run.kind is Thought:
                yield Thought(number, self.thought[span])
            else:
                call = self.calls[run.call]
                if call.begin is not None and not span.start:
                    yield call.begin
                if run.num_chars:
                    yield Arguments(number, run.call, call.arguments[span])
            read[key] = span.stop
        yield from self._tokens(number, num_tokens, len(self.token_ids))
        if self.finish is not None:
            yield self.finish

    def _tokens(self, number: int, start: int, stop: int) -> Iterator[Text]:
        if start < stop:
            logprobs = None if self.logprobs is None else self.logprobs[start:stop]
            yield Text(number, "", self.token_ids[start:stop], logprobs, self.starts[start:stop])


class Answer(msgspec.Struct):
    """What events add up to: all of an answer's to the whole of it, a few to a piece."""

    choices: dict[int, Choice] = {}
    usage: Usage | None = None

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Progress):
                continue
            if isinstance(event, Usage):
                self.usage = event
                continue
            choice = self.choices.get(event.choice)
            if choice is None:
                choice = self.choices[event.choice] = Choice()
            match event:
                case Begin():
                    choice.begin = event
                case Text():
                    choice.pieces.append(event.text)
                    choice.token_ids += event.token_ids
                    choice.num_tokens_since += len(event.token_ids)
                    if event.text:
                        choice.grow(Text, len(event.text))
                    choice.starts += event.starts
                    if event.logprobs:
                        choice.logprobs = [] if choice.logprobs is None else choice.logprobs
                        choice.logprobs += event.logprobs
                case Thought():
                    choice.thoughts.append(event.text)
                    if event.text:
                        choice.grow(Thought, len(event.text))
                case ToolCall():
                    choice.calls.setdefault(event.index, Call()).begin = event
                    choice.grow(ToolCall, 0, event.index)
                case Arguments():
                    choice.calls.setdefault(event.index, Call()).pieces.append(event.text)
                    if event.text:
                        choice.grow(ToolCall, len(event.text), event.index)
                case Finish():
                    choice.finish = event
                    choice.pieces = [choice.text]  # whole: pieces of a token each take ten times the memory


def fold(events: Iterable[Event]) -> Answer:
    answer = Answer()
    answer.add(events)
    return answer
