from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Message

from ingle.server.models import ServedModel

from .fakes import ScriptedEngine, app_for, assert_error, events

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("key", ["secret-1", "schlüssel"])
async def test_each_key_opens(make_client: Callable[..., httpx.AsyncClient], key: str) -> None:
    client = make_client(api_keys=("secret-1", "schlüssel"))
    response = await client.get("/v1/models", headers=[(b"Authorization", b"Bearer " + key.encode())])
    assert response.status_code == 200


HOSTS = [
    ("localhost", 200),
    ("LOCALHOST:8000", 200),
    ("localhost.", 200),
    ("127.0.0.1", 200),
    ("[::1]:8000", 200),
    ("[0:0:0:0:0:0:0:1]", 200),
    ("llm.example", 200),
    ("LLM.example.:80", 200),
    ("a.inner.example", 200),
    ("inner.example", 403),
    ("evilinner.example", 403),
    ("evil.example", 403),
    ("llm.example.evil.example", 403),
    ("localhost.evil.example", 403),
    ("10.0.0.1", 403),
    ("", 403),
    ("[::1", 403),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
async def test_host_header(make_client: Callable[..., httpx.AsyncClient], host: str, status: int) -> None:
    client = make_client(allowed_hosts=("llm.example", "*.inner.example"))
    response = await client.get("/v1/models", headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        assert_error(response, 403, host, "--allowed-hosts")


@pytest.mark.parametrize("bound", ["127.0.0.2", "192.168.7.7", "::1", "fd00::7"])
async def test_the_address_that_a_request_came_in_on_is_allowed(model: ServedModel, bound: str) -> None:
    literal = f"[{bound}]" if ":" in bound else bound
    hosts = [(literal, 200), (f"{literal}:8000", 200), ("evil.example", 403), ("10.1.1.1", 403), (None, 200)]
    app = app_for(model, allowed_hosts=("localhost",))
    for host, status in hosts:
        headers = [] if host is None else [(b"host", host.encode())]
        scope = {"type": "http", "method": "GET", "path": "/version", "headers": headers, "server": (bound, 8000)}
        sent = await answers_of(app, scope)
        assert sent[0]["status"] == status, host


async def test_each_of_several_hosts_is_checked(model: ServedModel) -> None:
    headers = [(b"host", b"localhost"), (b"host", b"evil.example")]
    scope = {"type": "http", "method": "GET", "path": "/version", "headers": headers, "server": ("127.0.0.1", 8000)}
    [start, *_] = await answers_of(app_for(model, allowed_hosts=("localhost",)), scope)
    assert start["status"] == 403


async def answers_of(app: Starlette, scope: dict[str, Any]) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app({"query_string": b"", "root_path": "", "http_version": "1.0", "scheme": "http", **scope}, receive, send)
    return sent


async def test_options_and_head(client: httpx.AsyncClient) -> None:
    for path, methods in (("/v1/models", {"GET", "HEAD"}), ("/health", {"GET", "HEAD"}), ("/v1/completions", {"POST"})):
        response = await client.options(path)
        assert response.status_code == 204 and response.content == b""
        assert set(response.headers["allow"].split(", ")) == methods | {"OPTIONS"}
    assert_error(await client.options("/nowhere"), 404, "OPTIONS /nowhere")
    for path in ("/v1/models", "/health", "/version"):
        response = await client.head(path)
        assert response.status_code == 200 and response.content == b""
        assert int(response.headers["content-length"]) == len((await client.get(path)).content)


async def test_request_id_is_echoed_if_sane(client: httpx.AsyncClient) -> None:
    sent = {"X-Request-Id": "trace-1.a:b"}
    assert (await client.get("/version", headers=sent)).headers["x-request-id"] == "trace-1.a:b"
    for bad in ("a b", "x" * 129, "\x7f"):
        returned = (await client.get("/nowhere", headers={"X-Request-Id": bad})).headers["x-request-id"]
        assert len(returned) == 32 and returned.isalnum()


async def test_access_log_is_one_line_and_optional(
    make_client: Callable[..., httpx.AsyncClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.access")
    await make_client(access_log=False).get("/version")
    assert caplog.messages == []
    await make_client().get("/v1/models/a%0Ab", headers={"X-Request-Id": "r1"})
    [line] = caplog.messages
    assert '"GET /v1/models/a%0Ab" 404' in line and line.endswith("ms r1")


async def test_what_nobody_foresaw_is_a_500_and_logged(
    client: httpx.AsyncClient, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: object) -> list[int]:
        raise ZeroDivisionError("private detail")

    engine.reply = broken
    for stream in (False, True):
        caplog.clear()
        body = {"prompt": "x", "stream": stream}
        response = await client.post("/v1/completions", json=body, headers={"X-Request-Id": f"id-{stream}"})
        error = events(response)[-1]["error"] if stream else assert_error(response, 500)
        assert error["code"] == "internal_error" and "private" not in error["message"]
        assert "ZeroDivision" not in response.text
        assert response.headers["x-request-id"] in error["message"], "what the client can quote"
        assert f"request id-{stream} failed" in caplog.text and "private detail" in caplog.text
