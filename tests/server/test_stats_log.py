"""The line of the log that says how the engine stands: while requests run, and never else."""

from __future__ import annotations

import asyncio
import logging

import pytest

from ingle.channel import EngineStats
from ingle.server.models import ModelPool, ServedModel
from ingle.server.stats_log import Seen, line, log_stats

from .fakes import MODEL, ScriptedEngine, until

pytestmark = pytest.mark.anyio


async def test_it_is_told_while_requests_run_and_not_else(
    model: ServedModel, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.stats")
    pool = ModelPool()
    telling = asyncio.create_task(log_stats(pool, 0.005))
    await asyncio.sleep(0.05)  # the model is being loaded
    pool.add(model)
    await asyncio.sleep(0.05)
    assert not caplog.messages
    engine.stats = EngineStats(num_running=2, num_waiting=1, num_pages=10, num_used_pages=4, num_steps=9,
                               num_prompt_tokens=10**6)  # fmt: skip
    await until(lambda: len(caplog.messages) > 1, within_s=5.0)
    engine.stats = EngineStats(num_running=3)  # of another engine
    await until(lambda: "3 running" in caplog.messages[-1], within_s=5.0)
    assert not any("-" in message for message in caplog.messages), "nothing is counted down"
    assert caplog.messages[0].startswith(f"requests of {MODEL}: 2 running, 1 waiting, ")
    assert caplog.messages[0].endswith("KV cache 40 % used")
    engine.stats = EngineStats()
    await asyncio.sleep(0.02)
    count = len(caplog.messages)
    await asyncio.sleep(0.05)
    assert len(caplog.messages) == count
    telling.cancel()


def test_its_figures_are_of_the_time_since_the_last(model: ServedModel) -> None:
    before = Seen(100.0, 1000, EngineStats(num_prompt_tokens=500, num_queried_tokens=600, num_hit_tokens=100))
    now = Seen(
        110.0, 1500,
        EngineStats(num_running=3, num_prompt_tokens=2500, num_queried_tokens=3600, num_hit_tokens=1100, num_pages=8),
    )  # fmt: skip
    assert line(model, before, now) == (
        f"requests of {MODEL}: 3 running, 0 waiting, 200 prompt and 50 generated tokens/s, 33 % of prompts cached, "
        "KV cache 0 % used"
    )
