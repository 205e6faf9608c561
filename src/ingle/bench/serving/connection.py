"""HTTP as cheap as it gets: what the client costs is taken from the server where both share a machine.

Bytes go from the socket through httptools' parser to whoever reads the answer, in one call, without a task in between.
A connection holds one request at a time and is kept for the next.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import Protocol

import httptools

from ingle.bench.serving.address import Address

_MAX_HEADER_BYTES = 1 << 16
_CONNECT_S = 30.0


class ServerGone(Exception):
    """Nobody listens there."""


class AnswerBroken(Exception):
    """The answer ended in its middle, or is no HTTP."""


class Sink(Protocol):
    """Reads an answer."""

    def begin(self, status: int, headers: Mapping[bytes, bytes]) -> None: ...

    def feed(self, chunk: bytes, at: float) -> None:
        """`at`: when it came, by `time.perf_counter()`. What it raises ends the request."""


class _Connection(asyncio.Protocol):
    """Its methods without an underscore are those that asyncio and httptools call."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.usable = True
        self.answered = False
        """Whether a byte of the answer came."""
        self._done: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._ends_with_connection and error is None:
            self._finish()
        else:
            self._fail(AnswerBroken(f"the server closed the connection{_reason(error)}"))

    async def ask(self, request: bytes, sink: Sink) -> None:
        """Returns when the whole answer was read."""
        assert self.transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._ends_with_connection = self.answered = False
        self._sink, self._done = sink, asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            await self._done
        except BaseException:
            self.close()
            raise
        finally:
            self._sink = self._done = None

    _ends_with_connection = False

    def close(self) -> None:
        self.usable = False
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._done is None:  # said without being asked
            self.close()
            return
        self._now, self.answered = time.perf_counter(), True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, AnswerBroken) else AnswerBroken(f"the answer is no HTTP: {error}"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise AnswerBroken(f"the answer has more than {_MAX_HEADER_BYTES} bytes of headers")
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._sink is not None
        if self._parser.get_status_code() < 200:
            return
        framed = b"content-length" in self._headers or b"chunked" in self._headers.get(b"transfer-encoding", b"")
        self._ends_with_connection = not framed
        self._sink.begin(self._parser.get_status_code(), self._headers)

    def on_body(self, chunk: bytes) -> None:
        assert self._sink is not None
        self._sink.feed(chunk, self._now)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 100 Continue
            self._headers.clear()
            return
        self.usable = self.usable and self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _fail(self, error: BaseException) -> None:
        self.usable = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


def _reason(error: Exception | None) -> str:
    return "" if error is None else f": {error}"


class Client:
    """One server's, with connections that are kept."""

    def __init__(
        self, address: Address, *, api_key: str | None = None, timeout_s: float = 600.0, insecure: bool = False
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []
        self._tls = _tls(insecure) if address.tls else None
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"Host: {address.authority}\r\nUser-Agent: ingle-bench\r\nAccept: */*\r\n"
            f"Content-Type: application/json\r\n{key}"
        )

    async def ask(self, method: str, path: str, body: bytes, sink: Sink) -> None:
        """Raises `ServerGone`, `AnswerBroken`, and `TimeoutError` after the seconds that this client waits."""
        head = f"{method} {path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        while True:
            self._idle = [connection for connection in self._idle if connection.usable]  # the server closes them too
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            deadline = asyncio.get_running_loop().call_later(
                self._timeout_s, connection._fail, TimeoutError(f"no end of the answer within {self._timeout_s:g} s")
            )
            try:
                await connection.ask(request, sink)
            except AnswerBroken:
                if kept and not connection.answered:  # which the server had closed in the meantime
                    continue
                raise
            finally:
                deadline.cancel()
            if connection.usable:
                self._idle.append(connection)
            else:
                connection.close()
            return

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> _Connection:
        loop, address = asyncio.get_running_loop(), self.address
        try:
            if address.socket is not None:
                made = loop.create_unix_connection(_Connection, address.socket)
            else:
                made = loop.create_connection(_Connection, address.host, address.port, ssl=self._tls)
            _, connection = await asyncio.wait_for(made, _CONNECT_S)
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or error
            raise ServerGone(f"no TLS with {address}: {why}; --insecure takes any certificate") from None
        except (OSError, TimeoutError, asyncio.TimeoutError) as error:
            said = getattr(error, "strerror", None) or str(error) or f"no connection within {_CONNECT_S:g} s"
            raise ServerGone(f"no server answers at {address}: {said}") from None
        return connection


def _tls(insecure: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
