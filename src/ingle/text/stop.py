"""Stop strings, found while the text still grows."""

from __future__ import annotations

from collections import deque
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
    the start of a stop string is held back, and no more than that. The time is that of the text alone, however many and
    long the stop strings are.
    """

    def __init__(self, stops: Sequence[str] | Automaton) -> None:
        """An automaton is shared by all that look for the same."""
        self._automaton = stops if isinstance(stops, Automaton) else Automaton(stops) if stops else None
        self._state = 0
        self._held = ""

    def push(self, text: str, *, armed: bool = True) -> str | StopMatch:
        """The text that is safe to give out, or the match. A match must end in text that was pushed while armed."""
        if self._automaton is None:
            return text
        found, state, num_held = self._automaton, self._state, len(self._held)
        text = self._held + text
        for end in range(num_held + 1, len(text) + 1):
            state = found.next(state, text[end - 1])
            stop = found.complete[state]
            if stop is not None and armed:
                return StopMatch(text[: end - len(stop)], stop)
            state = found.beyond[state]
        self._state = state
        start = len(text) - found.depth[state]
        self._held = text[start:]
        return text[:start]

    def flush(self) -> str:
        """What is held back, when no text follows."""
        held, self._held, self._state = self._held, "", 0
        return held


class Automaton:
    """Aho and Corasick's: a state is the longest end of the text that a stop string begins with.

    "Efficient string matching: an aid to bibliographic search", Communications of the ACM 18(6), 1975.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._edges: dict[tuple[int, str], int] = {}
        self._shorter = [0]
        """The next shorter such end."""
        self.depth = [0]
        """Characters of that end."""
        self.complete: list[str | None] = [None]
        """The longest stop string that the text ends with."""
        for stop in stops:
            self._add(stop)
        self._link()
        inner = {state for state, _ in self._edges}
        self.beyond = list(range(len(self.depth)))
        """The state itself, or, where no stop string goes on, the next shorter one where one does."""
        for state in self._by_depth:
            if state and state not in inner:
                self.beyond[state] = self.beyond[self._shorter[state]]

    def next(self, state: int, character: str) -> int:
        while (following := self._edges.get((state, character))) is None:
            if state == 0:
                return 0
            state = self._shorter[state]
        return following

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._edges.setdefault((state, character), len(self.depth))
            if following == len(self.depth):
                self.depth.append(self.depth[state] + 1)
                self.complete.append(None)
                self._shorter.append(0)
            state = following
        self.complete[state] = stop

    def _link(self) -> None:
        children: dict[int, list[tuple[str, int]]] = {}
        for (state, character), following in self._edges.items():
            children.setdefault(state, []).append((character, following))
        self._by_depth, queue = [0], deque([0])
        while queue:
            state = queue.popleft()
            for character, following in children.get(state, ()):
                if state:
                    self._shorter[following] = self.next(self._shorter[state], character)
                if self.complete[following] is None:
                    self.complete[following] = self.complete[self._shorter[following]]
                self._by_depth.append(following)
                queue.append(following)
