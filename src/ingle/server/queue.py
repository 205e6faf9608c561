"""What waits, and how much of it may: bodies that are being read, and requests that have no token yet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ingle.errors import RequestError
from ingle.request import EngineRequest

_HALF_LIFE_S = 30.0
"""Of what is remembered of the speed, in seconds in which somebody waited."""
_MAX_RETRY_S = 600
_UNKNOWN_RETRY_S = 5


class BodyMemory:
    """Bytes of all bodies that are being read or turned into requests."""

    def __init__(self, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0

    @contextmanager
    def account(self) -> Iterator[BodyAccount]:
        """For one body; what was added to it is given back at the end."""
        account = BodyAccount(self)
        try:
            yield account
        finally:
            self.num_bytes -= account.num_bytes


class BodyAccount:
    def __init__(self, memory: BodyMemory) -> None:
        self.num_bytes = 0
        self._memory = memory

    def add(self, num_bytes: int) -> None:
        """Raises `RequestError` (503) when all bodies together are too large now."""
        memory = self._memory
        if memory.num_bytes + num_bytes > memory.max_bytes:
            raise RequestError(
                f"The server is reading bodies of {memory.num_bytes} bytes already, at most {memory.max_bytes} are "
                "taken (--max-bodies-bytes): send this one again later.",
                code="server_busy",
                status=503,
            )
        memory.num_bytes += num_bytes
        self.num_bytes += num_bytes


class Speed:
    """How fast requests get their first token while some wait: requests and prompt tokens a second."""

    def __init__(self) -> None:
        self._busy_s = self._requests = self._tokens = 0.0

    def pass_by(self, seconds: float) -> None:
        """In which somebody waited."""
        kept = 0.5 ** (seconds / _HALF_LIFE_S)
        self._requests, self._tokens = self._requests * kept, self._tokens * kept
        self._busy_s = self._busy_s * kept + (1 - kept) * _HALF_LIFE_S / math.log(2)  # as much fades of the time

    def served(self, num_tokens: int) -> None:
        self._requests += 1
        self._tokens += num_tokens

    @property
    def known(self) -> bool:
        """Whether anybody was served of late."""
        return self._requests >= 0.25 and self._busy_s > 0

    @property
    def requests_per_s(self) -> float:
        return self._requests / self._busy_s

    @property
    def tokens_per_s(self) -> float:
        return self._tokens / self._busy_s

    def seconds(self, num_requests: int, num_tokens: int) -> float:
        """Until so many are served: the mean of what both rates say, as nobody knows which of them binds."""
        by_requests = num_requests / self.requests_per_s
        by_tokens = num_tokens / self.tokens_per_s if self._tokens else by_requests
        return (by_requests + by_tokens) / 2


class RequestQueue:
    """Counts requests from when they are taken until their first token. Beyond its bounds, requests get 429."""

    def __init__(
        self, max_requests: int = 4096, max_tokens: int = 4_194_304, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._clock = clock
        self._waiting: dict[str, int] = {}
        self._num_tokens = 0
        self._speed = Speed()
        self._looked_s = clock()

    @property
    def num_requests(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Of their prompts."""
        return self._num_tokens

    def enter(self, requests: Sequence[EngineRequest]) -> None:
        """Raises `RequestError` (429) unless nothing else waits or these fit behind what does, and 400 for one whose
        choices alone have more prompt tokens than may ever wait."""
        self._look()
        counts = [len(request.prompt_token_ids) for request in requests]
        num_requests, num_tokens = len(self._waiting) + len(requests), self._num_tokens + sum(counts)
        if sum(counts) > max(self._max_tokens, *counts, 0):
            raise RequestError(
                f"the prompts of all choices have {sum(counts)} tokens together, at most {self._max_tokens} are taken "
                "(--max-num-queued-tokens): ask for fewer at once",
                code="too_many_tokens",
            )
        if self._waiting and (num_requests > self._max_requests or num_tokens > self._max_tokens):
            raise self._full(num_requests - self._max_requests, num_tokens - self._max_tokens)
        self._waiting |= dict(zip((request.id for request in requests), counts, strict=True))
        self._num_tokens = num_tokens

    def begun(self, request_id: str) -> None:
        """The request has its first token."""
        if request_id in self._waiting:
            self._look()
            self._speed.served(self._waiting[request_id])
            self.leave(request_id)

    def leave(self, request_id: str) -> None:
        """The request has ended. Does nothing for one that left before."""
        self._look()
        self._num_tokens -= self._waiting.pop(request_id, 0)

    def waits(self, request_id: str) -> bool:
        return request_id in self._waiting

    def expected_s(self) -> float | None:
        """Until one that came now would have its first token; None while nobody knows."""
        self._look()
        if not self._speed.known:
            return None
        return self._speed.seconds(len(self._waiting), self._num_tokens) + 1 / self._speed.requests_per_s

    def _look(self) -> None:
        now_s = self._clock()
        if self._waiting:
            self._speed.pass_by(now_s - self._looked_s)
        self._looked_s = now_s

    def _full(self, num_requests: int, num_tokens: int) -> RequestError:
        """With what must leave before there is room: so many requests, and so many tokens."""
        position, speed, first_s = len(self._waiting) + 1, self._speed, self.expected_s()
        if first_s is None:
            retry_s = float(_UNKNOWN_RETRY_S)
            told = "nobody knows yet how long that takes, as none has got its first token of late"
        else:
            retry_s = max(
                max(num_requests, 0) / speed.requests_per_s,
                max(num_tokens, 0) / speed.tokens_per_s if speed.tokens_per_s else 0.0,
            )
            told = (
                f"it would get its first token in about {first_s:.0f} s, as of late {speed.requests_per_s:.3g} "
                f"requests with {speed.tokens_per_s:.3g} prompt tokens got theirs each second"
            )
        retry_after_s = min(max(math.ceil(retry_s), 1), _MAX_RETRY_S)
        expected = {} if first_s is None else {"X-Ingle-Queue-Seconds": f"{first_s:.0f}"}
        return RequestError(
            f"The queue is full: {len(self._waiting)} requests with {self._num_tokens} prompt tokens wait, at most "
            f"{self._max_requests} (--max-num-queued-reqs) and {self._max_tokens} (--max-num-queued-tokens) may. This "
            f"one would be number {position}; {told}. Send it again in {retry_after_s} s.",
            code="queue_full",
            status=429,
            headers={"Retry-After": str(retry_after_s), "X-Ingle-Queue-Position": str(position), **expected},
        )
