"""What a server has done since its start, and how long it took: values that a page may show, as JSON or for Prometheus.

All of it is counted as it happens, in the event loop: some tenths of a microsecond for each output of the engine.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Sequence
from types import TracebackType

import msgspec

from ingle.request import EngineOutput, EngineRequest
from ingle.server.request_log import RequestRecord, current_record

_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_HTTP_S = (0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 30.0, 120.0)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
"""Bounds as vLLM has them, for dashboards that ask for one, and of our own below."""

REASONS = ("stop", "length", "abort", "error")
"""Why requests end: by themselves, at their limit, because their client left, or because they failed."""
_LAG_TICK_S = 0.1
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class Histogram(msgspec.Struct):
    bounds: tuple[float, ...]
    counts: list[int]
    """Of values up to each of the bounds, and of those beyond the last."""
    total: float = 0.0
    """Of all values."""

    @classmethod
    def of(cls, bounds: Sequence[float]) -> Histogram:
        return cls(tuple(bounds), [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _histogram(bounds: Sequence[float]) -> Histogram:
    histogram: Histogram = msgspec.field(default_factory=lambda: Histogram.of(bounds))
    return histogram


class ModelStatistics(msgspec.Struct):
    """Of one model's requests to its engine: a choice of a prompt is one."""

    num_prompt_tokens: int = 0
    """Of prompts whose first token is there."""
    num_cached_tokens: int = 0
    """Of these, the ones that the prefix cache had."""
    num_generated_tokens: int = 0
    finished: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    first_token_s: Histogram = _histogram(_FIRST_TOKEN_S)
    """From the arrival of the HTTP request."""
    next_output_s: Histogram = _histogram(_TOKEN_S)
    """Between two outputs of one request, which mostly are of one token each."""
    per_token_s: Histogram = _histogram(_TOKEN_S)
    """Of finished requests, the mean time of a token after the first."""
    whole_s: Histogram = _histogram(_REQUEST_S)
    """From the arrival of the HTTP request to the last token."""
    queue_s: Histogram = _histogram(_REQUEST_S)
    """In the engine, until the first step."""
    prefill_s: Histogram = _histogram(_REQUEST_S)
    """From the first step to the first token."""
    decode_s: Histogram = _histogram(_REQUEST_S)
    """From the first token to the last."""
    running_s: Histogram = _histogram(_REQUEST_S)
    """From the first step to the last token."""
    prompt_tokens: Histogram = _histogram(_TOKENS)
    computed_tokens: Histogram = _histogram(_TOKENS)
    """Of prompts, without those that the prefix cache had."""
    generated_tokens: Histogram = _histogram(_TOKENS)
    longest_choice_tokens: Histogram = _histogram(_TOKENS)
    """Of a prompt's choices."""
    max_tokens: Histogram = _histogram(_TOKENS)
    """That requests may generate, cut to what the context leaves."""
    num_choices: Histogram = _histogram(_CHOICES)


class ClientStatistics(msgspec.Struct):
    """Of what came with one client's key."""

    num_requests: int = 0
    """HTTP requests that asked a model for something."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Of these."""
    num_generated_tokens: int = 0

    def add(self, record: RequestRecord) -> None:
        self.num_requests += bool(record.model)
        self.num_prompt_tokens += record.prompt_tokens or 0
        self.num_cached_tokens += record.cached_tokens or 0
        self.num_generated_tokens += record.output_tokens or 0


class ServerStatistics(msgspec.Struct):
    """Of the process that answers HTTP."""

    started: float = msgspec.field(default_factory=time.time)
    """Unix seconds."""
    in_flight: int = 0
    """HTTP requests whose answers are not all out."""
    responses: dict[str, dict[str, dict[int, int]]] = {}
    """How many there were, by route, method and status. No path has one that the application has not."""
    response_s: dict[str, dict[str, Histogram]] = {}
    """From request to the end of the answer, by route and method."""
    loop_lag_s: Histogram = _histogram(_LAG_S)
    """How much later than asked the event loop came to what it had to do."""
    clients: dict[str, ClientStatistics] = {}
    """By the names of their keys, where they have some."""

    def answered(self, record: RequestRecord) -> None:
        if record.client:
            self.clients.setdefault(record.client, ClientStatistics()).add(record)
        method = record.method if record.method in _METHODS else "other"
        by_status = self.responses.setdefault(record.route, {}).setdefault(method, {})
        by_status[record.status] = by_status.get(record.status, 0) + 1
        by_method = self.response_s.setdefault(record.route, {})
        if (histogram := by_method.get(method)) is None:
            histogram = by_method[method] = Histogram.of(_HTTP_S)
        histogram.observe(record.duration_s)

    async def watch_loop(self) -> None:
        """Measures how late the event loop is, until cancelled."""
        while True:
            due_s = time.perf_counter() + _LAG_TICK_S
            await asyncio.sleep(_LAG_TICK_S)
            self.loop_lag_s.observe(max(time.perf_counter() - due_s, 0.0))


