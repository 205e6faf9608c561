"""An answer in blocks, one after the other: a thought, a text or a call of a tool, each whole before the next begins.

This is how `/v1/messages` and `/v1/responses` tell an answer, streamed or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, TypeAlias

import msgspec

from ingle import events
from ingle.request import TokenLogprobs

Kind = Literal["thought", "text", "call"]


class Block(msgspec.Struct, kw_only=True):
    index: int
    kind: Kind
    call: events.ToolCall | None = None
    pieces: list[str] = []
    logprobs: list[TokenLogprobs] = []

    @property
    def text(self) -> str:
        """A call's is its arguments."""
        return "".join(self.pieces)


class Opened(msgspec.Struct, frozen=True):
    block: Block


class Grown(msgspec.Struct, frozen=True):
    block: Block
    text: str
    logprobs: Sequence[TokenLogprobs] = ()


class Closed(msgspec.Struct, frozen=True):
    block: Block


Step: TypeAlias = Opened | Grown | Closed


class Blocks:
    """Turns the events of one choice into steps. Where the events are cut, and into how many, makes no block different.

    White space before a text is held back until there is more of it: what stands between two calls is no text.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._held = ""
        self._held_logprobs: list[TokenLogprobs] = []
        """Of tokens whose text is yet to come."""

    @property
    def has_call(self) -> bool:
        return any(block.kind == "call" for block in self.blocks)

    def steps(self, told: Iterable[events.Event]) -> Iterator[Step]:
        for event in told:
            match event:
                case events.Thought(_, text) if text:
                    yield from self._turn_to("thought")
                    yield from self._grow(text)
                case events.Text(_, text, _, logprobs):
                    self._held_logprobs += logprobs or ()
                    if text:
                        yield from self._text(text)
                case events.ToolCall():
                    yield from self._turn_to("call", event)
                    yield from self._grow("")
                case events.Arguments(_, _, text) if text:
                    yield from self._grow(text)
                case events.Finish():
                    if self._open is not None:
                        yield from self._grow("")
                    yield from self._close()

    def ensure(self) -> Iterator[Step]:
        """An empty text, at the end of an answer that has nothing else."""
        if not self.blocks:
            yield from self._turn_to("text")
            yield from self._close()

    def _text(self, text: str) -> Iterator[Step]:
        if self._open is None or self._open.kind != "text":
            self._held += text
            if self._held.isspace():
                return
            text = self._held
            yield from self._turn_to("text")
        yield from self._grow(text)

    def _turn_to(self, kind: Kind, call: events.ToolCall | None = None) -> Iterator[Step]:
        self._held = ""
        if self._open is not None and self._open.kind == kind and call is None:
            return
        yield from self._close()
        self._open = Block(index=len(self.blocks), kind=kind, call=call)
        self.blocks.append(self._open)
        yield Opened(self._open)

    def _grow(self, text: str) -> Iterator[Step]:
        assert self._open is not None, "what grows was opened"
        logprobs, self._held_logprobs = self._held_logprobs, []
        self._open.logprobs += logprobs
        if text:
            self._open.pieces.append(text)
        if text or logprobs:
            yield Grown(self._open, text, logprobs)

    def _close(self) -> Iterator[Step]:
        if self._open is not None:
            block, self._open = self._open, None
            yield Closed(block)


def blocks_of(choice: events.Choice) -> Blocks:
    """Those of a whole answer: the same that were streamed."""
    blocks = Blocks()
    for _ in blocks.steps(choice.replay()):
        pass
    return blocks
