"""Hubs, the clock, and the port."""

from __future__ import annotations

import errno
import socket
import ssl
import time
import urllib.error
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from ingle.config import ServerConfig
from ingle.config.access import AccessConfig, ListenConfig
from ingle.doctor import hubs, network
from ingle.doctor.hubs import Hub, HubAnswer, ask_hubs
from ingle.server import running
from tests.doctor import fakes
from tests.doctor.fakes import FakeHere, findings

HUB = Hub("Hugging Face", "https://huggingface.co", "", "a mirror")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://127.0.0.1:{fakes.closed_port()}")


class Handler(BaseHTTPRequestHandler):
    """Answers with the status that stands in the path."""

    def do_HEAD(self) -> None:
        status = int(self.path.strip("/"))
        self.send_response(status)
        if status in (301, 302):
            self.send_header("Location", "http://192.0.2.1/elsewhere")  # which is not asked
        self.end_headers()

    def do_CONNECT(self) -> None:
        self.send_error(407)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=running_server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{running_server.server_port}"
    running_server.shutdown()
    running_server.server_close()


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (200, None),
        (302, None),
        (401, None),
        (404, None),
        (429, "it answers 429 Too Many Requests"),
        (503, "it answers 503 Service Unavailable"),
    ],
)
def test_what_a_hub_answers(status: int, failure: str | None, server: str) -> None:
    answer = hubs._ask(Hub("A hub", f"{server}/{status}", "HF_ENDPOINT", ""))
    assert answer.failure == failure
    assert answer.ahead_s is not None
    assert abs(answer.ahead_s or 0.0) < 5.0


def test_a_proxy_that_wants_a_password(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", server.replace("//", "//me:secret@"))
    answer = hubs._ask(HUB)
    assert answer.proxy is not None and "secret" not in answer.proxy
    assert answer.failure is not None and "407" in answer.failure


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [
        ("hf-mirror.invalid", "its name is not found (DNS)"),
        ("ftp://hf-mirror.com", "HF_ENDPOINT is no address of a hub"),
        ("http://127.0.0.1:99999", "no address of a hub"),
        ("http://[::1", "no address of a hub"),
    ],
)
def test_endpoints_that_cannot_be(endpoint: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert words in (ask_hubs()[0].failure or "")


def test_a_proxy_is_named_as_people_write_it(monkeypatch: pytest.MonkeyPatch) -> None:
    port = fakes.closed_port()
    for proxy in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}"):
        monkeypatch.setenv("all_proxy", proxy)
        answer = hubs._ask(HUB)
        assert (answer.proxy, answer.proxy_source, answer.failure) == (proxy, "all_proxy", "Connection refused")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1080")
    assert "SOCKS" in (hubs._ask(HUB).failure or "")
    monkeypatch.setenv("all_proxy", "http://[::1")
    assert ask_hubs()[0].failure is not None


def test_a_mirror_is_asked_in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = hubs.hubs({"HF_ENDPOINT": "https://hf-mirror.com/", "MODELSCOPE_DOMAIN": "www.modelscope.ai"})
    assert (first.endpoint, first.source) == ("https://hf-mirror.com", "HF_ENDPOINT")
    assert (second.endpoint, second.source) == ("https://www.modelscope.ai", "MODELSCOPE_DOMAIN")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask_hubs() == []


