"""Bytes on a socket, as no library for HTTP would send them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterable
from typing import Any

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")


def head(method: str, path: str, *headers: str) -> bytes:
    return "".join(f"{line}\r\n" for line in (f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "")).encode()


def post(path: str, body: Any, *headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sized = (f"Content-Length: {len(data)}", "Content-Type: application/json")
    return head("POST", path, *sized, *headers) + data


def connect(port: int, timeout_s: float = 20.0, receive_bytes: int | None = None) -> socket.socket:
    """`receive_bytes`: a small buffer, for a client that reads slowly or not at all."""
    sock = socket.socket()
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(timeout_s)
    sock.connect(("127.0.0.1", port))
    return sock


def exchange(port: int, pieces: Iterable[bytes], *, end: bool = True, timeout_s: float = 20.0) -> bytes:
    """All that the server says to these bytes until it closes the connection.

    `end`: this side is closed behind them, so that the server need not wait for more.
    """
    answer = bytearray()
    with connect(port, timeout_s) as sock:
        with contextlib.suppress(ConnectionError):  # it has heard enough, and said so
            for piece in pieces:
                sock.sendall(piece)
            if end:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(1 << 16):
                answer += data
    return bytes(answer)


def statuses(answer: bytes) -> list[int]:
    """Of each answer in what was read."""
    return [int(status) for status in _STATUS.findall(answer)]
