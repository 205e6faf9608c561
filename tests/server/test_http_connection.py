"""What goes over the wire, on real sockets: limits, times, upgrades, versions, pipelines, half-closed connections."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import httptools
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from ingle.server.http_connection import Connection
from ingle.server.http_limits import HttpLimits, OpenConnections
from ingle.server.middleware import RequestScope

from .fakes import served, until

pytestmark = pytest.mark.anyio

MANY = 10.0
"""Seconds within which anything here has happened, however busy the machine."""


class App:
    """Answers with method, path and body; what it does besides is in the path."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.running = 0
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        answer: Response
        match scope["path"]:
            case "/unread":
                answer = PlainTextResponse("not read")
            case "/stream":
                answer = StreamingResponse(self._steps())
            case "/long":
                await request.body()
                await asyncio.gather(self._wait(receive), return_exceptions=True)
                answer = PlainTextResponse("long")
            case "/slow":
                await self.go_on.wait()
                sizes = [len(chunk) async for chunk in request.stream()]
                answer = PlainTextResponse(f"{sum(sizes)} in pieces of {max(sizes)}")
            case "/never":
                await self.go_on.wait()
                answer = PlainTextResponse("not read")
            case "/large":
                answer = PlainTextResponse("x" * 4_000_000)
            case path:
                body = await request.body()
                answer = PlainTextResponse(f"{scope['method']} {path} {body.decode(errors='replace')}")
        await answer(scope, receive, send)

    async def _wait(self, receive: Receive) -> None:
        self.running += 1
        gone = asyncio.ensure_future(receive())
        await asyncio.wait((gone, asyncio.ensure_future(self.go_on.wait())), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        self.running -= 1

    async def _steps(self) -> AsyncIterator[str]:
        self.running += 1
        try:
            while not self.go_on.is_set():
                self.num_steps += 1
                yield f"{self.num_steps};"
                await asyncio.sleep(0.01)
        finally:
            self.running -= 1


class Answers:
    """A client's view of a connection, by a parser that knows nothing of the server's."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[str] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_message_begin(self) -> None:
        self.headers.append({})
        self.bodies.append("")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[-1][name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.statuses.append(self.parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body.decode()


class Client:
    """A plain socket and what came back over it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.raw = b""

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def until(self, part: bytes) -> None:
        while part not in self.raw:
            data = await asyncio.wait_for(self.reader.read(65536), MANY)
            assert data, f"closed before {part!r}: {self.raw!r}"
            self.raw += data

    async def closed(self) -> bytes:
        """All that comes until the server closes."""
        self.raw += await asyncio.wait_for(self.reader.read(), MANY)
        return self.raw

    def close(self) -> None:
        self.writer.close()


def parsed(raw: bytes) -> Answers:
    answers = Answers()
    answers.parser.feed_data(raw)
    return answers


def only(raw: bytes, status: int) -> str:
    """The body of the one answer that there is."""
    answers = parsed(raw)
    assert answers.statuses == [status], raw
    return answers.bodies[0]


def code_of(raw: bytes, status: int) -> str:
    return str(json.loads(only(raw, status))["error"]["code"])


def post(path: str, body: bytes = b"", *headers: str, chunked: bool = False, version: str = "1.1") -> bytes:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = "\r\n".join([f"POST {path} HTTP/{version}", "Host: x", *headers, framing, "", ""])
    if chunked:
        body = (b"%x\r\n%s\r\n" % (len(body), body) if body else b"") + b"0\r\n\r\n"
    return head.encode() + body


LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}  # as `ingle serve` runs


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
async def port(app: App) -> AsyncIterator[int]:
    async with serving(app) as port:
        yield port


def serving(app: App, **limits: Any) -> AbstractAsyncContextManager[int]:
    return served(RequestScope(app, access_log=False), **limits)


async def exchange(port: int, *pieces: bytes) -> bytes:
    """What comes back for these pieces, sent one after the other, until the server closes."""
    client = await Client.connect(port)
    for piece in pieces:
        client.write(piece)
        await client.writer.drain()
        await asyncio.sleep(0.01)
    raw = await client.closed()
    client.close()
    return raw


def cut(data: bytes, sizes: Sequence[int]) -> list[bytes]:
    pieces, start = [], 0
    for size in sizes:
        pieces.append(data[start : start + size])
        start += size
    return [*pieces, data[start:]]


