"""Several engines as one: where requests go when one of them dies, and what is said of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from ingle.channel import Begun, EngineStats, Failed, NothingRefused, Progress, Refused, TierStats
from ingle.config import EngineConfig, HealthConfig
from ingle.errors import AnswerLost, ConfigError, EngineError
from ingle.request import EngineOutput
from ingle.server.metrics import _all, _engines, _processes
from ingle.server.models import ServedModel
from ingle.server.pulse import Unwell
from ingle.server.replicas import ReplicaSet, combined_stats
from ingle.server.stats_log import Seen, line
from tests.test_facts import info as engine_info

from .fakes import app_for, client_of, until
from .test_restarts import WITHIN_S, Engines, answer, quick

__all__ = ["quick"]
pytestmark = pytest.mark.anyio
WATCHED = HealthConfig(watchdog_timeout=5.0, max_engine_restarts=1, engine_restart_window=600.0)
CONFIG = EngineConfig.of("m", data_parallel_size=2)


class Replica(Engines):
    def end(self) -> None:
        pass


@asynccontextmanager
async def connected(count: int = 2, **of_info: Any) -> AsyncIterator[tuple[ReplicaSet, list[Replica]]]:
    replicas = [Replica() for _ in range(count)]
    for each in replicas:
        each.channel.send(msgspec.structs.replace(engine_info({}), timings_s={"weights": 2.5}, **of_info))
    served = await ReplicaSet.connect(replicas, CONFIG, health=WATCHED)  # type: ignore[arg-type]
    try:
        yield served, replicas
    finally:
        await served.close()


async def asked_of(served: ReplicaSet, replicas: list[Replica], *names: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Answers that are waited for, and which replica each is at."""
    answers = {name: asyncio.create_task(answer(served, name)) for name in names}  # type: ignore[arg-type]
    where: dict[str, int] = {}

    def all_are_there() -> bool:
        for index, each in enumerate(replicas):
            for message in each.channel.receive(wait=False):
                where[message.id] = index  # type: ignore[union-attr]
        return len(where) >= len(names)

    await until(all_are_there, WITHIN_S)
    return answers, where


async def test_one_dies_and_the_others_serve_what_it_had_not_begun_with() -> None:
    async with connected() as (served, replicas):
        answers, where = await asked_of(served, replicas, "a", "b", "c", "d")
        assert sorted(where.values()) == [0, 0, 1, 1]
        begun, waits = (name for name in where if where[name] == 1)
        others = [name for name in where if where[name] == 0]
        replicas[1].channel.send(Begun([begun]))
        await until(lambda: served.engines[1]._pending[begun].begun, WITHIN_S)
        replicas[1].kill()
        with pytest.raises(AnswerLost, match=r"replica 1 died: killed by SIGKILL.* send the request again"):
            await answers[begun]
        assert await replicas[0].asked() == [waits]
        health = served.health()
        assert health.ok and health.status == "degraded" and "replica 1 is started anew" in health.detail
        assert "2 replicas, 1 of them out of service" in health.detail and served.failure is None
        for number, name in enumerate((waits, *others)):
            replicas[0].step(EngineOutput(name, [number], "stop"))
        assert [await answers[name] for name in (waits, *others)] == [[0], [1], [2]]
        later = asyncio.create_task(answer(served, "later"))  # type: ignore[arg-type]
        assert await replicas[0].asked() == ["later"], "who is well gets it"
        await until(lambda: replicas[1].num_started == 2, WITHIN_S)
        replicas[1].ready()
        await until(lambda: served.health().status == "ok", WITHIN_S)
        next_one = asyncio.create_task(answer(served, "next"))  # type: ignore[arg-type]
        assert await replicas[1].asked() == ["next"] and served.num_restarts == 1
        replicas[0].step(EngineOutput("later", [5], "stop"))
        replicas[1].step(EngineOutput("next", [6], "stop"))
        assert (await later, await next_one) == ([5], [6])


async def test_what_waits_for_one_that_is_unwell_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected() as (served, replicas):
        answers, where = await asked_of(served, replicas, "a", "b", "c", "d")
        begun, waits = (name for name in where if where[name] == 1)
        replicas[1].channel.send(Begun([begun]))
        await until(lambda: served.engines[1]._pending[begun].begun, WITHIN_S)
        with monkeypatch.context() as patch:
            patch.setattr(served.engines[1]._pulse, "unwell", lambda: Unwell("it is stopped", hopeless=False))
            assert await replicas[0].asked() == [waits]
            assert "replica 1 does not get on: it is stopped" in served.health().detail and served.health().ok
        assert [message.id for message in replicas[1].channel.receive(wait=True)] == [waits]  # type: ignore[union-attr]
        replicas[1].step(EngineOutput(begun, [5], "stop"))
        assert await answers[begun] == [5], "it got well"
        for name in [name for name in answers if name != begun]:
            replicas[0].step(EngineOutput(name, [6], "stop"))
            assert await answers[name] == [6]


async def test_what_two_replicas_died_of_is_given_up() -> None:
    async with connected(3) as (served, replicas):
        answers, where = await asked_of(served, replicas, "bad")
        replicas[where["bad"]].kill()
        second = 1 if where["bad"] == 0 else 0
        assert await replicas[second].asked() == ["bad"]
        replicas[second].kill()
        with pytest.raises(AnswerLost, match=f"replica {second} died"):
            await answers["bad"]


