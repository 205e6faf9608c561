"""A line of the log every ten seconds while requests run: how fast the engine is, and how full."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, replace

from ingle.channel import EngineStats
from ingle.server.models import ModelPool, ServedModel

logger = logging.getLogger("ingle.stats")

EVERY_S = 10.0


@dataclass(frozen=True)
class Seen:
    """What there was at a moment."""

    at_s: float
    num_generated_tokens: int
    stats: EngineStats


async def log_stats(pool: ModelPool, every_s: float = EVERY_S) -> None:
    """Until cancelled. A request that comes and goes between two looks, as when one person chats, is told by its own
    line alone."""
    seen: dict[str, Seen] = {}
    while True:
        await asyncio.sleep(every_s)
        for model in pool.models:
            now = Seen(time.monotonic(), model.statistics.num_generated_tokens, model.engine.stats)
            before = seen.get(model.name, Seen(now.at_s - every_s, 0, EngineStats()))
            if now.stats.num_steps < before.stats.num_steps:  # another engine, which counts anew
                before = replace(before, stats=EngineStats())
            seen[model.name] = now
            if now.stats.num_running or now.stats.num_waiting:
                logger.info("%s", line(model, before, now))


def line(model: ServedModel, before: Seen, now: Seen) -> str:
    seconds, stats = now.at_s - before.at_s, now.stats
    read = max(stats.num_prompt_tokens - before.stats.num_prompt_tokens, 0) / seconds
    generated = (now.num_generated_tokens - before.num_generated_tokens) / seconds
    queried = stats.num_queried_tokens - before.stats.num_queried_tokens
    hit = stats.num_hit_tokens + stats.num_lower_hit_tokens
    hit -= before.stats.num_hit_tokens + before.stats.num_lower_hit_tokens
    cached = f", {100 * hit / queried:.0f} % of prompts cached" if queried > 0 <= hit else ""
    used = 100 * stats.num_used_pages / max(stats.num_pages, 1)
    each = model.engine.engines
    by_replica = f" ({' + '.join(str(engine.stats.num_running) for engine in each)})" if len(each) > 1 else ""
    return (
        f"requests of {model.name}: {stats.num_running} running{by_replica}, {stats.num_waiting} waiting, "
        f"{read:.0f} prompt and {generated:.0f} generated tokens/s{cached}, KV cache {used:.0f} % used"
    )
