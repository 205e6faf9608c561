"""A short soak in every run of the tests; `make soak` is the long one."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos.soak import MAX_SLOPE_KB, Soak
from tests.chaos.target import Target


def test_some_requests_of_every_kind(standing: Target) -> None:
    soak = Soak(standing, num_requests=300, concurrency=32)
    asyncio.run(soak.run())
    assert not soak.errors, soak.errors[:5]
    assert soak.report()["num_requests"] == sum(soak.counts.values()) == 300
    standing.check()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_requests_leave_no_memory_behind(standing: Target) -> None:
    soak = Soak(standing, num_requests=6000, concurrency=32)
    asyncio.run(soak.run())
    assert not soak.errors, soak.errors[:5]
    standing.check()
    # Of fewer requests, the caches that fill are a larger share than in a long soak.
    assert max(soak.slope_kb("api"), soak.slope_kb("engine")) < 4 * MAX_SLOPE_KB, soak.report()["memory"]