async def test_the_set_ends_with_the_last_of_them(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (served, replicas):
        for each in replicas:
            each.refused = "out of memory"
        replicas[1].kill()
        await until(lambda: "it is given up" in caplog.text, WITHIN_S)
        assert served.health().ok and not served.closed.is_set() and served.failure is None
        assert "replica 1 could not be started anew: out of memory" in served.health().detail
        assert "it is given up; the others go on" in caplog.text
        answers, _where = await asked_of(served, replicas[:1], "a")
        replicas[0].kill()
        with pytest.raises(EngineError):
            await answers["a"]
        await asyncio.wait_for(served.closed.wait(), WITHIN_S)
        assert "the server ends too" in str(served.failure) and not served.health().ok
        with pytest.raises(EngineError, match="could not be started anew"):
            await answer(served, "b")  # type: ignore[arg-type]


async def test_while_all_are_started_anew_requests_are_refused_with_when_to_come_again() -> None:
    async with connected() as (served, replicas):
        for each in replicas:
            each.kill()
        await until(lambda: all(each.num_started == 2 for each in replicas), WITHIN_S)
        health = served.health()
        assert not health.ok and health.status == "restarting" and health.retry_after_s
        with pytest.raises(EngineError, match="is started anew") as refused:
            await answer(served, "a")  # type: ignore[arg-type]
        assert refused.value.retry_after_s


async def test_a_request_draws_the_same_whoever_serves_it() -> None:
    """By a seed of its own: engines that chose one each might choose the same."""
    async with connected() as (served, replicas):
        tasks = [asyncio.create_task(answer(served, str(number))) for number in range(8)]  # type: ignore[arg-type]
        seeds: set[int | None] = set()

        def asked() -> bool:
            for each in replicas:
                seeds.update(message.sampling.seed for message in each.channel.receive(wait=False))  # type: ignore
            return len(seeds) == 8

        await until(asked, WITHIN_S)
        assert None not in seeds
        served.give_up("the end")
        for task in tasks:
            with pytest.raises(EngineError, match="the end"):
                await task


async def test_what_one_of_them_refuses_is_said_in_its_name() -> None:
    refused = Failed("no", expected=True, errors=[Refused("too little memory", "take less", True)])
    for who, words in (((1,), "replica 1: too little memory; take less"), ((0, 1), "too little memory; take less")):
        replicas = [Replica(), Replica()]
        for index in who:
            replicas[index].channel.send(refused)
        if 0 not in who:
            replicas[0].ready()
        with pytest.raises(ConfigError) as error:
            await ReplicaSet.connect(replicas, CONFIG)  # type: ignore[arg-type]
        assert str(error.value) == words


async def test_starts_are_told_as_one() -> None:
    told: list[str] = []
    checked = asyncio.Event()
    replicas = [Replica(), Replica()]
    for each in replicas:
        each.channel.send(NothingRefused())
        each.channel.send(Progress("reading"))
    starting = asyncio.create_task(
        ReplicaSet.connect(replicas, CONFIG, told.append, checked.set)  # type: ignore[arg-type]
    )
    await asyncio.wait_for(checked.wait(), WITHIN_S)
    replicas[1].channel.send(Progress("loading"))
    replicas[0].ready()
    replicas[1].ready()
    served = await asyncio.wait_for(starting, WITHIN_S)
    await served.close()
    assert told[0] == "reading" and set(told[1:]) <= {"replica 1: reading", "replica 1: loading"}


async def test_what_is_told_of_several_adds_up(model: ServedModel) -> None:
    async with connected(max_model_len=100) as (served, _replicas):
        one = engine_info({})
        both = served.info
        assert both.device == f"2 replicas, each on {one.device}" and both.max_num_seqs == 2 * one.max_num_seqs
        assert both.weight_bytes == 2 * one.weight_bytes and both.max_model_len == 100
        served.engines[0].stats = EngineStats(num_running=3, num_steps=5, num_pages=10, num_used_pages=5)
        served.engines[1].stats = EngineStats(num_running=4, num_waiting=2, num_pages=10, num_used_pages=10)
        assert served.stats.num_running == 7 and served.stats.num_steps == 5
        served_model = replace(model, engine=served)
        told = line(served_model, Seen(0.0, 0, EngineStats()), Seen(1, 0, served.stats))
        assert "7 running (3 + 4), 2 waiting" in told
        async with client_of(app_for(served_model)) as client:
            text = (await client.get("/metrics")).text
            health = await client.get("/health/ready")
        for engine, running, usage in ((0, 3, 0.5), (1, 4, 1.0)):
            labels = f'{{engine="{engine}",model_name="{model.name}"}}'
            assert f"vllm:num_requests_running{labels} {running:.1f}" in text
            assert f"vllm:kv_cache_usage_perc{labels} {usage}" in text and f"ingle_engine_up{labels} 1.0" in text
        assert f'vllm:prompt_tokens_total{{engine="all",model_name="{model.name}"}} 0.0' in text
        assert 'ingle_resident_memory_bytes{process="engine 1"}' in text
        assert health.status_code == 200 and health.json()["detail"].startswith("7 requests running, 2 waiting")


def test_one_engine_is_named_as_ever(model: ServedModel) -> None:
    assert _all(model) == "0" and [labels for labels, _ in _engines([model])] == [(model.name, "0")]
    assert [name for name, _ in _processes([model])] == ["engine"]


def test_tiers_add_up_by_their_names() -> None:
    host, disk = TierStats("host", 5, 1, 2, 0), TierStats("disk", 7, 1, 1, 1)
    both = combined_stats([EngineStats(tiers=(host, disk)), EngineStats(tiers=(host,)), EngineStats()])
    assert both.tiers == (TierStats("host", 10, 2, 4, 0), disk)
