"""What a server's address and flags decide before it serves."""

from __future__ import annotations

import errno
import logging
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ingle.config import EngineConfig, ServeConfig, ServerConfig
from ingle.config.access import AccessConfig, ApiKey
from ingle.errors import ConfigError
from ingle.hub.resolve import ModelSource
from ingle.server import launch, listening
from ingle.server.access import Access
from ingle.server.engine_process import EngineProcess
from ingle.server.http_limits import OpenConnections
from ingle.text.formats.of_model import NO_FORMATS


class Bound:
    """A socket as far as its address goes."""

    def __init__(self, host: str) -> None:
        self.host = host

    def getsockname(self) -> tuple[str, int]:
        return (self.host, 8000)


def start_on(sock: Any) -> launch.Start:
    """Nothing of it but the socket is asked for."""
    source, process = ModelSource("m", Path("m"), "folder"), cast(EngineProcess, None)
    return launch.Start(ServeConfig(EngineConfig.of("m")), source, process, sock, 0.0)


@pytest.mark.parametrize(
    ("template", "sampling", "keys", "parts", "writes_text"),
    [
        (
            object(),
            {},
            (),
            ["/v1/chat/completions -H 'Content", '"messages"', '"temperature": 0.2', '"model": "m"'],
            True,
        ),
        (object(), {"top_k": 9}, ("k",), ["-H 'Authorization: Bearer YOUR_KEY' -H", '"Hello!"}], "max_tokens"'], True),
        (None, {}, (), ["/v1/completions -H", '"prompt": "Once upon a time"'], True),
        (object(), {}, (), ["/v1/embeddings -H", '"input": "Once upon a time"}'], False),
    ],
)
def test_the_example_is_one_that_works(
    template: Any, sampling: Any, keys: tuple[str, ...], parts: list[str], writes_text: bool
) -> None:
    info = SimpleNamespace(writes_text=writes_text)
    model: Any = SimpleNamespace(name="m", default_sampling=sampling, chat_template=template, info=info)
    example = launch._example(model, Access(tuple(map(ApiKey, keys))), "http://127.0.0.1:1")
    assert example.startswith("curl http://127.0.0.1:1/v1/") and all(part in example for part in parts)


ADDRESSES = [
    ("127.0.0.1", True),
    ("127.8.9.10", True),
    ("::1", True),
    ("::ffff:127.0.0.1", True),
    ("0.0.0.0", False),
    ("::", False),
    ("192.168.1.5", False),
    ("10.0.0.1", False),
    ("fd00::1", False),
    ("fe80::1%2", False),
    ("203.0.113.9", False),
]


@pytest.mark.parametrize(("host", "loopback"), ADDRESSES)
@pytest.mark.parametrize("keys", [(), ("key",)])
def test_whoever_is_reached_from_outside_without_a_key_is_warned(
    host: str, loopback: bool, keys: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="ingle")
    monkeypatch.setattr(launch.facts, "started", lambda info, sampling, source: "")
    tokenizer = SimpleNamespace(hold_against=lambda vocab_size: [])
    info = SimpleNamespace(notices=[], timings_s={}, vocab_size=300, writes_text=True)
    text = SimpleNamespace(sampling_source="", notices=(), formats=NO_FORMATS, reranker=None)
    model: Any = SimpleNamespace(
        name="m",
        info=info,
        default_sampling={},
        chat_template=SimpleNamespace(knows_tools=True),
        tokenizer=tokenizer,
        text=text,
    )
    sock: Any = Bound(host)
    launch._announce(model, Access(tuple(map(ApiKey, keys))), start_on(sock))
    assert caplog.messages[-1].startswith("ready in ") and "base URL: http://" in caplog.messages[-1]
    assert any("--api-key" in message for message in caplog.messages) == (not loopback and not keys)
    assert any("is guessed soon" in message for message in caplog.messages) == (not loopback and bool(keys))
    given = AccessConfig(api_key=keys)
    access = launch.access_of(ServerConfig(access=given), sock)
    assert access.allowed_hosts == (("localhost",) if loopback else ())
    assert access.local_names == (not loopback and not keys)
    for hosts, allowed in ((("a.example",), ("a.example",)), (("a.example", "*"), ())):
        access = launch.access_of(ServerConfig(access=replace(given, allowed_hosts=hosts)), sock)
        assert access.allowed_hosts == allowed and not access.local_names


