"""What no client sends that means well, byte by byte: each gets one answer or none, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import pytest

from tests.chaos import raw
from tests.chaos.conftest import Start
from tests.chaos.target import Target, timed
from tests.e2e.conftest import until

COMPLETIONS = "/v1/completions"
SMALL = {"prompt": "a", "max_tokens": 1}
HIDDEN = raw.head("GET", "/version?hidden")
"""A request within another: whoever answers it has taken the first for shorter than it is."""
MB = 1 << 20


def framed(*headers: str, body: bytes = b"") -> bytes:
    return raw.head("POST", COMPLETIONS, "Content-Type: application/json", *headers) + body


def chunked(body: bytes, *headers: str) -> bytes:
    return framed("Transfer-Encoding: chunked", *headers, body=body)


BODY = json.dumps(SMALL).encode()
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
ZERO = b"0\r\n\r\n"

AMBIGUOUS: dict[str, bytes] = {
    "length and chunks": framed("Content-Length: 5", "Transfer-Encoding: chunked", body=ZERO + HIDDEN),
    "chunks and length": framed("Transfer-Encoding: chunked", "Content-Length: 5", body=ZERO + HIDDEN),
    "two lengths": framed("Content-Length: 0", f"Content-Length: {len(HIDDEN)}", body=HIDDEN),
    "two lengths in one": framed(f"Content-Length: 0, {len(HIDDEN)}", body=HIDDEN),
    "a length with a sign": framed("Content-Length: +5", body=b"aaaaa" + HIDDEN),
    "a negative length": framed("Content-Length: -1", body=HIDDEN),
    "a length in hexadecimal": framed("Content-Length: 0x5", body=b"aaaaa" + HIDDEN),
    "a length of 40 digits": framed("Content-Length: " + "9" * 40, body=HIDDEN),
    "no length at all": framed("Content-Length:", body=HIDDEN),
    "chunks spelt otherwise": framed("Transfer-Encoding: xchunked", body=ZERO + HIDDEN),
    "chunks within chunks": framed("Transfer-Encoding: chunked, chunked", body=ZERO + HIDDEN),
    "chunks and then not": framed("Transfer-Encoding: chunked, identity", body=ZERO + HIDDEN),
    "a blank before the colon": framed("Transfer-Encoding : chunked", body=ZERO + HIDDEN),
    "a vertical tab": framed("Transfer-Encoding:\x0bchunked", body=ZERO + HIDDEN),
    "a header on two lines": framed("Transfer-Encoding:\r\n chunked", "Content-Length: 0", body=ZERO + HIDDEN),
    "a bare carriage return": framed("X: a\rTransfer-Encoding: chunked", body=ZERO + HIDDEN),
    "a bare line feed": framed("X: a\nTransfer-Encoding: chunked", "Content-Length: 0", body=ZERO + HIDDEN),
    "a null in a header": framed("X: a\0b", "Content-Length: 0", body=HIDDEN),
    "a line without a colon": framed("nothing", "Content-Length: 0", body=HIDDEN),
    "a negative chunk": chunked(b"-5\r\nhello\r\n" + ZERO + HIDDEN),
    "a chunk in hexadecimal with 0x": chunked(b"0x5\r\nhello\r\n" + ZERO + HIDDEN),
    "a chunk with an underscore": chunked(b"0_5\r\nhello\r\n" + ZERO + HIDDEN),
    "a chunk of 2**68 bytes": chunked(b"f" * 17 + b"\r\nhello\r\n" + ZERO + HIDDEN),
    "a chunk that ends in garbage": chunked(b"5\r\nhelloXX" + ZERO + HIDDEN),
    "a chunk of line feeds alone": chunked(b"5\nhello\n0\n\n" + HIDDEN),
    "chunks in HTTP/1.0": b"POST /v1/completions HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n" + ZERO + HIDDEN,
}
"""Each could be read in two ways, and a proxy before the server may read the other: then the rest is a request that it
has not seen."""

NO_REQUESTS: dict[str, bytes] = {
    "another version": b"GET / HTTP/3.7\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "TLS": bytes.fromhex("16030100a5010000a10303") + bytes(range(160)),
    "a redis command": b"*1\r\n$4\r\nPING\r\n",
    "SSH": b"SSH-2.0-scan\r\n",
    "zeros": bytes(100_000),
    "all bytes": bytes(range(256)) * 100,
    "a method of 1 MB": b"A" * MB + b" / HTTP/1.1\r\n\r\n",
    "a method of small letters": b"get / HTTP/1.1\r\n\r\n",
    "a target with a blank": b"GET /a b HTTP/1.1\r\n\r\n",
    "a target of bytes": b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    "CONNECT": raw.head("CONNECT", "localhost:22"),
    "no line feed in 1 MB": b"GET / HTTP/1.1\r\nX: " + b"a" * MB,
    "1 MB in one header": raw.head("GET", "/", "X-Long: " + "a" * MB),
    "1 MB in a header's name": raw.head("GET", "/", "a" * MB + ": x"),
    "1 MB in the target": raw.head("GET", "/" + "a" * MB),
    "1 MB in a key": raw.head("GET", "/v1/models", "Authorization: Bearer " + "a" * MB),
    "10,000 headers": raw.head("GET", "/", *(f"X-{index}: a" for index in range(10_000))),
    "10,000 times one header": raw.head("GET", "/", *["Host: localhost"] * 10_000),
    "a chunk's extension of 1 MB": chunked(b"5;" + b"a" * MB + b"\r\nhello\r\n"),
    "1 MB behind the last chunk": chunked(CHUNK + b"0\r\nX: " + b"a" * MB + b"\r\n\r\n"),
    "100,000 headers behind the last chunk": chunked(CHUNK + b"0\r\n" + b"a: b\r\n" * 100_000 + b"\r\n"),
}
"""What is refused, or dropped, whatever it is."""


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_could_be_two_requests_is_at_most_one(standing: Target, name: str) -> None:
    answer = raw.exchange(standing.port, [AMBIGUOUS[name]])
    assert b'"version"' not in answer, "the hidden request was answered"
    assert raw.statuses(answer) in ([400], [411], [413], [415], [501])


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_what_is_no_request_is_refused(standing: Target, name: str) -> None:
    with timed(10.0):
        answer = raw.exchange(standing.port, [NO_REQUESTS[name]])
    found = raw.statuses(answer)
    assert not found or (len(found) == 1 and found[0] in (400, 404, 405, 408, 414, 431, 501)), answer[:300]


def test_all_that_is_no_request_leaves_nothing_behind(standing: Target) -> None:
    def attack() -> None:
        for data in (*AMBIGUOUS.values(), *NO_REQUESTS.values()):
            raw.exchange(standing.port, [data])

    standing.withstands(attack)


# ---- floods


def pipelined(target: Target) -> None:
    """10,000 requests, of which nobody reads an answer: what is kept of them is bounded."""
    with raw.connect(target.port, timeout_s=2.0, receive_bytes=4096) as sock:
        sock.setblocking(False)
        data = memoryview(raw.head("GET", "/health") * 10_000)
        deadline = time.monotonic() + 2.0
        while data and time.monotonic() < deadline:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                time.sleep(0.01)
            except ConnectionError:
                break


def tiny_chunks(target: Target) -> None:
    """Of one byte each, 200,000 of them: no JSON comes of it."""
    answer = raw.exchange(target.port, [chunked(b"1\r\n \r\n" * 200_000 + ZERO)])
    assert raw.statuses(answer) == [400]


def a_body_without_an_end(target: Target) -> None:
    """It is refused at its limit, and not when it ends."""
    piece = b"%x\r\n%s\r\n" % (MB, b" " * MB)
    answer = raw.exchange(target.port, [chunked(b""), *[piece] * 200], end=False)
    assert raw.statuses(answer) == [413]


def a_length_of_a_terabyte(target: Target) -> None:
    """Refused before anything of it is asked for."""
    request = framed(f"Content-Length: {1 << 40}", "Expect: 100-continue")
    answer = raw.exchange(target.port, [request], end=False)
    assert raw.statuses(answer) == [413]


def a_bomb(target: Target) -> None:
    """Compressed bodies are not taken: a megabyte would become a gigabyte."""
    for encoding in ("gzip", "br", "deflate", "zstd", "gzip, identity"):
        answer = raw.exchange(target.port, [raw.post(COMPLETIONS, bytes(1000), f"Content-Encoding: {encoding}")])
        assert raw.statuses(answer) == [415]


def opened_and_left(target: Target) -> None:
    """1,000 connections, closed before a word is said, in the midst of a header, and of a body."""
    for begun in (b"", b"POST /v1/comp", raw.post(COMPLETIONS, SMALL)[:-4], raw.post(COMPLETIONS, SMALL)):
        for _ in range(250):
            sock = raw.connect(target.port)
            sock.sendall(begun)
            sock.close()


FLOODS: dict[str, Callable[[Target], None]] = {
    flood.__name__: flood
    for flood in (pipelined, tiny_chunks, a_body_without_an_end, a_length_of_a_terabyte, a_bomb, opened_and_left)
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_leaves_nothing_behind(standing: Target, name: str) -> None:
    standing.withstands(lambda: FLOODS[name](standing))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOODS)
def test_a_long_flood_leaves_nothing_behind(standing: Target, name: str) -> None:
    standing.withstands(lambda: FLOODS[name](standing), rounds=10)


def send(sockets: Iterable[socket.socket], byte: bytes) -> None:
    for sock in sockets:
        sock.sendall(byte)


def test_half_requests_on_many_connections_keep_nobody_out(standing: Target) -> None:
    """Slowloris: 500 connections say a letter now and then. Who comes next is answered at once."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(raw.connect(standing.port)) for _ in range(500)]
        send(sockets, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(5):
            send(sockets, b"a")
            with timed(5.0):
                assert standing.ask() == standing.answers
    standing.check()


def test_more_connections_than_are_taken(start: Start) -> None:
    """They are told so, and one that ends makes room."""
    target = start("--max-connections", "40")
    with ExitStack() as stack:
        sockets = [stack.enter_context(raw.connect(target.port, timeout_s=5.0)) for _ in range(60)]
        for sock in sockets[40:]:
            assert raw.statuses(sock.recv(1 << 12)) == [503]
    assert until(lambda: target.http.get("/version").status_code == 200)
    target.check()


# ---- methods and offers


def routes(target: Target) -> list[str]:
    """Of all that the server has, with an id that does not exist where one is asked for."""
    listed = [line.split()[1] for line in target.http.get("/").json()["endpoints"]]
    return sorted({path.replace("{", "").replace("}", "") for path in listed})


def test_no_method_and_no_offer_breaks_any_route(standing: Target) -> None:
    """HEAD, OPTIONS, TRACE, invented methods, WebSocket and h2c on every route: HTTP/1.1 goes on, or it is refused."""
    offers = {
        "websocket": ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
                      "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
    }  # fmt: skip

    def attack() -> None:
        for path in routes(standing):
            requests = [raw.head(method, path) for method in ("HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "PROPFIND")]
            requests += [raw.head("GET", path, *offer) for offer in offers.values()]
            requests += [raw.post(path, b"{}", *offer) for offer in offers.values()]
            for request in requests:
                answer = raw.exchange(standing.port, [request])
                (status,) = raw.statuses(answer)
                assert status in (200, 204) or 400 <= status < 500, f"{path}: {answer[:300]!r}"
                if request.startswith(b"HEAD"):
                    assert answer.endswith(b"\r\n\r\n"), "it has a body"
                if request.startswith(b"TRACE"):
                    assert status in (404, 405) and b"Host" not in answer, f"{path}: {answer[:300]!r}"

    standing.withstands(attack)
