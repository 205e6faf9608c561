"""What waits, and how much of it may: bodies that are being read, and requests that have no token yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ingle.errors import RequestError
from ingle.request import EngineRequest


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
        if self._memory.num_bytes + num_bytes > self._memory.max_bytes:
            raise RequestError(
                f"The server is reading bodies of {self._memory.max_bytes} bytes already: send this one again later.",
                code="server_busy",
                status=503,
            )
        self._memory.num_bytes += num_bytes
        self.num_bytes += num_bytes


class RequestQueue:
    """Counts requests from when they are taken until their first token. Beyond its bounds, requests get 429."""

    def __init__(self, max_requests: int = 4096, max_tokens: int = 4_194_304) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._waiting: dict[str, int] = {}
        self._num_tokens = 0

    @property
    def num_requests(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Of their prompts."""
        return self._num_tokens

    def enter(self, requests: Sequence[EngineRequest]) -> None:
        """Raises `RequestError` (429) unless nothing else waits or these fit behind what does."""
        num_requests = len(self._waiting) + len(requests)
        num_tokens = self._num_tokens + sum(len(request.prompt_token_ids) for request in requests)
        if self._waiting and (num_requests > self._max_requests or num_tokens > self._max_tokens):
            raise RequestError(
                f"Too much waits already: {len(self._waiting)} requests with {self._num_tokens} prompt tokens, and at "
                f"most {self._max_requests} and {self._max_tokens} may. Send this one again later.",
                code="queue_full",
                status=429,
            )
        self._waiting |= {request.id: len(request.prompt_token_ids) for request in requests}
        self._num_tokens = num_tokens

    def leave(self, request_id: str) -> None:
        """The request has a token, or has ended. Does nothing for one that left before."""
        self._num_tokens -= self._waiting.pop(request_id, 0)
