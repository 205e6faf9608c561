"""One line for each request, for people and for programs; what a request says is told only to who asks for it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from ingle.config.access import ApiKey
from ingle.request import EngineRequest
from ingle.server.logs import BackgroundLog, formatter
from ingle.server.observers import Observers
from ingle.server.request_log import RequestRecord, RequestsLog, Trace

from .fakes import MODEL, ScriptedEngine

pytestmark = pytest.mark.anyio
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
MakeClient = Callable[..., httpx.AsyncClient]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The log so far, as JSON."""
    caplog.set_level(logging.INFO)
    shape = formatter("json")
    return lambda: [json.loads(shape.format(record)) for record in caplog.records if record.name.startswith("ingle")]


def record_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    [found] = [line for line in lines if line["logger"] == "ingle.access"]
    return found


async def test_a_completion_as_json(
    client: httpx.AsyncClient, engine: ScriptedEngine, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    engine.num_cached_tokens = lambda request: 3
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 4, "n": 2, "temperature": 0.5}
    headers = {"X-Request-Id": "mine-1", "traceparent": f"00-{TRACE}-{SPAN}-01"}
    answer = (await client.post("/v1/completions", json=body, headers=headers)).json()
    line = record_of(lines())
    assert line["time"].endswith("Z") and line["level"] == "info"
    wanted = {
        "id": "mine-1", "trace_id": TRACE, "parent_id": SPAN, "method": "POST", "path": "/v1/completions",
        "route": "/v1/completions", "status": 200, "address": "127.0.0.1", "model": MODEL, "answer_id": answer["id"],
        "streamed": False, "num_choices": 2, "prompt_tokens": 5, "cached_tokens": 3, "output_tokens": 8,
        "max_tokens": 4, "temperature": 0.5, "top_p": 1.0, "finish_reasons": ["length"], "aborted": False,
    }  # fmt: skip
    assert {name: line[name] for name in wanted} == wanted
    assert 0 < line["ttft_s"] <= line["duration_s"]
    assert line.keys() - wanted.keys() == {"time", "level", "logger", "ttft_s", "duration_s"}
    assert all(request.id.startswith(line["answer_id"]) for request in engine.requests), "the engine's log names those"


@pytest.mark.parametrize("stream", [True, False])
async def test_as_text_it_is_one_readable_line(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.access")
    await client.get("/v1/models", headers={"X-Request-Id": "r0"})
    body = {"prompt": "Once", "max_tokens": 4, "stream": stream}
    await client.post("/v1/completions", json=body, headers={"X-Request-Id": "r1"})
    plain, told = caplog.messages
    assert plain.endswith("ms r0")
    before, _, after = told.partition(" ms r1 ")
    assert before.startswith('127.0.0.1 "POST /v1/completions" 200 ')
    assert after.startswith("5 + 4 tokens, first after ") and after.endswith(" ms, length")


async def test_probes_that_find_all_well_are_no_noise(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.access")
    for path in ("/health", "/ping", "/metrics"):
        await client.get(path)
    assert not caplog.messages
    engine.status.ok = False
    await client.get("/health")
    [line] = caplog.messages
    assert '"GET /health" 503' in line


async def test_who_asks_is_named_by_the_key(make_client: MakeClient, lines: Callable[[], list[dict[str, Any]]]) -> None:
    client = make_client(api_keys=(ApiKey("k", "alice"),))
    await client.get("/v1/models", headers={"Authorization": "Bearer k"})
    line = record_of(lines())
    assert line["client"] == "alice"
    record = RequestRecord("r", "GET", "/", address="::1", client="alice")
    assert record.line().startswith('::1 alice "GET /" ')


async def test_a_failure_and_its_log_share_the_id(
    client: httpx.AsyncClient, engine: ScriptedEngine, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    def broken(request: EngineRequest) -> list[int]:
        raise ZeroDivisionError("private detail")

    engine.reply = broken
    await client.post("/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "r9"})
    error, access = [line for line in lines() if line.get("id") == "r9"]
    assert error["level"] == "error" and "ZeroDivisionError: private detail" in error["exception"]
    assert (access["status"], access["finish_reasons"]) == (500, ["error"])


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True), (f"00-{TRACE}-{SPAN}-00", False), (f"01-{TRACE}-{SPAN}-03-more", True),
        (f"  00-{TRACE}-{SPAN}-01 ", True),
    ],
)  # fmt: skip
def test_a_trace_of_the_caller(given: str, sampled: bool) -> None:
    assert Trace.of(Headers({"traceparent": given})) == Trace(TRACE, SPAN, sampled)


@pytest.mark.parametrize(
    "given",
    [
        "", "00", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{TRACE}-{SPAN}-0g",
        f"00-{TRACE}\n-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-{'x' * 300}",
    ],
)  # fmt: skip
def test_what_is_no_trace_is_none(given: str) -> None:
    assert Trace.of(Headers(raw=[(b"traceparent", given.encode())])) is None


def test_two_traces_are_none() -> None:
    one = (b"traceparent", f"00-{TRACE}-{SPAN}-01".encode())
    assert Trace.of(Headers(raw=[one, one])) is None


async def test_what_requests_say_is_written_nowhere_unless_asked(
    client: httpx.AsyncClient, make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = {"prompt": "my secret", "max_tokens": 1}
    await client.post("/v1/completions", json=body)
    await client.post("/v1/completions", json={**body, "max_tokens": -1})
    assert "my secret" not in caplog.text
    asked = make_client(observers=Observers(requests=RequestsLog(1000)))
    await asked.post("/v1/completions", json=body, headers={"X-Request-Id": "r1"})
    assert 'request r1 for /v1/completions: {"prompt":"my secret","max_tokens":1}' in caplog.text
    await asked.post("/tokenize", json={"prompt": "also secret"})
    assert "also secret" in caplog.text


async def test_of_a_long_request_only_the_beginning_is_written(
    make_client: MakeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client = make_client(observers=Observers(requests=RequestsLog(40)))
    content = json.dumps({"prompt": "你\n\x1b" * 10_000}, ensure_ascii=False).encode()
    await client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    [line] = [record.getMessage() for record in caplog.records if record.name == "ingle.requests"]
    assert len(line) < 300 and line.endswith(f"({len(content)} bytes)") and "\n" not in line and "\x1b" not in line


async def test_of_a_long_path_only_the_beginning_is_written(
    client: httpx.AsyncClient, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """Who has no key may send one, as often as he likes."""
    await client.get("/v1/" + "é" * 10_000)
    path = record_of(lines())["path"]
    assert path.startswith("/v1/%C3%A9") and len(path) == 512


def test_every_line_of_json_is_one_line_and_whole() -> None:
    shape = formatter("json")
    for text in ("one\ntwo", 'a "quote"', "half \ud83d", "你好", "\x1b[31m"):
        made = shape.format(logging.LogRecord("ingle", logging.WARNING, __file__, 1, "%s", (text,), None))
        assert "\n" not in made and "\x1b" not in made
        assert json.loads(made)["message"] == text.encode(errors="backslashreplace").decode()


@pytest.fixture
def full_disk() -> Iterator[int]:
    try:
        fd = os.open("/dev/full", os.O_WRONLY)
    except OSError:
        pytest.skip("this system has no /dev/full")
    yield fd
    os.close(fd)


async def test_a_log_on_a_full_disk_stops_no_answer(client: httpx.AsyncClient, full_disk: int) -> None:
    handler, logger = BackgroundLog(full_disk), logging.getLogger("ingle")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for _ in range(20):
            assert (await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})).status_code == 200
        handler.flush()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
