from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from ingle.server.streaming import EventStream, merge, unless_disconnected

pytestmark = pytest.mark.anyio


class Source:
    """Counts up for ever, or until it fails; knows whether it was closed."""

    def __init__(self, fail_at: int | None = None, pause_s: float = 0.0) -> None:
        self.fail_at = fail_at
        self.pause_s = pause_s
        self.closed = False

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            count = 0
            while count != self.fail_at:
                await asyncio.sleep(self.pause_s)
                yield count
                count += 1
            raise ValueError("source failed")
        finally:
            self.closed = True


async def finite(*items: int) -> AsyncGenerator[int, None]:
    for item in items:
        yield item


async def hang() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def gone() -> Message:
    return {"type": "http.disconnect"}


async def test_merge_keeps_the_order_within_a_source() -> None:
    merged = [item async for item in merge([finite(*range(0, 50)), finite(*range(100, 150)), finite()])]
    assert [item for item in merged if item < 100] == list(range(0, 50))
    assert [item for item in merged if item >= 100] == list(range(100, 150))


@pytest.mark.parametrize("count", [1, 3])
async def test_closing_a_merge_closes_every_source(count: int) -> None:
    sources = [Source() for _ in range(count)]
    async with aclosing(merge([source.items() for source in sources])) as merged:
        seen = 0
        async for _ in merged:
            seen += 1
            if seen == 20:
                break
    assert all(source.closed for source in sources)


async def test_a_failing_source_ends_the_merge_and_the_others() -> None:
    sources = [Source(), Source(fail_at=3), Source(pause_s=60.0)]
    with pytest.raises(ValueError, match="source failed"):
        async for _ in merge([source.items() for source in sources]):
            pass
    assert all(source.closed for source in sources)


async def test_a_slow_reader_holds_the_sources_back() -> None:
    produced = 0

    async def eager() -> AsyncGenerator[int, None]:
        nonlocal produced
        while True:
            produced += 1
            yield produced

    async with aclosing(merge([eager(), eager()])) as merged:
        await anext(merged)
        await asyncio.sleep(0.01)
        assert produced < 10


async def test_work_is_cancelled_on_disconnect() -> None:
    source = Source(pause_s=60.0)

    async def work() -> None:
        async with aclosing(source.items()) as items:
            await anext(items)

    with pytest.raises(ClientDisconnect):
        await unless_disconnected(work(), gone)
    assert source.closed


async def test_results_and_errors_of_work_come_through() -> None:
    assert await unless_disconnected(asyncio.sleep(0, "done"), hang) == "done"
    with pytest.raises(ValueError, match="source failed"):
        await unless_disconnected(anext(Source(fail_at=0).items()), hang)


async def test_a_blocked_send_does_not_keep_the_generator_open() -> None:
    source = Source()

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(source.items()) as items:
            async for item in items:
                yield b"%d" % item

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await hang()

    async def receive() -> Message:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        await EventStream(chunks(), ended=lambda: None)({"type": "http"}, receive, send)
    assert source.closed
