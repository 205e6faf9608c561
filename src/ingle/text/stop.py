"""Stop strings, found while the text still grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """The stop string that was found; `text` is what stands before it and was not given out yet."""

    text: str
    string: str


class StopMatcher:
    """Looks for the first stop string to be complete in a text that comes in pieces, however it is cut.

    Of several that become complete with the same character the longest counts. Text that could still turn out to be
    the start of a stop string is held back, and no more than that.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> str | StopMatch:
        """The text that is safe to give out, or the match. A match must end in text that was pushed while armed."""
        if not self._stops:
            return text
        num_held = len(self._held)
        text = self._held + text
        if armed and (match := self._find(text, num_held)) is not None:
            return match
        self._held = self._possible_start(text)
        return text[: len(text) - len(self._held)]

    def flush(self) -> str:
        """What is held back, when no text follows."""
        held, self._held = self._held, ""
        return held

    def _find(self, text: str, num_held: int) -> StopMatch | None:
        found = []
        for stop in self._stops:
            start = text.find(stop, max(0, num_held - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return None
        _, start, stop = min(found)
        return StopMatch(text[:start], stop)

    def _possible_start(self, text: str) -> str:
        """The longest end of `text` that a stop string begins with."""
        longest = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), len(text))
            while 0 <= start < longest:
                if stop.startswith(text[start:]):
                    longest = start
                start = text.find(stop[0], start + 1)
        return text[longest:]
