"""Answers many lines, some at a time, and lets whoever waits for an answer go first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_LOOK_S = 0.02
"""Between two looks whether others wait."""


async def spread(
    items: Iterator[T],
    work: Callable[[T], Coroutine[Any, Any, R]],
    most: int,
    *,
    may_start: Callable[[], bool] = lambda: True,
    ended: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[R, None]:
    """Results as they come, of up to `most` items at once. Closing it cancels those that run.

    None starts while `may_start` says no, and none any more once `ended` does; what has started is finished.
    """
    running: set[asyncio.Task[R]] = set()
    left = True
    try:
        while left or running:
            while left and len(running) < most and may_start():
                item = None if ended() else await asyncio.to_thread(next, items, None)
                if item is None:
                    left = False
                else:
                    running.add(asyncio.ensure_future(work(item)))
            if not running:
                if left:
                    left = not ended()
                    await asyncio.sleep(_LOOK_S)
                continue
            wait_s = _LOOK_S if left and len(running) < most else None
            done, running = await asyncio.wait(running, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                yield task.result()
    finally:
        for task in running:
            task.cancel()
        for task in running:
            with suppress(asyncio.CancelledError, Exception):
                await task
