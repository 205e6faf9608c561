"""One request and its answer: what the application receives and sends, framed as HTTP/1.1 or HTTP/1.0."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from ingle.errors import RequestError
from ingle.server.errors import logger

Headers = list[tuple[bytes, bytes]]

_ANY_ANSWER = b"HTTP/1.1 "
"""How every answer begins."""
_MAX_ZEROS = 4
"""Most zeros before a chunk's length. HTTP allows any number; some clients take lengths of 16 digits at most."""
_NO_BODY = (204, 304)
_MAX_UNREAD_BYTES = 256 * 1024
"""Of a body that comes faster than the application reads it, as a file comes faster than a disk writes: then the client
waits."""


class Wire(Protocol):
    """What an exchange needs of its connection."""

    @property
    def default_headers(self) -> Headers: ...

    def write(self, data: bytes) -> None: ...

    async def drain(self) -> None:
        """Waits until the client has read enough of what was written, or is gone."""
        ...

    def pause(self) -> None:
        """Reads no more, until `resume` or until the answer is whole. Both may be said twice."""
        ...

    def resume(self) -> None: ...

    def answered(self, exchange: Exchange) -> None:
        """The exchange's answer is whole."""
        ...

    def abort(self) -> None:
        """Closes the connection at once: what was sent of an answer stays unfinished."""
        ...


class Exchange:
    """A request as ASGI hands it to the application. The connection feeds its body; the application answers."""

    def __init__(self, wire: Wire, scope: Scope, app: ASGIApp, *, keep_alive: bool, expects_continue: bool) -> None:
        self.keep_alive = keep_alive
        """Whether the connection takes another request after this answer."""
        self.body_complete = False
        self.complete = False
        """The answer is whole."""
        self._wire = wire
        self._scope = scope
        self._app = app
        self._expects_continue = expects_continue
        self._body = bytearray()
        self._body_delivered = False
        self._failure: RequestError | None = None
        self._gone = False
        self._changed = asyncio.Event()
        self._started = False
        self._chunked = False
        self._num_ahead = 0

    async def run(self) -> None:
        try:
            await self._app(self._scope, self.receive, self.send)
        except Exception as error:
            logger.error("an answer was left unfinished", exc_info=error)
        finally:
            if not self.complete:
                self._wire.abort()

    def feed(self, body: bytes) -> None:
        self._expects_continue = False
        if not self.complete:
            self._body += body
            self._changed.set()
            if len(self._body) > _MAX_UNREAD_BYTES:
                self._wire.pause()

    def end_body(self) -> None:
        self._expects_continue = False
        self.body_complete = True
        self._changed.set()

    def fail(self, error: RequestError) -> None:
        """The rest of the body will not come: whoever reads it gets `error`, and may answer with it."""
        self._expects_continue = False
        self._failure = error
        self._changed.set()

    def disconnect(self) -> None:
        """The client is gone."""
        self._gone = True
        self._changed.set()

    def write_ahead(self) -> None:
        """Writes the next byte that the answer will have whatever it says, if there is one.

        A client that has closed its socket refuses it, and that is how one learns that it has gone. For others it is
        a part of the answer: of the words it begins with, or a zero before a chunk's length.
        """
        if not self._started:
            byte = _ANY_ANSWER[self._num_ahead : self._num_ahead + 1]
        else:
            byte = b"0" if self._chunked and self._num_ahead < _MAX_ZEROS else b""
        self._num_ahead += len(byte)
        self._wire.write(byte)

    async def receive(self) -> Message:
        if self._expects_continue:
            self._expects_continue = False
            self._wire.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while True:
            if self._gone or self.complete:
                return {"type": "http.disconnect"}
            if self._body or (self.body_complete and not self._body_delivered):
                body = bytes(self._body)
                self._body.clear()
                self._wire.resume()
                self._body_delivered = self.body_complete
                return {"type": "http.request", "body": body, "more_body": not self.body_complete}
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()

    async def send(self, message: Message) -> None:
        await self._wire.drain()
        if self._gone:
            return
        if message["type"] == "http.response.start":
            self._write_head(message["status"], message.get("headers", ()))
        else:
            self._write_body(message.get("body", b""), message.get("more_body", False))

    def _write_head(self, status: int, given: Headers) -> None:
        headers = [*self._wire.default_headers, *((name.lower(), value) for name, value in given)]
        names = {name for name, _ in headers}
        sized = b"content-length" in names or status in _NO_BODY or self._scope["method"] == "HEAD"
        # HTTP/1.0 knows no chunks: there a body of unknown length ends with the connection.
        self._chunked = not sized and self._scope["http_version"] == "1.1"
        if self._chunked:
            headers.append((b"transfer-encoding", b"chunked"))
        # What is left of a body that nobody reads is no reason to keep a connection.
        if not (sized or self._chunked) or not self.body_complete or (b"connection", b"close") in headers:
            self.keep_alive = False
        if not self.keep_alive and b"connection" not in names:
            headers.append((b"connection", b"close"))
        if any(b"\r" in part or b"\n" in part for header in headers for part in header):
            raise ValueError(f"a header of an answer holds a line break: {headers}")
        lines = [b"%s%d %s" % (_ANY_ANSWER, status, _phrase(status)), *(b"%s: %s" % header for header in headers)]
        self._wire.write(b"".join(line + b"\r\n" for line in [*lines, b""])[self._num_ahead :])
        self._started, self._num_ahead, self._expects_continue = True, 0, False

    def _write_body(self, body: bytes, more: bool) -> None:
        if self._scope["method"] == "HEAD":
            body = b""
        if self._chunked:
            body = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
            if not more:
                body += b"0\r\n\r\n"
        if body:
            self._num_ahead = 0
            self._wire.write(body)
        if not more:
            self.complete = True
            self._body.clear()
            self._changed.set()
            self._wire.answered(self)


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
