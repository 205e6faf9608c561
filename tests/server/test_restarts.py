"""An engine that dies or is stuck, and the next one: what becomes of requests, and what is said of health."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from ingle.channel import Beat, Begun, Channel, Failed, Progress, Stage, StepMessage
from ingle.config import HealthConfig
from ingle.errors import AnswerLost, EngineError
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.server import pulse as pulse_module
from ingle.server.batch import lines
from ingle.server.engine_client import EngineClient
from ingle.server.models import ServedModel
from ingle.server.restarts import Restarts
from tests.test_facts import info as engine_info

from .fakes import MODEL, app_for, assert_error, client_of, until

pytestmark = pytest.mark.anyio
WITHIN_S = 10.0


class Engines:
    """In place of `EngineProcess`: the test speaks for each engine at the other end of its channel."""

    pid = os.getpid()  # of a process that lives
    waits_elsewhere = False

    def __init__(self) -> None:
        self.num_started = 0
        self.has_ended = False
        self.refused = ""
        """Why the next has nothing to load."""
        self._begin()

    def _begin(self) -> None:
        self.num_started += 1
        self.socket, self._theirs = socket.socketpair()
        self.channel = Channel(self._theirs)
        self.has_ended = False

    def start_anew(self) -> None:
        self._begin()
        if self.refused:
            self.channel.send(Failed(self.refused, expected=True))
            self.kill()

    def ready(self) -> None:
        self.channel.send(msgspec.structs.replace(engine_info({}), timings_s={"weights": 2.5}))

    def kill(self) -> None:
        self.has_ended = True
        self._theirs.close()

    stop = kill

    def exit_text(self) -> str:
        return "killed by SIGKILL"

    def beat(self, stage: Stage, seconds: float = 0.0) -> None:
        self.channel.send(Beat(stage, seconds))

    def step(self, *outputs: EngineOutput) -> None:
        self.channel.send(StepMessage(list(outputs)))

    async def asked(self) -> list[str]:
        """Ids of the requests that come next."""
        found: list[str] = []

        def some() -> bool:
            found.extend(each.id for each in self.channel.receive(wait=False) if isinstance(each, EngineRequest))
            return bool(found)

        await until(some, WITHIN_S)
        return found


WATCHED = HealthConfig(watchdog_timeout=5.0, max_engine_restarts=2, engine_restart_window=600.0)


@asynccontextmanager
async def connected(health: HealthConfig = WATCHED) -> AsyncIterator[tuple[EngineClient, Engines]]:
    engines = Engines()
    engines.ready()
    client = await EngineClient.connect(engines, health=health)  # type: ignore[arg-type]
    try:
        yield client, engines
    finally:
        await client.close()


def request(name: str) -> EngineRequest:
    return EngineRequest(name, [1], SamplingParams())


async def answer(client: EngineClient, name: str) -> list[int]:
    return [token async for output in client.generate(request(name)) for token in output.token_ids]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ingle.server.pulse", "ingle.server.engine_client"):
        monkeypatch.setattr(f"{name}.TICK_S", 0.02)


async def test_what_was_begun_is_lost_and_what_waits_is_served_by_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (client, engines):
        answers = {name: asyncio.create_task(answer(client, name)) for name in ("told", "admitted", "waits")}
        asked: list[str] = []
        while len(asked) < 3:
            asked += await engines.asked()
        engines.step(EngineOutput("told", [5]))
        engines.channel.send(Begun(["admitted"]))
        await until(lambda: client._pending["admitted"].begun, WITHIN_S)
        engines.kill()
        for name in ("told", "admitted"):
            with pytest.raises(AnswerLost, match=r"engine died: killed by SIGKILL.* send the request again") as lost:
                await answers[name]
            assert lost.value.retry_after_s == 4
        await until(lambda: engines.num_started == 2, WITHIN_S)
        engines.channel.send(Progress("reading weights: 40 %"))
        await until(lambda: "40 %" in client.health().detail, WITHIN_S)
        health = client.health()
        assert (health.ok, health.status, health.retry_after_s) == (False, "restarting", 4)
        with pytest.raises(EngineError, match="the engine is started anew: reading weights: 40 %") as refused:
            await answer(client, "new")
        assert refused.value.retry_after_s == 4 and not isinstance(refused.value, AnswerLost)
        engines.ready()
        assert await engines.asked() == ["waits"]
        engines.step(EngineOutput("waits", [7], "stop"))
        assert await answers["waits"] == [7]
        assert client.health().ok and client.num_restarts == 1
        assert "a new one is started (1 of 2 in a row)" in caplog.text


async def test_an_answer_that_was_whole_is_none_that_is_lost() -> None:
    async with connected() as (client, engines):
        stream = client.generate(request("whole"))
        first = asyncio.create_task(anext(stream))
        await engines.asked()
        engines.step(EngineOutput("whole", [5]))
        assert (await first).token_ids == [5]
        engines.step(EngineOutput("whole", [6], "stop"))
        engines.kill()
        await until(lambda: engines.num_started == 2, WITHIN_S)
        assert [output.token_ids async for output in stream] == [[6]]


async def test_one_that_is_lost_is_not_handed_on_although_its_client_has_not_read_that_yet() -> None:
    async with connected() as (client, engines):
        stream = client.generate(request("slow"))
        first = asyncio.create_task(anext(stream))
        await engines.asked()
        waits = asyncio.create_task(answer(client, "waits"))
        await engines.asked()
        engines.step(EngineOutput("slow", [5]))
        await first
        engines.kill()
        await until(lambda: engines.num_started == 2, WITHIN_S)
        engines.ready()
        assert await engines.asked() == ["waits"]
        with pytest.raises(AnswerLost):
            await anext(stream)
        waits.cancel()


async def test_what_two_engines_die_of_before_they_begin_is_given_up() -> None:
    async with connected() as (client, engines):
        poison = asyncio.create_task(answer(client, "poison"))
        for number in (2, 3):
            assert await engines.asked() == ["poison"]
            engines.kill()
            await until(lambda number=number: engines.num_started == number, WITHIN_S)  # type: ignore[misc]
            engines.ready()
        with pytest.raises(AnswerLost):
            await poison
        await until(lambda: client.health().ok, WITHIN_S)


async def test_a_request_whose_client_left_meanwhile_is_not_served() -> None:
    async with connected() as (client, engines):
        leaves, stays = (asyncio.create_task(answer(client, name)) for name in ("leaves", "stays"))
        await engines.asked()
        engines.kill()
        await until(lambda: engines.num_started == 2, WITHIN_S)
        leaves.cancel()
        await asyncio.wait({leaves})
        engines.ready()
        assert await engines.asked() == ["stays"]
        engines.step(EngineOutput("stays", [1], "stop"))
        assert await stays == [1]


async def test_too_many_in_a_row_end_it_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingle.server.restarts._MAX_DELAY_S", 0.01)
    async with connected() as (client, engines):
        waits = asyncio.create_task(answer(client, "waits"))
        await engines.asked()
        engines.refused = "the file is gone"
        engines.kill()
        await asyncio.wait_for(client.closed.wait(), WITHIN_S)
        assert engines.num_started == 3
        assert client.failure == (
            "the engine could not be started anew: the file is gone. 3 engines in a row have ended, so the server ends "
            "too"
        )
        with pytest.raises(EngineError, match="the file is gone") as error:
            await waits
        assert error.value.retry_after_s is None and not client.health().ok


async def test_a_traceback_of_the_next_is_for_the_log_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ingle.server.restarts._MAX_DELAY_S", 0.01)
    async with connected() as (client, engines):
        engines.refused = "Traceback:\n  File /srv/secret.py\nValueError"
        engines.kill()
        await asyncio.wait_for(client.closed.wait(), WITHIN_S)
        assert client.failure is not None and "the server's log has the reason" in client.failure
        assert "/srv/secret.py" in caplog.text and "secret" not in client.health().detail
        assert "server's log" not in caplog.text


@pytest.mark.parametrize("loading", [True, False])
async def test_one_that_cannot_be_killed_is_not_waited_for_for_ever(
    loading: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ingle.server.restarts._MAX_DELAY_S", 0.01)
    monkeypatch.setattr("ingle.server.engine_client.KILLED_S", 0.1)
    gone = pulse_module.Unwell("no sign of life for 10 s", hopeless=True)
    engines = Engines()
    if not loading:
        engines.ready()
    with monkeypatch.context() as patch:
        patch.setattr(engines, "kill", lambda: None)
        starting = asyncio.create_task(EngineClient.connect(engines, health=WATCHED))  # type: ignore[arg-type]
        if loading:
            patch.setattr(pulse_module.Pulse, "unwell", lambda self: gone)
            with pytest.raises(EngineError, match="stuck while it was loading"):
                await asyncio.wait_for(starting, WITHIN_S)
            return
        client = await starting
        patch.setattr(pulse_module.Pulse, "unwell", lambda self: gone)
        await asyncio.wait_for(client.closed.wait(), WITHIN_S)
        assert client.failure is not None and "does not end, although it was killed" in client.failure
        assert engines.num_started == 1 and "the engine was stuck and was ended" in caplog.text
    await client.close()


async def test_without_the_watchdog_the_first_is_the_last() -> None:
    async with connected(replace(WATCHED, watchdog=False)) as (client, engines):
        waits = asyncio.create_task(answer(client, "waits"))
        await engines.asked()
        engines.kill()
        await asyncio.wait_for(client.closed.wait(), WITHIN_S)
        assert client.failure == "the engine died: killed by SIGKILL" and engines.num_started == 1
        with pytest.raises(EngineError):
            await waits


@pytest.mark.parametrize("stage", ["stepping", "capturing"])
async def test_a_loop_that_hangs_is_ended(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async with connected() as (client, engines):
        engines.beat(stage, 4.0)
        await until(lambda: client._pulse._beat is not None, WITHIN_S)
        assert client.health().ok, "a long step is none that hangs"
        engines.beat(stage, 6.0)
        await until(lambda: engines.num_started == 2, WITHIN_S)
        assert "the engine is stuck: no step ended, nor a part of one, for 6 s; it is ended" in caplog.text
        engines.ready()
        await until(lambda: client.health().ok, WITHIN_S)


async def test_a_stuck_one_is_only_told_of_without_the_watchdog() -> None:
    async with connected(replace(WATCHED, watchdog=False)) as (client, engines):
        engines.beat("stepping", 6.0)
        await until(lambda: not client.health().ok, WITHIN_S)
        assert "the engine does not get on: no step ended" in client.health().detail
        engines.beat("stepping", 0.0)
        await until(lambda: client.health().ok, WITHIN_S)
        assert engines.num_started == 1


async def test_an_idle_engine_is_well_however_long_and_one_that_lost_requests_is_not() -> None:
    async with connected() as (client, engines):
        engines.beat("waiting", 4000.0)
        waits = asyncio.create_task(answer(client, "waits"))
        await engines.asked()
        await asyncio.sleep(0.1)
        assert client.health().ok
        client._pulse._pending_s = 5.0
        await until(lambda: engines.num_started == 2, WITHIN_S)
        engines.ready()
        assert await engines.asked() == ["waits"]
        waits.cancel()


async def test_a_stopping_server_starts_no_engine() -> None:
    async with connected() as (client, engines):
        client.stopping = True
        assert client.health().status == "stopping"
        engines.kill()
        await asyncio.wait_for(client.closed.wait(), WITHIN_S)
        assert engines.num_started == 1


async def test_one_that_is_stuck_while_it_loads_is_an_error() -> None:
    engines = Engines()
    engines.beat("loading")
    starting = asyncio.create_task(EngineClient.connect(engines, health=WATCHED))  # type: ignore[arg-type]
    gone = pulse_module.Unwell("its process is stopped", hopeless=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pulse_module.Pulse, "unwell", lambda self: gone)
        with pytest.raises(EngineError, match="stuck while it was loading, and was ended: its process is stopped"):
            await starting


def test_the_delay_grows_and_an_engine_that_ran_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now_s)
    restarts = Restarts(7, 600.0)
    assert [restarts.next_delay_s() for _ in range(8)] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, None]
    now_s = 5000.0
    assert restarts.next_delay_s() is None, "none has been ready since"
    restarts.ready()
    now_s += 599.0
    assert restarts.next_delay_s() is None
    restarts.ready()
    now_s += 600.0
    assert restarts.next_delay_s() == 0.0


async def test_lines_of_batches_are_asked_again_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "BUSY_S", 0.0)
    line = lines.Line("1", "/v1/completions", msgspec.Raw(b"{}"))
    done = lines._told(line, "a", 200, b"{}")

    async def answered(*outcomes: Any) -> Any:
        left = list(outcomes)

        async def answer(*_: Any) -> Any:
            if isinstance(outcome := left.pop(0), Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(lines, "answer", answer)
        return await lines.answer_patiently(None, {}, line)  # type: ignore[arg-type]

    restarting, lost = EngineError("anew", retry_after_s=1), AnswerLost("died", retry_after_s=1)
    assert await answered(*[restarting] * 5, lost, restarting, lost, done) == done
    given_up = await answered(lost, lost, restarting, lost)
    assert given_up.response.status_code == 503 and b"died" in bytes(given_up.response.body)
    with pytest.raises(EngineError, match="gone"):
        await answered(EngineError("gone"))


# ---- what clients see


async def test_each_protocol_says_that_an_answer_is_lost(model: ServedModel) -> None:
    async with connected() as (client, engines):
        http = client_of(app_for(model, engine=client, also=()))
        messages = [{"role": "user", "content": "a"}]
        asks: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": "a"},
            "/v1/chat/completions": {"messages": messages},
            "/v1/messages": {"messages": messages, "max_tokens": 9, "model": MODEL},
            "/v1/responses": {"input": "a", "model": MODEL},
        }
        whole = [asyncio.create_task(http.post(path, json=body)) for path, body in asks.items()]
        told = [asyncio.create_task(http.post(path, json=body | {"stream": True})) for path, body in asks.items()]
        ids: list[str] = []
        while len(ids) < 8:
            ids += await engines.asked()
        engines.step(*(EngineOutput(each, [70]) for each in ids))
        await until(lambda: all(pending.begun for pending in client._pending.values()), WITHIN_S)
        engines.kill()
        for task in whole:
            response = await task
            assert "the engine died" in response.text and "send the request again" in response.text
            assert response.status_code in (503, 529) and response.headers["retry-after"] == "4"
        for task, says in zip(
            told, ('data: {"error"', 'data: {"error"', "event: error", "response.failed"), strict=True
        ):
            response = await task
            assert response.status_code == 200 and says in response.text
            assert "the engine died" in response.text and "send the request again" in response.text
        refused = await http.post("/v1/completions", json={"prompt": "a"})
        assert_error(refused, 503, "the engine is started anew")
        assert int(refused.headers["retry-after"]) >= 1


async def test_the_paths_of_health(model: ServedModel) -> None:
    async with connected() as (client, engines):
        http = client_of(app_for(model, engine=client, api_keys=("key",)))

        async def statuses() -> dict[str, int]:
            paths = ("/health", "/ping", "/health/ready", "/health/live")
            return {path: (await http.get(path)).status_code for path in paths}

        assert set((await statuses()).values()) == {200}
        engines.kill()
        await until(lambda: engines.num_started == 2, WITHIN_S)
        assert await statuses() == {"/health": 503, "/ping": 503, "/health/ready": 503, "/health/live": 200}
        ready = await http.get("/health/ready")
        assert ready.json()["status"] == "restarting" and ready.headers["retry-after"] == "4"
        engines.ready()
        await until(lambda: client.health().ok, WITHIN_S)
        assert set((await statuses()).values()) == {200}
