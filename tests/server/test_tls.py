"""TLS on real connections. The keys of `tests/server/tls` are for this alone, and open nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop
from starlette.applications import Starlette

from ingle.config.access import ListenConfig
from ingle.errors import ConfigError
from ingle.server.graceful import GracefulServer
from ingle.server.http_limits import HttpLimits
from ingle.server.listening import bind
from ingle.server.models import ServedModel
from ingle.server.stopping import Deadline
from ingle.server.tls import Certificate, key_notice

from .fakes import app_for, until

pytestmark = pytest.mark.anyio

FILES = Path(__file__).parent / "tls"


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """uvloop is what the server runs on; asyncio is where what it promises is written."""
    return "asyncio", {"loop_factory": uvloop.new_event_loop} if request.param == "uvloop" else {}


def config(folder: Path = FILES, **changes: Any) -> ListenConfig:
    return ListenConfig(
        **{"ssl_certfile": str(folder / "server.pem"), "ssl_keyfile": str(folder / "server.key"), **changes}
    )


class Unhurried(Deadline):
    def __init__(self) -> None:
        self.grace_s = 5.0

    def start(self, *, serving: bool, code: int) -> None:
        pass


@contextlib.asynccontextmanager
async def secured(app: Starlette, certificate: Certificate, **limits: Any) -> AsyncIterator[tuple[int, GracefulServer]]:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        server = GracefulServer(app, HttpLimits(**limits), Unhurried(), certificate)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        await until(lambda: server.started or serving.done(), within_s=10)
        try:
            yield port, server
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, 30)
    assert server._counted._num_open == 0


def trusting(name: str = "server.pem") -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(FILES / name))


async def test_requests_and_streams(model: ServedModel) -> None:
    async with secured(app_for(model, api_keys=("k",)), Certificate(config())) as (port, _):
        async with httpx.AsyncClient(verify=trusting(), headers={"x-api-key": "k"}, timeout=30) as client:
            url = f"https://localhost:{port}"
            answer = await client.get(f"{url}/v1/models", headers={"x-api-key": ""})
            assert answer.status_code == 401
            body = {"prompt": "x" * 200, "max_tokens": 5, "stream": True}
            answers = await asyncio.gather(*(client.post(f"{url}/v1/completions", json=body) for _ in range(20)))
            assert {each.status_code for each in answers} == {200}
            assert all(each.text.endswith("data: [DONE]\n\n") for each in answers)
        with pytest.raises(httpx.ConnectError):
            async with httpx.AsyncClient() as stranger:
                await stranger.get(f"https://localhost:{port}/health")


async def test_a_request_right_behind_the_handshake(model: ServedModel) -> None:
    async with secured(app_for(model), Certificate(config())) as (port, _):
        context = trusting()
        for _ in range(20):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="localhost")
            writer.write(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP/1.1 200 OK\r\n")
            writer.close()


async def test_an_error_is_read_before_the_connection_ends(model: ServedModel) -> None:
    async with secured(app_for(model), Certificate(config())) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting(), server_hostname="localhost")
        writer.write(b"nonsense\r\n\r\n")
        assert b"400 Bad Request" in await asyncio.wait_for(reader.readline(), 30)
        writer.close()


async def test_who_does_not_shake_hands_is_counted_and_cut_off(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secured(app_for(model), Certificate(config()), max_connections=8) as (port, server):
        monkeypatch.setattr("ingle.server.tls._HANDSHAKE_S", 300.0)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        await until(lambda: server._counted._num_open == 4, within_s=10)
        reader, _ = await asyncio.open_connection("127.0.0.1", port)  # beyond what one address may have
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
        for _, writer in silent:
            writer.close()
        await until(lambda: server._counted._num_open == 0, within_s=10)
        monkeypatch.setattr("ingle.server.tls._HANDSHAKE_S", 0.2)
        reader, _ = await asyncio.open_connection("127.0.0.1", port)
        assert await asyncio.wait_for(reader.read(), 30) == b""
        await until(lambda: server._counted._num_open == 0, within_s=10)
        monkeypatch.setattr("ingle.server.tls._HANDSHAKE_S", 60.0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")  # not TLS
        with contextlib.suppress(ConnectionResetError):
            assert not (await asyncio.wait_for(reader.read(), 30)).startswith(b"HTTP")
        async with httpx.AsyncClient(verify=trusting()) as client:
            assert (await client.get(f"https://localhost:{port}/health")).status_code == 200


async def test_clients_show_a_certificate(model: ServedModel) -> None:
    certificate = Certificate(config(ssl_ca_certs=str(FILES / "client.pem")))
    assert certificate.asks_clients
    async with secured(app_for(model), certificate) as (port, _):
        with pytest.raises(httpx.HTTPError):
            async with httpx.AsyncClient(verify=trusting()) as client:
                await client.get(f"https://localhost:{port}/health")
        context = trusting()
        context.load_cert_chain(FILES / "client.pem", FILES / "client.key")
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"https://localhost:{port}/health")).status_code == 200


async def test_a_certificate_that_is_renewed(
    model: ServedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ingle.server")
    for name in ("server.pem", "server.key"):
        shutil.copy(FILES / name, tmp_path)
    certificate = Certificate(config(tmp_path))
    async with secured(app_for(model), certificate) as (port, _):

        async def works_with(name: str) -> bool:
            try:
                async with httpx.AsyncClient(verify=trusting(name)) as client:
                    return (await client.get(f"https://localhost:{port}/health")).status_code == 200
            except httpx.ConnectError:
                return False

        assert await works_with("server.pem") and not await works_with("renewed.pem")
        certificate.files.refresh()
        assert caplog.messages == []
        shutil.copy(FILES / "renewed.pem", tmp_path / "server.pem")  # half of the change: the key is still the old one
        certificate.files.refresh()
        assert "holds on" in caplog.messages[-1] and "the key is not that of the certificate" in caplog.messages[-1]
        assert await works_with("server.pem")
        shutil.copy(FILES / "renewed.key", tmp_path / "server.key")
        certificate.files.refresh()
        assert "the certificate changed: what comes now" in caplog.messages[-1]
        assert await works_with("renewed.pem") and not await works_with("server.pem")


BAD = [
    ({"ssl_certfile": "nowhere.pem"}, "--ssl-certfile nowhere.pem: No such file or directory"),
    ({"ssl_keyfile": "{}/nowhere"}, "--ssl-keyfile {}/nowhere: No such file or directory"),
    ({"ssl_keyfile": "{}"}, "--ssl-keyfile {}: Is a directory"),
    ({"ssl_keyfile": "{}/renewed.key"}, "the key is not that of the certificate in --ssl-certfile {}/server.pem"),
    ({"ssl_keyfile": "{}/rsa.key"}, "the key is not that of the certificate in --ssl-certfile {}/server.pem"),
    (
        {"ssl_keyfile": "{}/encrypted.key"},
        "--ssl-keyfile {}/encrypted.key: the key is encrypted: give INGLE_SSL_KEYFILE_",
    ),
    (
        {"ssl_keyfile": "{}/encrypted.key", "ssl_keyfile_password": "guess"},
        "--ssl-keyfile {}/encrypted.key: --ssl-keyfile-password does not decrypt the key",
    ),
    ({"ssl_certfile": "{}/server.key"}, "--ssl-certfile {}/server.key: no certificate in PEM is in it"),
    ({"ssl_keyfile": "{}/server.pem"}, "--ssl-keyfile {}/server.pem: no private key in PEM is in it"),
    (
        {"ssl_keyfile": None},
        "--ssl-certfile {}/server.pem: no private key in PEM is in it: name its file by --ssl-keyfile",
    ),
    ({"ssl_ca_certs": "{}/server.key"}, "--ssl-ca-certs {}/server.key: no certificate in PEM is in it"),
]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize(("changes", "words"), BAD)
def test_what_cannot_be_used_is_told_in_a_line(changes: dict[str, str | None], words: str, anyio_backend: str) -> None:
    given = {name: None if value is None else value.format(FILES) for name, value in changes.items()}
    with pytest.raises(ConfigError) as raised:
        Certificate(config(**given))
    told = str(raised.value)
    assert words.format(FILES) in told and "\n" not in told and "guess" not in told


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_what_can(tmp_path: Path, anyio_backend: str) -> None:
    encrypted = {"ssl_keyfile": str(FILES / "encrypted.key"), "ssl_keyfile_password": "open-sesame"}
    assert not Certificate(config(**encrypted)).asks_clients
    both = tmp_path / "both.pem"
    both.write_text((FILES / "server.pem").read_text() + (FILES / "server.key").read_text())
    Certificate(ListenConfig(ssl_certfile=str(both)))
    both.chmod(0o644)
    assert f"chmod o= {both}" in (key_notice(ListenConfig(ssl_certfile=str(both))) or "")
    both.chmod(0o640)
    assert key_notice(ListenConfig(ssl_certfile=str(both))) is None
    assert "open-sesame" not in repr(Certificate(config(**encrypted)))
    assert os.access(both, os.R_OK)