def test_a_name_that_the_resolver_never_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that answers nothing: the system's own patience is longer than a person's."""
    ended = Event()

    def find(*_: object, **__: object) -> None:
        ended.wait(30.0)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", find)
    monkeypatch.setattr(hubs, "_DEADLINE_S", 0.3)
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    started = time.monotonic()
    assert [answer.failure for answer in ask_hubs()] == 2 * ["no answer within 0.3 s"]
    assert time.monotonic() - started < 5.0
    ended.set()


def test_why_a_hub_is_not_reached() -> None:
    untrusted = ssl.SSLCertVerificationError()
    untrusted.verify_message = "self-signed certificate in certificate chain"
    assert "SSL_CERT_FILE" in hubs._why(urllib.error.URLError(untrusted))
    assert hubs._why(TimeoutError("timed out")) == "no answer within 5 s"
    assert hubs._why(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) == "Connection reset by peer"


# ---- the clock


def clock(*answers: HubAnswer) -> tuple[str, str]:
    here = FakeHere()
    here.hubs = lambda: list(answers)  # type: ignore[assignment]
    [line] = findings(network.check_clock, here)
    return line.state, line.text


def test_the_clock_is_compared_with_the_hubs() -> None:
    assert clock()[0] == "ok"
    assert clock(HubAnswer(HUB, None, ahead_s=3.0))[1].endswith("as Hugging Face has it")
    assert clock(HubAnswer(HUB, None, ahead_s=300.0)) == ("warn", clock(HubAnswer(HUB, None, ahead_s=300.0))[1])
    state, text = clock(HubAnswer(HUB, None, ahead_s=-7200.0))
    assert state == "fail" and "7200 s behind Hugging Face's" in text
    other = Hub("ModelScope", "https://modelscope.cn", "", "")
    state, text = clock(HubAnswer(HUB, None, ahead_s=-7200.0), HubAnswer(other, None, ahead_s=1.0))
    assert state == "ok" and "as ModelScope has it" in text, "one hub's own clock is wrong"


def test_a_clock_that_was_never_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.time, "time", lambda: 3600.0)
    state, text = clock()
    assert state == "fail" and "1970" in text


def test_an_answer_from_a_cache_is_as_old_as_it_says() -> None:
    date = formatdate(time.time() - 1000, usegmt=True)
    assert abs(hubs._ahead_s({"Date": date, "Age": "1000"}) or 99.0) < 5.0
    assert hubs._ahead_s({"Date": "yesterday"}) is None
    assert hubs._ahead_s({}) is None


# ---- the port


def test_ports() -> None:
    with fakes.taken_port() as port:
        [taken] = findings(network.check_port, FakeHere(port=port))
    assert taken.state == "fail" and f"127.0.0.1:{port} is taken by pid" in taken.text
    [free] = findings(network.check_port, FakeHere(port=port))
    assert (free.state, free.text) == ("ok", f"127.0.0.1:{port} is free")
    [anyone] = findings(network.check_port, FakeHere(port=0))
    assert anyone.state == "ok"
    [elsewhere] = findings(network.check_port, FakeHere(host="192.0.2.1", port=0))
    assert elsewhere.state == "fail" and "no address of this machine" in elsewhere.text


def test_who_gets_in_and_by_which_way(tmp_path: Path) -> None:
    [opened] = findings(network.check_port, FakeHere(host="0.0.0.0", port=0))
    assert opened.state == "fail" and "--allow-open" in opened.text
    keyed = ServerConfig(access=AccessConfig(api_key=("k",)))
    assert findings(network.check_port, FakeHere(host="0.0.0.0", port=0, server=keyed))[0].state == "ok"
    lost = ServerConfig(listen=ListenConfig(ssl_certfile="nowhere.pem"))
    [no_certificate] = findings(network.check_port, FakeHere(port=0, server=lost))
    assert no_certificate.state == "fail" and "--ssl-certfile nowhere.pem: No such file" in no_certificate.text
    for folder, state in ((tmp_path, "ok"), (tmp_path / "none", "fail")):
        server = ServerConfig(listen=ListenConfig(uds=str(folder / "s.sock")))
        assert findings(network.check_port, FakeHere(server=server))[0].state == state
    assert not list(tmp_path.iterdir())


def test_a_port_of_another_users_process(tmp_path: Path) -> None:
    with fakes.taken_port() as port:
        [taken] = findings(network.check_port, FakeHere(port=port, root=tmp_path))  # where /proc shows nothing
    assert taken.state == "fail" and "another user's or container's process" in taken.text
    assert taken.advice is not None and f":{port}" in taken.advice


def test_a_port_that_a_server_of_ones_own_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with fakes.taken_port() as port:
        url = f"http://127.0.0.1:{port}"
        own = running.Running(pid=42, models=["smollm2:135m"], url=url, size=1, device="cpu", context=512, started=0.0)
        monkeypatch.setattr(running, "servers", lambda: [own])
        [line] = findings(network.check_port, FakeHere(port=port))
    assert line.state == "warn" and "a server of yours, of smollm2:135m (pid 42)" in line.text
    assert line.advice is not None and f"`ingle stop {port}`" in line.advice
