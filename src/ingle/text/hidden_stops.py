"""Stop strings that spell tokens which the text does not show, such as `<|im_end|>`."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ingle.text.stop import Automaton, StopMatch, StopMatcher

if TYPE_CHECKING:
    from ingle.text.tokenizer import Tokenizer

_FIRST_MARK, _LAST_MARK = 0xD800, 0xDFFF
"""Surrogates, which no decoded text holds."""
_SMALL_CHARS = 4096


class TokenStops:
    """Looks for stop strings in the text and, beside it, in the text with a mark for each hidden token they spell.

    Like `StopMatcher`, which looks in the text alone: a text is a match too when the model spells a special token.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Tokenizer) -> None:
        self._table = stop_table(tuple(stops), tokenizer)
        self._mark_of, self._spelled = self._table.mark_of, self._table.spelled
        self._in_text = StopMatcher(self._table.in_text if stops else ())
        self._in_marked = StopMatcher(self._table.in_marked if self._spelled else ())
        self._pending = ""
        """Text that was not given out yet."""
        self._num_given = 0
        self._num_cleared = [0, 0]
        """Characters of the text that each matcher has let pass."""

    def push(self, text: str, hidden: Iterable[int] = (), *, armed: bool = True) -> str | StopMatch:
        """The text that is safe to give out, or the match. `hidden` are tokens after `text` that it does not show."""
        if not self._spelled:
            return self._in_text.push(text, armed=armed)
        self._pending += text
        marked = text + "".join(self._mark_of.get(token_id, "") for token_id in hidden)
        found: list[tuple[int, int, str]] = []
        for index, result in enumerate(
            (self._in_text.push(text, armed=armed), self._in_marked.push(marked, armed=armed))
        ):
            if isinstance(result, StopMatch):
                start = self._num_cleared[index] + _num_shown(result.text)
                stop = self._spelled.get(result.string, result.string)
                found.append((start + _num_shown(result.string), start, stop))
            else:
                self._num_cleared[index] += _num_shown(result)
        if found:
            _, start, stop = min(found)
            return StopMatch(self._pending[: start - self._num_given], stop)
        num_safe = min(self._num_cleared) - self._num_given
        safe, self._pending = self._pending[:num_safe], self._pending[num_safe:]
        self._num_given += num_safe
        return safe

    def flush(self) -> str:
        """What is held back, when no text follows."""
        if not self._spelled:
            return self._in_text.flush()
        held, self._pending = self._pending, ""
        return held


class StopTable:
    """What some stop strings are looked for by, whoever looks for them."""

    def __init__(self, stops: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self.mark_of: dict[int, str] = {}
        self.spelled: dict[str, str] = {}
        """Stop strings as they were given, by their marked form."""
        for stop in stops:
            marked = self._marked(stop, tokenizer.hidden_tokens_in(stop))
            if marked != stop:
                self.spelled.setdefault(marked, stop)
        self.in_text = Automaton(stops)
        self.in_marked = Automaton(tuple(self.spelled))

    def _marked(self, stop: str, hidden: Iterable[tuple[int, int, int]]) -> str:
        parts: list[str] = []
        done = 0
        for start, end, token_id in hidden:
            mark = self.mark_of.get(token_id) or chr(_FIRST_MARK + len(self.mark_of))
            if ord(mark) > _LAST_MARK:  # two thousand tokens: this one is looked for as text alone
                continue
            self.mark_of[token_id] = mark
            parts += stop[done:start], mark
            done = end
        return "".join(parts) + stop[done:]


_recent = lru_cache(maxsize=8)(StopTable)
_in_use: WeakValueDictionary[tuple[tuple[str, ...], Tokenizer], StopTable] = WeakValueDictionary()
_making = threading.Lock()


def stop_table(stops: tuple[str, ...], tokenizer: Tokenizer) -> StopTable:
    """Made once for all choices of a request, off a server's event loop if it is asked for there first. Small ones are
    kept for the next request; large ones, which take megabytes, as long as somebody has them."""
    if sum(map(len, stops)) <= _SMALL_CHARS:
        return _recent(stops, tokenizer)
    with _making:
        table = _in_use.get((stops, tokenizer))
    if table is None:
        table = StopTable(stops, tokenizer)
        with _making:
            table = _in_use.setdefault((stops, tokenizer), table)
    return table


def _num_shown(marked: str) -> int:
    return sum(not _FIRST_MARK <= ord(char) <= _LAST_MARK for char in marked)
