"""Where a server listens, and who can reach it there."""

from __future__ import annotations

import logging
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ingle.config import ServerConfig
from ingle.config.access import AccessConfig, ListenConfig
from ingle.errors import ConfigError
from ingle.server import launch
from ingle.server.listening import bind, listening, refuse_open
from ingle.server.running import url_of

KEYED = AccessConfig(api_key=("k",))
CERTIFIED = ListenConfig(ssl_certfile="c", ssl_keyfile="k", ssl_ca_certs="a")


class Bound:
    """A socket as far as its address goes."""

    def __init__(self, host: str) -> None:
        self.host = host

    def getsockname(self) -> tuple[str, int]:
        return (self.host, 8000)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "fd00::1", "203.0.113.9"])
def test_who_strangers_reach_asks_for_something(host: str) -> None:
    sock: socket.socket = Bound(host)  # type: ignore[assignment]
    for access in (AccessConfig(), AccessConfig(admin_api_key=("r",)), AccessConfig(allowed_hosts=("a.example",))):
        with pytest.raises(ConfigError) as raised:
            refuse_open(ServerConfig(host=host, access=access), sock)
        told = str(raised.value)
        assert host in told and all(way in told for way in ("INGLE_API_KEY", "--api-key", "--allow-open"))
        assert "\n" not in told
    for config in (
        ServerConfig(access=KEYED),
        ServerConfig(access=AccessConfig(allow_open=True)),
        ServerConfig(listen=CERTIFIED),
    ):
        refuse_open(config, sock)
    for local in ("127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"):
        refuse_open(ServerConfig(), Bound(local))  # type: ignore[arg-type]
    optional = ListenConfig(ssl_certfile="c", ssl_ca_certs="a", ssl_cert_reqs="optional")
    for config in (ServerConfig(listen=optional), ServerConfig(listen=ListenConfig(ssl_certfile="c"))):
        with pytest.raises(ConfigError):
            refuse_open(config, sock)


def test_it_is_refused_before_it_listens() -> None:
    with pytest.raises(ConfigError, match="--allow-open"), listening(ServerConfig(host="0.0.0.0", port=0)):
        pass
    with listening(ServerConfig(host="0.0.0.0", port=0, access=KEYED)) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


def at(path: Path, mode: str = "600") -> ServerConfig:
    return ServerConfig(listen=ListenConfig(uds=str(path), uds_mode=mode))


@pytest.mark.parametrize("mode", ["600", "660", "0666"])
def test_a_socket_is_for_those_who_were_named(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "s.sock"
    before = os.umask(0o022)
    try:
        with listening(at(path, mode)) as sock:
            found = path.stat()
            assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == int(mode, 8)
            assert url_of(sock) == f"unix:{path}"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
            assert os.umask(0o022) == 0o022
        assert not path.exists()
    finally:
        os.umask(before)


LEFT = """
import os, sys
from ingle.server.listening import bind_path
from pathlib import Path
bind_path(Path(sys.argv[1]), 0o600)
os._exit(0)
"""


def test_a_socket_that_a_dead_server_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    subprocess.run([sys.executable, "-c", LEFT, str(path)], check=True)
    assert path.is_socket()
    with listening(at(path)) as sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert sock.accept()


def test_one_of_a_living_server_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with listening(at(path)):
        with pytest.raises(ConfigError, match="a server listens there already"), listening(at(path)):
            pass
        assert path.is_socket()
    with socket.socket(socket.AF_UNIX) as stuck:  # one that takes no connection any more is alive, too
        stuck.bind(str(path))
        stuck.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(ConfigError, match=f"--uds {path}"), listening(at(path)):
            pass
        for client in clients:
            client.close()
        assert path.is_socket()


def test_who_takes_the_path_over_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with listening(at(path)):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    (tmp_path / "link").symlink_to(path)
    for each in (path, tmp_path / "link", tmp_path):
        with pytest.raises(ConfigError, match="is no socket"), listening(at(each)):
            pass
    assert path.read_text() == "mine"
    with pytest.raises(ConfigError, match="there is no folder"), listening(at(tmp_path / "none" / "s")):
        pass
    with pytest.raises(ConfigError, match="107 bytes"):
        at(tmp_path / ("x" * 120))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("uds", " ", "--uds has an empty value"),
        ("uds_mode", "rw", "--uds-mode 'rw' is not a mode"),
        ("uds_mode", "1777", "is not a mode"),
        ("root_path", "/a b", "--root-path"),
        ("root_path", "http://x/y", "--root-path"),
        ("trusted_proxies", ("proxy.example",), "--trusted-proxies 'proxy.example'"),
        ("trusted_proxies", ("10.0.0.0/8,nonsense",), "'nonsense' is neither"),
        ("ssl_keyfile", "k", "--ssl-keyfile needs --ssl-certfile"),
        ("ssl_ca_certs", "k", "--ssl-ca-certs needs --ssl-certfile"),
        ("ssl_cert_reqs", "required", "--ssl-cert-reqs needs --ssl-certfile"),
    ],
)
def test_flags_that_cannot_be(field: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ListenConfig(**{field: value})  # type: ignore[arg-type]
    assert words in str(raised.value)


def test_values_as_they_are_used() -> None:
    config = ListenConfig(root_path="llm/", trusted_proxies=("10.0.0.1, 10.1.0.0/16", "::1"))
    assert config.prefix == "/llm" and config.proxies == ("10.0.0.1", "10.1.0.0/16", "::1")
    assert ListenConfig(root_path="/").prefix == "" and ListenConfig(root_path="/a/b").prefix == "/a/b"
    assert CERTIFIED.client_certificates == "required" and ListenConfig().client_certificates == "none"


@pytest.mark.parametrize("host", ["/run/ingle.sock", "unix:/run/ingle.sock", "ingle.sock"])
def test_a_path_in_place_of_an_address(host: str) -> None:
    with pytest.raises(ConfigError, match=r"give --uds \S*ingle.sock in its place"):
        bind(host, 0)


def test_what_is_said_of_a_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ingle")
    url = f"unix:{tmp_path}/a b.sock"
    shown = launch._curl(url, "completions", "", {"model": "m"})
    assert shown.startswith(f"curl --unix-socket '{tmp_path}/a b.sock' http://localhost/v1/completions -H ")
    assert launch._base(url) == f"base URL: http://localhost/v1, at the socket {tmp_path}/a b.sock"
    assert launch._curl("https://127.0.0.1:1", "x", "", {}).startswith("curl -k https://127.0.0.1:1/v1/x")