# Upgrades.


@pytest.mark.parametrize("before", [[], [post("/first")]], ids=["new", "kept"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "offer",
    [
        ["Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"],
        ["Upgrade: websocket", "Connection: keep-alive, Upgrade", "Sec-WebSocket-Version: 13"],
        ["Connection: upgrade", "Upgrade: TLS/1.0", "Upgrade: x"],
    ],
    ids=["h2c", "websocket", "two"],
)
async def test_an_offer_to_upgrade_is_not_taken(
    port: int, before: list[bytes], chunked: bool, offer: list[str]
) -> None:
    for body, number in itertools.product((b"", b"hello", b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"), range(5)):
        request = post("/up", body, *offer, chunked=chunked)
        head = len(request.partition(b"\r\n\r\n")[0]) + 4
        sizes = ([], [head], [head - 2], [head + 1], [30, head - 30])[number]
        answers = parsed(await exchange(port, *before, *cut(request, sizes), LAST))
        assert answers.statuses == [200] * (len(before) + 2)
        assert answers.bodies[-2:] == [f"POST /up {body.decode()}", "GET /last "]
        assert "upgrade" not in answers.headers[-2]


async def test_an_offer_to_upgrade_that_is_the_last_request(port: int) -> None:
    request = b"GET /a HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert only(await exchange(port, request), 200) == "GET /a "


# Versions and framing.


@pytest.mark.parametrize("path", ["/stream", "/a"])
async def test_http_1_0_gets_no_chunks(port: int, app: App, path: str) -> None:
    client = await Client.connect(port)
    client.write(f"GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
    if path == "/stream":
        await client.until(b"3;")
    app.go_on.set()
    head, _, body = (await client.closed()).lower().partition(b"\r\n\r\n")
    assert head.startswith(b"http/1.1 200") and b"chunked" not in head and b"connection: close" in head
    assert body.startswith(b"1;2;3;" if path == "/stream" else b"get /a ")
    client.close()


@pytest.mark.parametrize("path", ["/a", "/stream"])
async def test_head_has_no_body_and_the_connection_goes_on(port: int, app: App, path: str) -> None:
    app.go_on.set()
    raw = await exchange(port, f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), LAST)
    assert raw.count(b"HTTP/1.1 200 OK\r\n") == 2
    head = raw.partition(b"\r\n\r\n")[2]
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA\x00: y\r\n\r\n", 400),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\nxyz", 501),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
async def test_what_is_no_request_is_answered_in_json_and_ends_the_connection(
    port: int, request_bytes: bytes, status: int
) -> None:
    answers = parsed(await exchange(port, request_bytes))
    assert answers.statuses == [status] and answers.headers[0]["connection"] == "close"
    assert json.loads(answers.bodies[0])["error"]["code"]


async def test_an_error_waits_behind_the_answer_that_is_on_its_way(port: int, app: App) -> None:
    client = await Client.connect(port)
    client.write(post("/stream"))
    await client.until(b"2;")
    client.write(b"nonsense\r\n\r\n")
    await client.until(b"9;")
    app.go_on.set()
    answers = parsed(await client.closed())
    assert answers.statuses == [200, 400] and answers.bodies[0].startswith("1;2;3;")
    client.close()


async def test_a_body_that_turns_out_to_be_no_http_is_a_400(port: int) -> None:
    head = post("/a", chunked=True).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert code_of(await exchange(port, head + b"3\r\nabcXX"), 400) == "bad_request"


async def test_requests_in_a_row_are_answered_in_their_order(port: int) -> None:
    requests = [post(f"/{i}", b"x" * i, chunked=bool(i % 2)) for i in range(8)]
    answers = parsed(await exchange(port, b"".join(requests) + LAST))
    assert answers.bodies == [*(f"POST /{i} {'x' * i}" for i in range(8)), "GET /last "]


async def test_a_large_answer_to_a_slow_reader_is_whole(port: int) -> None:
    client = await Client.connect(port)
    client.write(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    await asyncio.sleep(2.5)  # longer than a connection lingers
    assert len(only(await client.closed(), 200)) == 4_000_000
    client.close()


# Limits.


@pytest.mark.parametrize("kind", ["line", "value", "name", "many"])
async def test_bytes_of_headers(port: int, kind: str) -> None:
    for size in (1000, 65_000, 65_536, 65_537, 300_000):
        await send_headers(port, size, kind)


async def send_headers(port: int, size: int, kind: str) -> None:
    room = size - len(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    line, more = b"/", b""
    if kind == "line":
        line = b"/" + b"a" * room
    elif kind == "value":
        more = b"A: " + b"a" * (room - 5) + b"\r\n"
    elif kind == "name":
        more = b"a" * (room - 4) + b": \r\n"
    else:
        lines = [b"A: " + b"a" * 995 + b"\r\n"] * (room // 1000)
        more = b"".join([*lines, b"B: " + b"b" * (room % 1000 - 5) + b"\r\n"])
    request = b"GET " + line + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + more + b"\r\n"
    raw = await exchange(port, request)
    if size <= 65_536:
        assert raw.startswith(b"HTTP/1.1 200")
    else:
        assert code_of(raw, 431) == "headers_too_large"


@pytest.mark.parametrize(("count", "status"), [(250, 200), (300, 431)])
async def test_number_of_headers(port: int, count: int, status: int) -> None:
    head = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + b"A: b\r\n" * count + b"\r\n"
    only(await exchange(port, head), status)


@pytest.mark.parametrize("endless", [b"\r\n", b"A: b\r\n"])
async def test_headers_that_do_not_end(port: int, endless: bytes) -> None:
    start = b"" if endless == b"\r\n" else b"GET / HTTP/1.1\r\n"
    assert code_of(await exchange(port, start + endless * 40_000), 431) == "headers_too_large"


@pytest.mark.parametrize("between", [b"0\r\n" + b"A: b\r\n" * 40_000, b"1;" + b"x" * 100_000])
async def test_what_stands_between_the_parts_of_a_body_is_limited(port: int, between: bytes) -> None:
    head = post("/a", chunked=True).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    assert code_of(await exchange(port, head + b"1\r\na\r\n" + between), 431) == "headers_too_large"


async def test_trailers_are_no_headers(port: int) -> None:
    request = post("/a", b"abc", chunked=True)[:-2] + b"Host: evil\r\nA: b\r\n\r\n"
    assert parsed(await exchange(port, request, LAST)).bodies == ["POST /a abc", "GET /last "]


@pytest.mark.parametrize(
    ("limit", "sent", "status"),
    [
        ({"header_s": 0.2}, b"", None),
        ({"header_s": 0.2}, b"\r\n\r\n", None),
        ({"header_s": 0.2}, b"GET / HTTP/1.1\r\nA: ", 408),
        ({"body_s": 0.2}, post("/a", b"abc")[:-1], 408),
        ({"body_s": 0.2}, post("/unread", b"abc")[:-1], 200),
        ({"keep_alive_s": 0.2}, post("/a"), 200),
        ({"keep_alive_s": 0.2, "header_s": 60}, post("/a") + b"\r\n", 200),
    ],
)
async def test_times(app: App, limit: dict[str, float], sent: bytes, status: int | None) -> None:
    async with serving(app, **limit) as port:
        client = await Client.connect(port)
        client.write(sent)
        started = asyncio.get_running_loop().time()
        raw = await client.closed()
        assert asyncio.get_running_loop().time() - started < 2
        assert parsed(raw).statuses == ([status] if status else [])
        client.close()


async def test_a_header_byte_by_byte_does_not_gain_time(app: App) -> None:
    async with serving(app, header_s=0.3) as port:
        client = await Client.connect(port)
        client.write(b"GET / HTTP/1.1\r\nA: ")

        async def drip() -> None:
            while True:
                client.write(b"a")
                await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drip())
        assert code_of(await client.closed(), 408) == "request_timeout"
        dripping.cancel()
        client.close()


async def test_connections_in_all_and_of_one_address(app: App, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(app, max_connections=6) as port:
        clients = [await Client.connect(port) for _ in range(3)]
        for client in clients:
            client.write(post("/a"))
            await client.until(b"POST /a")
        for _ in range(5):
            refused = await Client.connect(port)
            assert code_of(await refused.closed(), 503) == "too_many_connections"
            refused.close()
        assert sum("--max-connections 6" in message for message in caplog.messages) == 1
        clients.pop().close()
        await asyncio.sleep(0.05)
        again = await Client.connect(port)
        again.write(post("/b"))
        await again.until(b"POST /b")
        for client in (*clients, again):
            client.close()


async def test_a_body_that_comes_faster_than_it_is_read_waits_at_the_client(port: int, app: App) -> None:
    size = 30_000_000
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post("/slow", b"x" * size) + post("/after", b"y"))
    await asyncio.sleep(0.3)
    app.go_on.set()
    writer.write_eof()
    first, second = parsed(await asyncio.wait_for(reader.read(), MANY)).bodies
    assert second == "POST /after y"
    assert first.startswith(f"{size} in pieces of ") and int(first.rpartition(" ")[2]) < 1_000_000
    writer.close()


async def test_a_body_that_nobody_reads_holds_up_no_answer(port: int, app: App) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post("/never", b"x" * 30_000_000))
    await asyncio.sleep(0.3)
    app.go_on.set()
    assert b"not read" in await asyncio.wait_for(reader.read(), MANY)
    writer.close()


async def test_no_body_is_asked_for_that_will_not_be_read(port: int) -> None:
    """The answer comes instead of "100 Continue", and says that the connection ends."""
    client = await Client.connect(port)
    head = post("/unread", b"x", "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    client.write(head)
    answers = parsed(await client.closed())
    assert answers.statuses == [200] and answers.headers[0]["connection"] == "close"
    client.close()


async def test_a_body_that_is_wanted_is_asked_for(port: int) -> None:
    client = await Client.connect(port)
    head, _, body = post("/a", b"hello", "Expect: 100-continue").partition(b"\r\n\r\n")
    client.write(head + b"\r\n\r\n")
    await client.until(b"HTTP/1.1 100 Continue\r\n\r\n")
    client.write(body)
    await client.until(b"POST /a hello")
    client.close()


async def test_a_refusal_is_read_although_the_body_is_still_being_sent(port: int) -> None:
    client = await Client.connect(port)
    client.write(post("/unread", b"x" * 3_000_000))
    assert only(await client.closed(), 200) == "not read"
    client.close()


# A client that goes, or only ends its side.

BEHIND = {
    "nothing": b"",
    "part of a header": b"GET /x HTTP/1.1\r\n",
    "requests": post("/x", b"abc") * 3,
    "many requests": post("/x") * 1000,
    "part of a body": post("/x", b"abc")[:-1],
    "a large body": post("/x", b"x" * 1_000_000),
    "large headers": b"GET /x HTTP/1.1\r\nA: " + b"a" * 60_000 + b"\r\n\r\n" + post("/x") * 3,
    "many headers": (b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 250 + b"\r\n") * 10,
    "much of anything": b"nonsense" * 200_000,
}


@pytest.mark.parametrize("leave", ["close", "reset", "end, then close"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("path", ["/long", "/stream"])
async def test_a_client_that_leaves_is_noticed(port: int, app: App, path: str, kept: bool, leave: str) -> None:
    for behind in BEHIND:
        await leave_with(port, app, path, behind, kept, leave)


async def leave_with(port: int, app: App, path: str, behind: str, kept: bool, leave: str) -> None:
    client = await Client.connect(port)
    if kept:
        client.write(post("/a"))
        await client.until(b"POST /a")
    client.write(post(path) + BEHIND[behind])
    await until(lambda: app.running == 1, within_s=MANY)
    if path == "/stream":
        await client.until(b"3;")
    await client.writer.drain()
    if leave == "reset":
        linger = b"\x01\0\0\0\0\0\0\0"
        client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    if leave.startswith("end"):
        client.writer.write_eof()
        await asyncio.sleep(0.1)
        assert app.running == 1
    client.close()
    await until(lambda: app.running == 0, within_s=0.5)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/long", "/stream", "/a", "/large"])
async def test_a_half_closed_connection_gets_its_answer(port: int, app: App, path: str, chunked: bool) -> None:
    client = await Client.connect(port)
    client.write(post(path, b"body", chunked=chunked))
    client.writer.write_eof()
    if path in ("/long", "/stream"):
        await until(lambda: app.running == 1, within_s=MANY)
        await asyncio.sleep(0.3)
    app.go_on.set()
    body = only(await client.closed(), 200)
    expected = {"/long": "long", "/stream": "1;2;3;", "/a": "POST /a body", "/large": "xxx"}[path]
    assert body.startswith(expected)
    client.close()


async def test_requests_before_the_end_are_all_answered(port: int) -> None:
    client = await Client.connect(port)
    client.write(post("/1") + post("/2", b"abc") + post("/3"))
    client.writer.write_eof()
    assert parsed(await client.closed()).bodies == ["POST /1 ", "POST /2 abc", "POST /3 "]
    client.close()


async def test_a_connection_that_ends_within_a_body_is_told(port: int) -> None:
    client = await Client.connect(port)
    client.write(post("/a", b"abc")[:-1])
    client.writer.write_eof()
    assert code_of(await client.closed(), 400) == "body_incomplete"
    client.close()


async def test_too_much_behind_a_request_ends_the_connection_after_its_answer(port: int, app: App) -> None:
    client = await Client.connect(port)
    many_headers = b"GET /x HTTP/1.1\r\n" + b"A: b\r\n" * 250 + b"\r\n"
    for behind, taken in ((post("/x") * 100, 16), (many_headers * 10, 1), (post("/x", b"x" * 9000) * 10, 7)):
        app.go_on.clear()
        client = await Client.connect(port)
        client.write(post("/stream") + behind)
        await client.until(b"3;")
        await asyncio.sleep(0.05)
        app.go_on.set()
        answers = parsed(await client.closed())
        assert answers.statuses == [200] * (1 + taken)
        client.close()


class Memory:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closing = False

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 8000) if name in ("sockname", "peername") else None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def write_eof(self) -> None:
        self.closing = True


async def fed(app: App, pieces: Sequence[bytes]) -> bytes:
    """What a connection writes for these pieces, until it closes or has nothing more to say."""
    state, transport = ServerState(), Memory()
    config: Any = SimpleNamespace(loaded_app=RequestScope(app, access_log=False))
    connection = Connection(config, state, {}, limits=HttpLimits(), open_connections=OpenConnections(8))
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in pieces:
        if not transport.closing:
            connection.data_received(piece)
        await asyncio.sleep(0)
    for _ in range(200):
        if transport.closing:
            break
        await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.gather(*state.tasks)
    assert not state.connections
    return transport.written


def random_pieces(draw: random.Random, data: bytes) -> list[bytes]:
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(12)))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


async def test_answers_do_not_depend_on_how_the_bytes_arrive(app: App) -> None:
    for seed in range(150):
        draw = random.Random(seed)
        requests, expected = [], []
        for number in range(draw.randrange(1, 6)):
            body = bytes(draw.choices(b"abc\r\n :0", k=draw.choice([0, 1, 40, 20_000 if number == 0 else 500])))
            offer = draw.choice(
                [[], ["Connection: Upgrade", "Upgrade: h2c"], ["Expect: 100-continue"], ["A: " + "b" * 9000]]
            )
            requests.append(post(f"/{number}", body, *offer, chunked=draw.random() < 0.5))
            expected.append(f"POST /{number} {body.decode()}")
        data = b"".join(requests) + LAST
        written = await fed(app, random_pieces(draw, data))
        answers = parsed(written.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))
        assert answers.bodies == [*expected, "GET /last "], seed


async def test_damaged_bytes_are_answered_or_end_the_connection(app: App) -> None:
    for seed in range(1000):
        draw = random.Random(seed)
        data = bytearray(
            post("/a", b"hello", chunked=True) + post("/b", b"x" * 50, "Connection: Upgrade", "Upgrade: h2c")
        )
        for _ in range(draw.randrange(1, 8)):
            place = draw.randrange(len(data))
            data[place : place + draw.randrange(3)] = draw.choices(b"\0\r\n :;09afZ\xff", k=draw.randrange(4))
        written = await fed(app, random_pieces(draw, bytes(data)))
        answers = parsed(written)
        assert set(answers.statuses) <= {200, 400, 431, 501}, seed


def test_what_is_shared_with_uvicorn() -> None:
    """`Connection` is made and counted by uvicorn's server: what it uses of it is there."""
    state: Any = ServerState()
    assert state.connections == set() and state.tasks == set()
    assert state.default_headers == [] and state.total_requests == 0
    source = inspect.getsource(uvicorn.Server)
    for part in (
        "http_protocol_class(",
        "config=config",
        "server_state=self.server_state",
        "app_state=",
        "_loop=_loop",
    ):
        assert part in source
