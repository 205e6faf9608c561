"""Several engines of one model, as one: each request goes to one of them."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager

import msgspec

from ingle.channel import EngineInfo, EngineStats, TierStats
from ingle.config import EngineConfig, parse_bytes
from ingle.config.health import HealthConfig
from ingle.errors import AnswerLost, ConfigError, EngineError, IngleError, ModelError, Refusals
from ingle.request import EngineOutput, EngineRequest
from ingle.server.engine_client import (
    MOST_ENGINES,
    EngineClient,
    HealthStatus,
    NotBegun,
    Report,
    for_the_log,
    in_background,
)
from ingle.server.engine_process import StartedEngine
from ingle.server.routing import Routed, Router

SAME_S = 5.0
"""For the first replica to say that it refuses the same as another."""
logger = logging.getLogger("ingle.server")


class ReplicaSet:
    """What `EngineClient` is for one engine, for several of them. Use `connect`, then `generate`.

    One that dies is started anew while the others serve. The set has ended when all of them have.
    """

    def __init__(self, engines: Sequence[EngineClient], router: Router, seed: int = 0) -> None:
        """`seed`: of the draws of requests that bring none."""
        self.engines = tuple(engines)
        self.closed = asyncio.Event()
        self._router = router
        self._seeds = random.Random(seed)
        for index, engine in enumerate(self.engines):
            engine.lost = lambda index=index: self._lost(index)  # type: ignore[misc]
            engine.others_serve = lambda own=engine: self._serve_beside(own)  # type: ignore[misc]
        self._watcher = asyncio.create_task(self._watch())

    @classmethod
    async def connect(
        cls,
        processes: Sequence[StartedEngine],
        config: EngineConfig,
        report: Report = lambda stage: None,
        checked: Callable[[], None] = lambda: None,
        health: HealthConfig = HealthConfig(watchdog=False),  # noqa: B008 (frozen)
        stream_interval: int = 1,
    ) -> ReplicaSet:
        """As `EngineClient.connect`, of all of them at the same time. `config`: of the whole.

        What one refuses is raised in its name, unless all of them do.
        """
        names = [f"replica {index}" for index in range(len(processes))]
        starting = _Starting(names, report, checked)

        async def one(index: int) -> EngineClient:
            told, found = (lambda stage: starting.report(index, stage)), (lambda: starting.checked(index))
            engine = await EngineClient.connect(processes[index], told, found, health, stream_interval, names[index])
            starting.ready(index)
            return engine

        tasks = [asyncio.create_task(one(index)) for index in range(len(processes))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            failed = [index for index, task in enumerate(tasks) if task.done() and task.exception() is not None]
            if failed and 0 not in failed:
                await asyncio.wait(tasks[:1], timeout=SAME_S)
            for index, task in enumerate(tasks):
                if task.done() and (error := task.exception()) is not None:
                    raise named(error, names[index]) if index else error
            engines = [task.result() for task in tasks]
        except BaseException:
            await _give_up(tasks)
            raise
        return cls(engines, Router([kept_tokens(config, engine.info) for engine in engines]), config.seed)

    # ---- requests

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """As `EngineClient.generate`, by the replica that has done with it soonest. What one of them loses before it
        began with it, another serves."""
        if request.sampling.seed is None:  # two engines that drew by their own might draw the same
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(63))
            request = msgspec.structs.replace(request, sampling=sampling)
        for num_engines in range(1, MOST_ENGINES + 1):
            with self._routed(request) as routed:
                engine = self.engines[routed.replica]
                try:
                    async with aclosing(engine.generate(request, num_engines)) as outputs:
                        async for output in outputs:
                            self._router.took(routed, output)
                            yield output
                    return
                except NotBegun as error:
                    why = error.what
        raise AnswerLost(why)  # not reached: an engine says so itself of a request that it is the last to have

    @contextmanager
    def _routed(self, request: EngineRequest) -> Iterator[Routed]:
        routed = self._router.route(request, self._takers(), background=in_background.get() or request.priority > 0)
        lost = False
        try:
            yield routed
        except EngineError:
            lost = True
            raise
        finally:
            self._router.end(routed, lost=lost)

    def _takers(self) -> list[int]:
        """Those that are well, or at least take requests. Raises `EngineError` where none does."""
        takers = [index for index, engine in enumerate(self.engines) if engine.refusal() is None]
        if not takers:
            health = self.health()
            raise EngineError(health.detail, retry_after_s=health.retry_after_s)
        return [index for index in takers if self.engines[index].health().ok] or takers

    def _serve_beside(self, own: EngineClient) -> bool:
        return any(each is not own and each.health().ok for each in self.engines)

    def _lost(self, index: int) -> None:
        if not self.engines[index].info.prompt_cache:  # else the next engine finds there what this one had
            self._router.forget(index)

    # ---- how they are

    def health(self) -> HealthStatus:
        """Well as long as one is; the others are named."""
        states = [engine.health() for engine in self.engines]
        unwell = [state.detail for state in states if not state.ok]
        if len(unwell) == len(states):
            return min(states, key=lambda state: float("inf") if state.retry_after_s is None else state.retry_after_s)
        stats = self.stats
        detail = f"{stats.num_running} requests running, {stats.num_waiting} waiting, {len(states)} replicas"
        if unwell:
            detail = "; ".join([f"{detail}, {len(unwell)} of them out of service", *unwell])
        return HealthStatus(True, detail, "degraded" if unwell else "ok")

    @property
    def info(self) -> EngineInfo:
        """Of all together: what they have adds up, and a request may be as long as each of them takes."""
        return combined_info([engine.info for engine in self.engines])

    @property
    def stats(self) -> EngineStats:
        return combined_stats([engine.stats for engine in self.engines])

    @property
    def num_restarts(self) -> int:
        return sum(engine.num_restarts for engine in self.engines)

    @property
    def failure(self) -> str | None:
        """Why the set has ended."""
        failures = [engine.failure for engine in self.engines]
        return None if None in failures else "; ".join(dict.fromkeys(filter(None, failures)))

    @property
    def stopping(self) -> bool:
        return all(engine.stopping for engine in self.engines)

    @stopping.setter
    def stopping(self, value: bool) -> None:
        for engine in self.engines:
            engine.stopping = value

    @property
    def max_unread_bytes(self) -> int:
        return self.engines[0].max_unread_bytes

    @max_unread_bytes.setter
    def max_unread_bytes(self, value: int) -> None:
        for engine in self.engines:
            engine.max_unread_bytes = value

    # ---- their end

    async def _watch(self) -> None:
        async def told(engine: EngineClient) -> None:
            await engine.closed.wait()
            if engine.failure is not None and self.failure is None:
                logger.error("%s; the others go on", for_the_log(engine.failure))

        await asyncio.gather(*map(told, self.engines))
        self.closed.set()

    def give_up(self, reason: str) -> None:
        """As `EngineClient.give_up`."""
        for engine in self.engines:
            engine.give_up(reason)

    async def close(self) -> None:
        """Ends all of them, at the same time."""
        self._watcher.cancel()
        for engine in self.engines:
            engine.end()
        await asyncio.gather(*(engine.close() for engine in self.engines))


ServedEngine = EngineClient | ReplicaSet
"""What tokens of a model come from."""


class _Starting:
    """What is told of several starts at once: of the first that is not ready, as if it were alone."""

    def __init__(self, names: Sequence[str], report: Report, checked: Callable[[], None]) -> None:
        self._names = names
        self._stages = dict.fromkeys(range(len(names)), "")
        """Of those that are not ready."""
        self._unchecked = set(range(len(names)))
        self._report, self._checked = report, checked

    def report(self, index: int, stage: str) -> None:
        self._stages[index] = stage
        if index == next(iter(self._stages)):
            self._report(stage if index == 0 else f"{self._names[index]}: {stage}")

    def checked(self, index: int) -> None:
        self._unchecked.discard(index)
        if not self._unchecked:
            self._checked()

    def ready(self, index: int) -> None:
        was_told = index == next(iter(self._stages))
        del self._stages[index]
        if was_told and self._stages and (stage := self._stages[first := next(iter(self._stages))]):
            self.report(first, stage)


def named(error: BaseException, name: str) -> BaseException:
    """In the words of one replica."""
    if isinstance(error, Refusals):
        return Refusals([each for inner in error.errors if isinstance(each := named(inner, name), IngleError)])
    if isinstance(error, ConfigError | ModelError):
        return type(error)(f"{name}: {error.what}", alternative=error.alternative)
    if isinstance(error, EngineError):
        return EngineError(f"{name}: {error}")
    return error


async def _give_up(tasks: Sequence[asyncio.Task[EngineClient]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and task.exception() is None:
            await task.result().close()


def kept_tokens(config: EngineConfig, info: EngineInfo) -> int:
    """Tokens of which a replica keeps keys and values."""
    if not config.cache.enable_prefix_caching:
        return 0
    tokens = info.num_pages * info.page_size
    if config.cache.host_cache is not None and info.kv_cache_bytes:
        num_bytes = parse_bytes("--host-cache", config.cache.host_cache) / config.parallel.data_parallel_size
        tokens += int(tokens * num_bytes / info.kv_cache_bytes)
    return tokens


def combined_info(infos: Sequence[EngineInfo]) -> EngineInfo:
    first = infos[0]
    devices = list(dict.fromkeys(info.device for info in infos))
    return msgspec.structs.replace(
        first,
        max_model_len=min(info.max_model_len for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        num_pages=sum(info.num_pages for info in infos),
        weight_bytes=sum(info.weight_bytes for info in infos),
        kv_cache_bytes=sum(info.kv_cache_bytes for info in infos),
        device=f"{len(infos)} replicas, {'each ' if len(devices) == 1 else ''}on {' and '.join(devices)}",
        notices=list(dict.fromkeys(notice for info in infos for notice in info.notices)),
        timings_s=max((info.timings_s for info in infos), key=lambda timings: sum(timings.values())),
    )


def combined_stats(each: Sequence[EngineStats]) -> EngineStats:
    """Counts add up."""
    sums = {
        name: sum(getattr(stats, name) for stats in each)
        for name in EngineStats.__struct_fields__
        if name not in ("step_tokens", "tiers")
    }
    steps = tuple(map(sum, zip(*(stats.step_tokens for stats in each), strict=True)))
    names = dict.fromkeys(tier.name for stats in each for tier in stats.tiers)
    return EngineStats(**sums, step_tokens=steps, tiers=tuple(_combined_tier(name, each) for name in names))


def _combined_tier(name: str, each: Sequence[EngineStats]) -> TierStats:
    tiers = [tier for stats in each for tier in stats.tiers if tier.name == name]
    count = {
        field: sum(getattr(tier, field) for tier in tiers) for field in TierStats.__struct_fields__ if field != "name"
    }
    return TierStats(name, **count)
