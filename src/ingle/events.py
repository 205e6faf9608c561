"""An answer as it comes, in events that no protocol has shaped yet; the whole answer is their fold.

Of each choice come `Begin`, then any number of `Text`, then `Finish`; last comes `Usage`, of all choices together.
What is told apart within a text, as reasoning and tool calls will be, is an event of its own, made between the text and
the protocols. The failure of a whole request is no event: it is raised, and each protocol has its way to say so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

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


class Finish(msgspec.Struct, frozen=True):
    """The last of a choice."""

    choice: int
    reason: FinishReason
    stop: int | str | None = None
    """The stop string or stop token id that ended the text; None when an end token or a limit did."""


class Usage(msgspec.Struct, frozen=True):
    """What all choices took together. Each prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the prompts' tokens."""
    num_completion_tokens: int


Event = Begin | Text | Finish | Usage


@dataclass
class Choice:
    """What some events, or all of them, say of one choice."""

    begin: Begin | None = None
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    starts: list[int] = field(default_factory=list)
    finish: Finish | None = None

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


@dataclass
class Answer:
    """What events add up to: all of an answer's to the whole of it, a few to a piece."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Usage | None = None

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Usage):
                self.usage = event
                continue
            choice = self.choices.setdefault(event.choice, Choice())
            match event:
                case Begin():
                    choice.begin = event
                case Text():
                    choice.pieces.append(event.text)
                    choice.token_ids += event.token_ids
                    choice.starts += event.starts
                    if event.logprobs:
                        choice.logprobs = [] if choice.logprobs is None else choice.logprobs
                        choice.logprobs += event.logprobs
                case Finish():
                    choice.finish = event
                    choice.pieces = [choice.text]  # whole: pieces of a token each take ten times the memory


def fold(events: Iterable[Event]) -> Answer:
    answer = Answer()
    answer.add(events)
    return answer
