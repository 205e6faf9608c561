"""One level: so many requests at once, or so many a second, until all sessions were held."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from ingle.bench.serving.api import Dialect, answer, get
from ingle.bench.serving.connection import AnswerBroken, Client, ServerGone
from ingle.bench.serving.data import Message, Session
from ingle.bench.serving.figures import Exchange
from ingle.bench.serving.options import Level
from ingle.bench.serving.tokens import Counter

_WITHOUT_ANSWER = 8
"""After so many errors without one answer, a level is given up."""


class Stopped(Exception):
    """A level was cut short; its message says why."""


class LevelRun:
    """What is under way, for who shows it."""

    def __init__(self, client: Client, dialect: Dialect, *, counter: Counter | None, think_time_s: float) -> None:
        self.exchanges: list[Exchange] = []
        self.num_running = 0
        self._client, self._dialect = client, dialect
        self._counter, self._think_time_s = counter, think_time_s
        self._num_answered = self._num_failed = 0

    async def run(self, level: Level, sessions: Sequence[Session], seed: str) -> None:
        """Raises `Stopped` when the server is gone, and when nothing but errors comes."""
        work = self._at_rate if level.rate is not None else self._at_once
        try:
            await work(level, sessions, random.Random(seed))
            if self._num_failed:
                await get(self._client, self._client.address.path("models"))
        except ServerGone as error:
            raise Stopped(str(error)) from None
        except (AnswerBroken, TimeoutError):
            return  # it is there, whatever it says

    async def _at_once(self, level: Level, sessions: Sequence[Session], rng: random.Random) -> None:
        assert level.concurrency is not None
        left = iter(enumerate(sessions))

        async def one_after_the_other() -> None:
            for index, session in left:
                await self._hold(index, session)

        await _all(one_after_the_other() for _ in range(min(level.concurrency, len(sessions))))

    async def _at_rate(self, level: Level, sessions: Sequence[Session], rng: random.Random) -> None:
        """Each begins when its time has come, whether others have ended or not."""
        assert level.rate is not None
        free = None if level.concurrency is None else asyncio.Semaphore(level.concurrency)
        due, begun_s = 0.0, time.perf_counter()

        async def at(due_s: float, index: int, session: Session) -> None:
            await asyncio.sleep(max(begun_s + due_s - time.perf_counter(), 0))
            if free is None:
                await self._hold(index, session)
            else:
                async with free:
                    await self._hold(index, session)

        arrivals = []
        for index, session in enumerate(sessions):
            arrivals.append(at(due, index, session))
            due += rng.expovariate(level.rate)
        await _all(arrivals)

    async def _hold(self, index: int, session: Session) -> None:
        """A session's turns, each with what the server said before."""
        history: list[Message] = []
        several = len(session.turns) > 1
        for number, turn in enumerate(session.turns):
            if number and self._think_time_s:
                await asyncio.sleep(self._think_time_s)
            history += turn.messages
            exchange = Exchange(index, number, time.perf_counter(), turn.max_tokens)
            self.exchanges.append(exchange)
            self.num_running += 1
            keep_text = several or (self._counter is not None and not self._dialect.include_usage)
            try:
                text = await answer(self._client, self._dialect, history, exchange, keep_text=keep_text)
            finally:
                self.num_running -= 1
            self._judge(exchange)
            if exchange.error is not None:
                return
            if exchange.usage_tokens is None and self._counter is not None and keep_text:
                exchange.text_tokens = await self._counter(text)
            history.append({"role": "assistant", "content": text})

    def _judge(self, exchange: Exchange) -> None:
        if exchange.error is None:
            self._num_answered += 1
            return
        self._num_failed += 1
        if not self._num_answered and self._num_failed >= _WITHOUT_ANSWER:
            raise Stopped(f"the first {self._num_failed} requests of a level all failed: {exchange.error}")


T = TypeVar("T")


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Raises `Stopped` once `stop` is set, with all of `work` ended."""
    task, told = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((task, told), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Stopped("stopped by a signal")
        return task.result()
    finally:
        await _cancel(task, told)


async def _all(work: Iterable[Awaitable[None]]) -> None:
    """Ends the others when one raises."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        await _cancel(*tasks)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