class Choices:
    """One prompt's choices, each a request to the engine: what is counted of them once, or together."""

    def __init__(self, statistics: ModelStatistics, count: int) -> None:
        self._statistics = statistics
        self._num_left = count
        self._longest = 0
        self.begun = False
        statistics.num_choices.observe(count)

    def end(self, num_tokens: int) -> None:
        self._num_left -= 1
        self._longest = max(self._longest, num_tokens)
        if not self._num_left:
            self._statistics.longest_choice_tokens.observe(self._longest)


class Measured:
    """One request to the engine, from its arrival until its end: a context that counts it, whatever that end is."""

    def __init__(self, statistics: ModelStatistics, request: EngineRequest, choices: Choices | None = None) -> None:
        self.reason: str | None = None
        """What ended it, set as soon as it is known."""
        self._statistics = statistics
        self._choices = choices
        self._record = current_record.get()
        self._max_tokens = request.sampling.max_tokens
        self._num_prompt_tokens = len(request.prompt_token_ids)
        self._num_cached_tokens = self._num_tokens = 0
        self._queued_s: float | None = None
        self._first_s: float | None = None
        self._sent_s = self._last_s = time.perf_counter()
        self._arrived_s = self._sent_s if self._record is None else self._record.started_s
        self._counts_prompt = choices is None or not choices.begun
        """Later choices of a prompt find it in the cache: that saved their client nothing."""
        if choices is not None:
            choices.begun = True
        if self._record is not None and self._counts_prompt:
            self._record.prompt_tokens = (self._record.prompt_tokens or 0) + self._num_prompt_tokens

    def took(self, output: EngineOutput, reason: str | None) -> None:
        """What the engine gave, and why all has ended with it, if so."""
        self.reason = reason
        if output.queued_s is not None:
            self._queued_s = output.queued_s
        if output.num_prompt_read is not None or output.finish_reason == "error":
            return
        now_s, num_tokens = time.perf_counter(), len(output.token_ids)
        if self._first_s is None:
            self._begin(output, now_s)
        else:
            self._statistics.next_output_s.observe(now_s - self._last_s)
        self._last_s = now_s
        self._num_tokens += num_tokens
        self._statistics.num_generated_tokens += num_tokens

    def _begin(self, output: EngineOutput, now_s: float) -> None:
        self._first_s = now_s
        self._num_cached_tokens = output.num_cached_tokens
        statistics, record = self._statistics, self._record
        statistics.num_prompt_tokens += self._num_prompt_tokens
        statistics.num_cached_tokens += output.num_cached_tokens
        if output.token_ids:
            statistics.first_token_s.observe(now_s - self._arrived_s)
        if record is not None:
            first_s = now_s if output.token_ids else None
            record.begun(first_s, output.num_cached_tokens if self._counts_prompt else 0, self._queued_s)

    def __enter__(self) -> Measured:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.reason is None:  # a generator that is closed, or a task that is cancelled: nobody waits any more
            self.reason = "error" if error is None or isinstance(error, Exception) else "abort"
        statistics, reason = self._statistics, self.reason if self.reason in REASONS else "stop"
        statistics.finished[reason] += 1
        statistics.whole_s.observe(time.perf_counter() - self._arrived_s)
        statistics.prompt_tokens.observe(self._num_prompt_tokens)
        statistics.generated_tokens.observe(self._num_tokens)
        if self._max_tokens is not None:
            statistics.max_tokens.observe(self._max_tokens)
        if self._first_s is not None:
            self._end(self._first_s)
        if self._choices is not None:
            self._choices.end(self._num_tokens)
        if self._record is not None:
            self._record.ended(self.reason, self._num_tokens)

    def _end(self, first_s: float) -> None:
        """Of a request that has a token."""
        statistics, queued_s = self._statistics, self._queued_s or 0.0
        decode_s, prefill_s = self._last_s - first_s, max(first_s - self._sent_s - queued_s, 0.0)
        statistics.queue_s.observe(queued_s)
        statistics.prefill_s.observe(prefill_s)
        statistics.decode_s.observe(decode_s)
        statistics.running_s.observe(prefill_s + decode_s)
        statistics.computed_tokens.observe(self._num_prompt_tokens - self._num_cached_tokens)
        statistics.per_token_s.observe(decode_s / (self._num_tokens - 1) if self._num_tokens > 1 else 0.0)