def test_a_name_for_loopback_is_loopback() -> None:
    with listening.bind("localhost", 0) as sock:
        assert listening.is_local(sock)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("served_model_name", ("",)),
    ],
)
def test_flags_that_cannot_be(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="--" + field.replace("_", "-")):
        ServerConfig(**{field: value})


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1:8000", 0, "'127.0.0.1:8000' is more than an address: give --host 127.0.0.1 --port 8000"),
        ("http://localhost:8000/v1", 0, "is more than an address: give --host localhost --port 8000"),
        ("http://0.0.0.0", 0, "give --host 0.0.0.0$"),
        ("[::1]:80", 0, "give --host ::1 --port 80"),
        ("no.such.host.invalid", 0, "there is no such host"),
        ("x" * 80, 0, "there is no such host"),
        ("203.0.113.9", 0, "no address of this machine"),
    ],
)
def test_an_address_that_cannot_be(host: str, port: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        listening.bind(host, port)


def test_a_port_that_only_root_may_use() -> None:
    error = PermissionError(errno.EACCES, "Permission denied")
    assert listening._why_not(error, 80) == (
        "only root may use port 80: give a --port above 1023, such as 8000, and let a proxy forward"
    )


DESCRIPTORS = """
import resource, sys
from ingle.server.http_limits import allow_connections
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_connections(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "allowed", "raised"),
    [(256, 900, 500, 500, 564), (256, 300, 500, 236, 300), (800, 900, 100, 100, 800), (64, 64, 500, 1, 64)],
)
def test_the_limit_of_descriptors_is_raised_to_what_is_needed(
    soft: int, hard: int, wanted: int, allowed: int, raised: int
) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("the limit here is lower")
    command = [sys.executable, "-c", DESCRIPTORS, str(soft), str(hard), str(wanted)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(allowed), str(raised), str(hard)]


def test_connections_of_one_network_are_counted_together() -> None:
    connections = OpenConnections(8)
    for _ in range(4):
        assert connections.enter("2001:db8::1:2")
    assert not connections.enter("2001:db8::ffff:1")
    assert connections.enter("2001:db8:0:1::1")
    assert connections.enter("10.0.0.1") and connections.enter("::ffff:10.0.0.1")
    connections.leave("2001:db8::9")
    assert connections.enter("2001:db8::8")
    connections.leave("10.0.0.1")
    assert connections.enter("10.0.0.2") and connections.enter("10.0.0.3")
    assert not connections.enter("10.0.0.4")


def test_who_stands_for_many_may_have_all_connections() -> None:
    connections = OpenConnections(4, ["10.0.0.0/8", "2001:db8::7"])
    assert all(connections.enter("10.1.2.3") for _ in range(4)) and not connections.enter("10.1.2.3")
    connections = OpenConnections(4, ["10.0.0.0/8", "2001:db8::7"])
    assert all(connections.enter("192.168.0.1") for _ in range(2)) and not connections.enter("192.168.0.1")
    assert all(connections.enter("::ffff:10.0.0.1") for _ in range(2)) and not connections.enter("10.0.0.1")
    for shared in (OpenConnections(4), OpenConnections(4, ["*"])):
        address = "" if shared._proxies == [] and not shared._all_proxies else "192.168.0.1"
        assert all(shared.enter(address) for _ in range(4)) and not shared.enter(address)


def test_where_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGLE_HOME", str(tmp_path))
    roots = []
    for name in ("Qwen/Qwen3-8B", "Qwen-Qwen3-8B", "../../etc", "你好", "x" * 300):
        store = launch.store_of(ServerConfig(max_files_size="1GiB"), name)
        assert store is not None and store.max_bytes == 1 << 30 and store.root.parent == tmp_path / "served"
        assert len(store.root.name) < 100
        roots.append(store.root)
    assert len(set(roots)) == 5
    given = launch.store_of(ServerConfig(files_dir=str(tmp_path / "mine")), "m")
    assert given is not None and given.root == tmp_path / "mine"
    assert launch.store_of(ServerConfig(max_files_size="0"), "m") is None
    with pytest.raises(ConfigError, match="--max-files-size"):
        ServerConfig(max_files_size="much")
