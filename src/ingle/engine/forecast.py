"""How many pages running sequences will hold at most, by how long answers were so far."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ingle.engine.sequence import Sequence
from ingle.step import Limits

_FIRST_LENGTH = 256
"""Tokens of an answer, before any ended."""
_NEWEST_SHARE = 1 / 16
"""Of the last answer in the mean length."""
_LEAST_REST = 1 / 4
"""Of the mean length: what an answer that is longer already is taken to have before it."""


class Forecast:
    """Keeps admissions from bringing preemptions: a sequence that gives its pages back is computed a second time.

    Answers end one after the other, and leave their pages to those that still grow: what counts is not what all hold at
    their ends but the most that they hold together at any time (as in LightLLM's past-future scheduler, Gong et al.,
    ASPLOS 2025).
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pages_per_token = limits.windows.count(None) / limits.page_size
        self._mean_length = float(_FIRST_LENGTH)

    def ended(self, num_generated: int) -> None:
        """An answer came to its end after so many tokens."""
        self._mean_length += (num_generated - self._mean_length) * _NEWEST_SHARE

    def outgrown(self, running: Iterable[Sequence]) -> None:
        """Pages have run out: answers are longer than was thought."""
        lengths = [seq.num_generated for seq in running]
        self._mean_length = max(self._mean_length, sum(lengths) / max(len(lengths), 1))

    def fits(self, sequences: Collection[Sequence], num_held: int, capacity: int) -> bool:
        """Whether sequences that hold `num_held` pages now, what they share counted once, will hold at most `capacity`
        at any time."""
        most_rest = max(self._mean_length, self._limits.page_size)
        if num_held + len(sequences) * most_rest * self._pages_per_token <= capacity:
            return True
        return self._peak(sequences, num_held) <= capacity

    def _peak(self, sequences: Iterable[Sequence], num_held: int) -> float:
        ends = sorted((self._rest(seq), self._own(seq)) for seq in sequences)
        held = peak = float(num_held)
        before = 0.0
        for index, (rest, own) in enumerate(ends):
            held += (len(ends) - index) * (rest - before) * self._pages_per_token
            peak = max(peak, held)
            held -= own + rest * self._pages_per_token
            before = rest
        return peak

    def _rest(self, seq: Sequence) -> float:
        """Tokens that are still to come."""
        expected = max(self._mean_length - seq.num_generated, self._mean_length * _LEAST_REST, self._limits.page_size)
        return min(expected, seq.max_num_tokens - seq.num_tokens)

    def _own(self, seq: Sequence) -> float:
        """Pages that nobody shares, as far as is known."""
        return (seq.num_tokens - (seq.num_cached_tokens or 0)) * self._pages_per_token
