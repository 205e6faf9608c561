"""What ends a request from outside: its deadline, and the memory of all when that gives out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from starlette.requests import Request

from ingle.errors import RequestError
from ingle.limits import LimitsConfig
from ingle.server.engine_client import in_background

if TYPE_CHECKING:
    from typing_extensions import Self

_CLIENTS_HEADERS = ("x-stainless-read-timeout", "x-stainless-timeout")
"""In which OpenAI's and Anthropic's clients say, in seconds, after which silence they go away."""
_MAX_S = 7 * 86_400.0


class Ending:
    """Ends what the task does that is inside of it, with an error. Tasks of one request may be one after the other."""

    def __init__(self) -> None:
        self.error: RequestError | None = None
        self._task: asyncio.Task[object] | None = None

    def end(self, error: RequestError) -> None:
        """From another task, or a timer. What comes after the first changes nothing."""
        if self.error is None:
            self.error = error
            if self._task is not None:
                self._task.cancel()

    def __enter__(self) -> Self:
        """Raises the error where it has ended already."""
        if self.error is not None:
            raise self.error
        self._task = asyncio.current_task()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self.error is None or kind is not asyncio.CancelledError:
            return
        left = task.uncancel() if task is not None and hasattr(task, "uncancel") else 0  # from Python 3.11 on
        if not left:  # else the client has gone too
            raise self.error from None


class Deadline:
    """When a request has to be answered, if at all: as it says itself, its client, or the server."""

    def __init__(self, request: Request, limits: LimitsConfig, ending: Ending) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived_s = self._loop.time()
        self._ending = ending
        self._timer: asyncio.TimerHandle | None = None
        self._waits: Callable[[], bool] | None = None
        default = None if in_background.get() else limits.request_timeout
        self._seconds, self._said_by = default, limits.by("request_timeout")
        self._client_s = _seconds_in(request)
        self._arm()

    def ask(self, timeout_s: float | None, *, streamed: bool, waits: Callable[[], bool]) -> None:
        """What the body says. `waits` tells whether the request is still without its first token.

        A client waits for so long between two pieces of a stream, but for all of a plain answer.
        """
        asked = [each for each in (timeout_s, None if streamed else self._client_s) if each is not None]
        if asked and (self._seconds is None or min(asked) < self._seconds):
            self._seconds, self._said_by = min(asked), ""
        self._waits = waits
        self._arm()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        self.close()
        if self._seconds is not None:
            self._timer = self._loop.call_at(self._arrived_s + self._seconds, self._end)

    def _end(self) -> None:
        if self._waits is None:
            where = "before it was read"
        else:
            where = "while it waited for its first token" if self._waits() else "before its answer was whole"
        self._ending.end(
            RequestError(
                f"The request's timeout of {self._seconds:g} s ran out {where}{self._said_by}.",
                code="request_timeout",
                status=504,
                headers={"X-Should-Retry": "false"},  # whoever set the time has no more of it
            )
        )


def _seconds_in(request: Request) -> float | None:
    """What the client says of itself. What is no number says nothing."""
    for name in _CLIENTS_HEADERS:
        try:
            seconds = float(request.headers.get(name, ""))
        except ValueError:
            continue
        if 0 < seconds <= _MAX_S:
            return seconds
    return None


class AnswersMemory:
    """Bytes of all requests that are being answered. When it gives out, the largest is ended."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._accounts: set[AnswerAccount] = set()

    def account(self, ending: Ending) -> AnswerAccount:
        account = AnswerAccount(self, ending)
        self._accounts.add(account)
        return account

    def add(self, account: AnswerAccount, num_bytes: int) -> None:
        """Raises `RequestError` where it is the largest itself: 503, or 400 if it has more than half of all."""
        if account not in self._accounts:
            return  # it has been ended, and ends soon
        account.num_bytes += num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            largest = max(self._accounts, key=lambda each: each.num_bytes)
            alone = largest.num_bytes > self.max_bytes // 2
            error = RequestError(
                f"This request has come to {largest.num_bytes} bytes, the most of all that are being answered, which "
                f"may have {self.max_bytes} together (--max-answers-bytes): ask for less at once"
                + ("." if alone else ", or again later."),
                code="answer_too_large" if alone else "server_busy",
                status=400 if alone else 503,
            )
            self.leave(largest)
            if largest is account:
                raise error
            largest.ending.end(error)

    def leave(self, account: AnswerAccount) -> None:
        if account in self._accounts:
            self._accounts.discard(account)
            self.num_bytes -= account.num_bytes


class AnswerAccount:
    """What one request takes."""

    def __init__(self, memory: AnswersMemory, ending: Ending) -> None:
        self.num_bytes = 0
        self.ending = ending
        self._memory = memory

    def add(self, num_bytes: int) -> None:
        """Raises `RequestError` (503)."""
        self._memory.add(self, num_bytes)

    def close(self) -> None:
        self._memory.leave(self)
