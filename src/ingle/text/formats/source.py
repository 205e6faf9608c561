"""A text that comes in pieces, read as if it were there: readers are generators, which wait where it ends for now.

So what is read cannot depend on where the pieces were cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""Yields to wait for more text, and returns what was read."""


class Source:
    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        """What stands before is read."""
        self.final = False
        """No more comes."""
        self._held = 0

    def push(self, text: str) -> None:
        if not self._held and self.at:
            self.text, self.at = self.text[self.at :], 0
        self.text += text

    def hold(self) -> int:
        """From now on `rewind` may come back to this place."""
        self._held += 1
        return self.at

    def release(self) -> None:
        self._held -= 1

    def rewind(self, place: int) -> None:
        self.at = place

    def peek(self) -> Reading[str]:
        """The next character, or nothing at the end."""
        while self.at >= len(self.text):
            if self.final:
                return ""
            yield
        return self.text[self.at]

    def skip_spaces(self) -> Reading[str]:
        """The next character that is no white space."""
        while (char := (yield from self.peek())).isspace():
            self.at += 1
        return char

    def skip_spaces_given(self, give: Callable[[str], None]) -> Reading[str]:
        """`skip_spaces`, of which `give` gets what is skipped."""
        while (char := (yield from self.peek())).isspace():
            self.at += 1
            give(char)
        return char

    def take(self, mark: str) -> Reading[bool]:
        """Reads `mark`, if it comes next."""
        while True:
            next = self.text[self.at : self.at + len(mark)]
            if next == mark:
                self.at += len(mark)
                return True
            if self.final or not mark.startswith(next):
                return False
            yield

    def until(self, marks: Marks, give: Callable[[str], None], most: int | None = None) -> Reading[str | None]:
        """Reads up to one of the marks and the mark itself, which it returns; None at the end of the text, or when
        more than `most` characters come before.

        `give` gets what comes before, as it is certain.
        """
        num_given = 0
        while True:
            found = marks.find(self.text, self.at)
            end = found[0] if found else len(self.text) if self.final else marks.safe_end(self.text, self.at)
            if most is not None:
                end = min(end, self.at + most + 1 - num_given)
            if end > self.at:
                num_given += end - self.at
                give(self.text[self.at : end])
                self.at = end
            if most is not None and num_given > most:
                return None
            if found and (found[2] or self.final or len(self.text) >= self.at + marks.longest):
                self.at += len(found[1])
                return found[1]
            if self.final:
                return None
            yield


class Marks:
    """Texts to look for; of several that begin at one place the longest counts."""

    def __init__(self, marks: Iterable[str]) -> None:
        self.marks = tuple(sorted(set(filter(None, marks)), key=len, reverse=True))
        self.longest = max(map(len, self.marks), default=0)
        self._pattern = re.compile("|".join(map(re.escape, self.marks)) or r"(?!)")
        self._firsts = frozenset(mark[0] for mark in self.marks)
        self._beginnings = frozenset(mark[:size] for mark in self.marks for size in range(1, len(mark)))
        self._longer = {mark: any(m != mark and m.startswith(mark) for m in self.marks) for mark in self.marks}

    def find(self, text: str, at: int) -> tuple[int, str, bool] | None:
        """Where the first begins, it, and whether no longer one can begin there."""
        match = self._pattern.search(text, at)
        return None if match is None else (match.start(), match[0], not self._longer[match[0]])

    def safe_end(self, text: str, at: int) -> int:
        """Up to where no mark can begin, whatever follows."""
        for start in range(max(at, len(text) - self.longest + 1), len(text)):
            if text[start] in self._firsts and text[start:] in self._beginnings:
                return start
        return len(text)


@lru_cache(maxsize=256)
def marks(*texts: str) -> Marks:
    return Marks(texts)
