"""From when tokens came to the figures of a level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ingle.bench.serving.results import PERCENTS, Figures, Request, Spread

Numbers = NDArray[np.float64]


@dataclass
class Exchange:
    """A request and what came of it. Times are `time.perf_counter()`'s."""

    session: int
    turn: int
    sent_s: float
    max_tokens: int
    event_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    """When the last event came, or the error."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    usage_tokens: int | None = None
    """Of the answer, as the server counts."""
    text_tokens: int | None = None
    """The same by a tokenizer, where the server does not say."""
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        if self.usage_tokens is not None:
            return self.usage_tokens
        return len(self.event_s) if self.text_tokens is None else self.text_tokens

    @property
    def tokens_per_event(self) -> float:
        """Of tokens that made no event, as some that are part of a character, too."""
        return max(self.output_tokens / len(self.event_s), 1.0) if self.event_s else 1.0

    @property
    def ttft_s(self) -> float | None:
        return self.event_s[0] - self.sent_s if self.event_s else None

    @property
    def tpot_s(self) -> float | None:
        """None where nothing came behind the first event."""
        behind = self.output_tokens - self.tokens_per_event
        return (self.ended_s - self.event_s[0]) / behind if self.event_s and behind >= 1 else None

    def as_request(self, begin_s: float) -> Request:
        return Request(
            sent_s=round(self.sent_s - begin_s, 6), ended_s=round(self.ended_s - begin_s, 6),
            ttft_s=_rounded(self.ttft_s), tpot_s=_rounded(self.tpot_s), prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens, events=len(self.event_s), session=self.session, turn=self.turn,
            error=self.error,
        )  # fmt: skip


def figures_of(exchanges: Sequence[Exchange], goodput: Mapping[str, float]) -> Figures:
    """`exchanges`, of one level, are all that were sent. `goodput`: the seconds that ttft, tpot and e2el may take."""
    good = [one for one in exchanges if one.error is None]
    begin = min((one.sent_s for one in exchanges), default=0.0)
    duration = max((one.ended_s for one in exchanges), default=begin) - begin or 1e-9
    num_in, num_out = sum(one.prompt_tokens or 0 for one in good), sum(one.output_tokens for one in good)
    num_events = sum(len(one.event_s) for one in good)
    cached = [one.cached_tokens for one in good if one.cached_tokens is not None]
    kept = sum(_keeps(one, goodput) for one in good)
    itl, weights, gaps = _gaps(good)
    return Figures(
        duration_s=duration,
        num_ok=len(good),
        num_errors=len(exchanges) - len(good),
        errors=dict(Counter(one.error for one in exchanges if one.error is not None).most_common()),
        prompt_tokens=num_in,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=num_out,
        counted_by=_counted_by(good),
        output_tokens_per_s=num_out / duration,
        total_tokens_per_s=(num_in + num_out) / duration,
        requests_per_s=len(good) / duration,
        mean_concurrency=sum(one.ended_s - one.sent_s for one in exchanges) / duration,
        tokens_per_event=num_out / num_events if num_events else 1.0,
        request_tokens_per_s=spread([one.output_tokens / (one.ended_s - one.sent_s) for one in good if one.event_s]),
        ttft_s=spread([ttft for one in good if (ttft := one.ttft_s) is not None]),
        tpot_s=spread([tpot for one in good if (tpot := one.tpot_s) is not None]),
        itl_s=spread(itl, weights),
        event_gap_s=spread(gaps),
        e2e_s=spread([one.ended_s - one.sent_s for one in good]),
        short_answers=sum(one.output_tokens < one.max_tokens for one in good),
        goodput_requests_per_s=kept / duration if goodput else None,
        goodput_share=kept / len(exchanges) if goodput and exchanges else None,
    )


def spread(values: Sequence[float] | Numbers, weights: Numbers | None = None) -> Spread | None:
    """None of nothing. Percentiles lie between two values where no value is just there, as NumPy's do; with weights
    that differ, they are the values themselves."""
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        return None
    if weights is None or np.all(weights == weights[0]):
        mean, found = float(numbers.mean()), np.percentile(numbers, PERCENTS)
        p50, p90, p99 = (float(number) for number in np.percentile(numbers, (50, 90, 99)))
    else:
        order = np.argsort(numbers)
        up_to, sorted_numbers = np.cumsum(weights[order]), numbers[order]
        mean = float(np.average(numbers, weights=weights))

        def at(percents: Sequence[float]) -> Numbers:
            places = np.searchsorted(up_to, np.asarray(percents) / 100 * up_to[-1] * (1 - 1e-12))
            values: Numbers = sorted_numbers[np.minimum(places, len(sorted_numbers) - 1)]
            return values

        found = at(PERCENTS)
        p50, p90, p99 = (float(number) for number in at((50, 90, 99)))
    return Spread(mean, p50, p90, p99, [float(f"{number:.5g}") for number in found])


def _gaps(good: Sequence[Exchange]) -> tuple[Numbers, Numbers, Numbers]:
    """Seconds between tokens, how many tokens each of these stands for, and seconds between events."""
    itl: list[float] = []
    weights: list[float] = []
    gaps: list[float] = []
    for one in good:
        each = one.tokens_per_event
        between = [later - earlier for earlier, later in pairwise(one.event_s)]
        gaps += between
        itl += [gap / each for gap in between]
        weights += [each] * len(between)
    return np.array(itl), np.array(weights), np.array(gaps)


def _keeps(one: Exchange, goodput: Mapping[str, float]) -> bool:
    took = {"ttft": one.ttft_s, "tpot": one.tpot_s, "e2el": one.ended_s - one.sent_s}
    return all((seconds := took[name]) is None or seconds <= most for name, most in goodput.items())


def _counted_by(good: Sequence[Exchange]) -> str:
    if all(one.usage_tokens is not None for one in good):
        return "usage"
    return "tokenizer" if all(one.usage_tokens is not None or one.text_tokens is not None for one in good) else "events"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
