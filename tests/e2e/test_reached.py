"""By which ways a real server is reached, and by whom."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ingle.home import home

from .conftest import SERVE, Server, command_line, descendants, start_server, until

TLS = Path(__file__).parents[1] / "server" / "tls"
ASK = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}
SMALL = ("--served-model-name", "tiny", "--kv-cache-memory", "64MiB", "--device", "cpu")


@contextmanager
def running(*arguments: str, **environment: str) -> Iterator[Server]:
    server = start_server(*arguments, *SMALL, wait=False, **environment)
    server.read()
    try:
        ready = until(lambda: "base URL: " in server.text() or server.process.poll() is not None, 120)
        assert ready and server.process.poll() is None, server.text()
        yield server
    finally:
        server.stop()


def test_a_server_that_strangers_reach_without_a_key_does_not_start(tiny_model: Path) -> None:
    command = [*SERVE, str(tiny_model), "--host", "0.0.0.0", "--port", "0", *SMALL]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("ingle: --host 0.0.0.0 lets others reach this server") and "--allow-open" in line


def test_one_on_a_socket(tiny_model: Path, tmp_path: Path) -> None:
    path, keys = tmp_path / "s.sock", tmp_path / "keys"
    keys.write_text("sk-alice name=alice rpm=2\nsk-root name=root admin\n")
    keys.chmod(0o600)
    (tmp_path / "kernels").symlink_to(home() / "kernels")  # which would be compiled anew
    arguments = (str(tiny_model), "--uds", str(path), "--api-key-file", str(keys))
    transport = httpx.HTTPTransport(uds=str(path))
    with running(*arguments, INGLE_HOME=str(tmp_path)) as server:
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as client:

            def status(method: str, path: str, key: str, **ask: object) -> int:
                return client.request(method, path, headers={"x-api-key": key} if key else {}, **ask).status_code  # type: ignore[arg-type]

            assert status("GET", "/health", "") == 200 and status("GET", "/v1/models", "") == 401
            asked = [status("POST", "/v1/completions", "sk-alice", json=ASK) for _ in range(3)]
            assert asked == [200, 200, 429]
            assert status("POST", "/v1/completions", "sk-root", json=ASK) == 200
            assert status("GET", "/metrics", "") == 401 and status("GET", "/metrics", "sk-alice") == 403
            assert status("GET", "/metrics", "sk-root") == 200
        assert "sk-" not in server.text()
        listed = _ingle("ps", "--json", home=tmp_path)
        assert [each["url"] for each in json.loads(listed)] == [f"unix:{path}"]
        taken = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=120)
        assert taken.returncode == 2 and "a server listens there already" in taken.stderr
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        assert path.is_socket() and until(lambda: b"ingle" not in command_line(engine), 30)
    with running(*arguments, INGLE_HOME=str(tmp_path)) as server:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
            assert client.get("/v1/models", headers={"x-api-key": "sk-root"}).status_code == 200
        assert _ingle("stop", str(path), home=tmp_path) == f"stopped tiny on unix:{path}\n"
        assert server.process.wait(30) == 0 and not path.exists()


def _ingle(*words: str, home: Path) -> str:
    command = [*SERVE[:-1], *words]
    environment = {"INGLE_HOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(filter(None, sys.path))}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment).stdout


def test_one_behind_tls_and_a_proxy(tiny_model: Path) -> None:
    flags = (
        *("--ssl-certfile", str(TLS / "server.pem"), "--ssl-keyfile", str(TLS / "encrypted.key")),
        *("--root-path", "/llm", "--cors-origin", "https://chat.example.com"),
        *("--trusted-proxies", "127.0.0.1", "--allowed-hosts", "llm.example.com"),
    )
    with running(str(tiny_model), *flags, INGLE_SSL_KEYFILE_PASSWORD="open-sesame", INGLE_API_KEY="k" * 20) as server:
        assert "open-sesame" not in server.text() and "k" * 20 not in server.text()
        url = server.text().partition("base URL: ")[2].split()[0].removesuffix("/v1")
        assert url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=str(TLS / "server.pem"))
        proxy = {"Host": "llm.example.com", "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        with httpx.Client(verify=context, base_url=url, headers=proxy, timeout=60) as client:
            assert client.get("/llm/health").status_code == 200
            assert client.get("/llm/v1/models").status_code == 401
            client.headers["authorization"] = "Bearer " + "k" * 20
            asked = client.post("/llm/v1/completions", json=ASK, headers={"Origin": "https://chat.example.com"})
            assert (
                asked.status_code == 200 and asked.headers["access-control-allow-origin"] == "https://chat.example.com"
            )
            other = client.post("/v1/completions", json=ASK, headers={"Origin": "https://other.example"})
            assert other.status_code == 403
            assert client.get("/llm/v1/models", headers={"Host": "other.example"}).status_code == 403
            assert "/llm/openapi.json" in client.get("/llm/docs").text
            assert client.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert until(lambda: '203.0.113.9 "GET /v1/models" 401' in server.text(), 30), server.text()
        with pytest.raises(httpx.HTTPError):
            httpx.get(url.replace("https:", "http:") + "/health")
    assert not descendants(server.process.pid)
