"""HTTP/1.1 on one connection, within limits. uvicorn's own protocol for the same parser has none of these:

- limits before anything is asked of the application: bytes and number of headers, time for a header, for a body and
  between requests, open connections in all and of one address, requests and bytes behind an unfinished answer;
- an offer to upgrade (`Upgrade: h2c`, websocket) is not taken, and its request is read like any other: the parser
  stops after such a header, takes the body for another protocol, and uvicorn drops it or reads it as a request;
- the connection is read while an answer is made, whatever lies behind the request, so that a client's end is seen;
- a client that has ended its side only still gets its answer, and one that has gone is told from it
  (`Exchange.write_ahead`);
- HTTP/1.0 gets no chunks; an error waits its turn behind answers that are on their way, and is not cut off by a reset.

What it shares with uvicorn is how `uvicorn.Server` makes, counts and ends connections.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

import httptools
from starlette.types import Scope

from ingle.errors import RequestError
from ingle.server.errors import describe, error_response, logger
from ingle.server.http_exchange import Exchange, Headers
from ingle.server.http_limits import Counted, HttpLimits

if TYPE_CHECKING:
    import uvicorn
    from uvicorn.server import ServerState

_PIECE_BYTES = 16 * 1024
"""What the parser is given at a time, and so what a limit may be missed by."""
_HEADER_BYTES = 160
"""What Python's objects for a header take besides its text."""
_LINGER_S = 2.0
"""For a client to read why it was refused, before what it still sends is met by a reset."""
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\nretry-after: 5\r\n\r\n"
    b'{"error":{"message":"The server has as many connections as it takes (--max-connections).","type":"server_error",'
    b'"param":null,"code":"too_many_connections"}}'
)
_MIN_LOOK_S, _MAX_LOOK_S = 0.02, 0.5
"""Between two looks whether a client that sends no more is still there."""


class Refused(Exception):
    """What the connection itself answers, whatever the application says."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.error = RequestError(message, status=status, code=code)


class Connection(asyncio.Protocol):
    """Reads requests, hands them to the application one after the other, and writes the answers in their order."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: HttpLimits,
        open_connections: Counted,
    ) -> None:
        self._app = config.loaded_app
        self._app_state = app_state
        self._state = server_state
        self._loop = _loop or asyncio.get_running_loop()
        self._limits = limits
        self._open = open_connections
        self._address = ""
        self._counted = False
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._stall_timer: asyncio.TimerHandle | None = None
        self._paused = False
        """Nothing is read, since the application takes a body more slowly than it comes."""

        self._num_head_bytes = 0
        """Of a header, or of what stands between the parts of a body: bytes since the last of a body."""
        self._in_head = False
        self._upgrade_offered = False
        self._receiving: Exchange | None = None
        """Whose body is still to come, or to end."""
        self._exchanges: deque[Exchange] = deque()
        """The first is being answered; the others wait."""
        self._num_bytes_ahead = 0
        """What the requests take that wait behind the one that is being answered."""
        self._dropping = False
        """What comes is read, so that the end is seen, and dropped."""
        self._dropped = False
        """Something was."""
        self._ended = False
        """The client sends no more."""

    # What uvicorn's server calls.

    def shutdown(self) -> None:
        """No request is taken after those that are here."""
        if self._exchanges:
            self._exchanges[-1].keep_alive = False
        else:
            self._transport.close()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods alone
        self._server = _address(transport.get_extra_info("sockname"))
        self._client = _address(transport.get_extra_info("peername"))
        self._is_secure = transport.get_extra_info("sslcontext") is not None
        self._address = self._client[0] if self._client else ""
        most = self._limits.max_written_bytes
        self._transport.set_write_buffer_limits(high=most, low=most // 4)
        self._state.connections.add(self)  # type: ignore[arg-type]  # a set of uvicorn's own protocols
        self._counted = self._open.enter(self._address)
        if self._counted:
            self._arm(self._limits.header_s, self._head_is_late)
        else:
            self._transport.write(_TOO_MANY)
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        start = 0
        while start < len(data):
            if self._dropping:
                self._dropped = True
                return
            room = self._limits.max_header_bytes - self._num_head_bytes
            piece = data[start : start + min(room, _PIECE_BYTES)]
            start += len(piece)
            self._num_head_bytes += len(piece)
            self._parse(piece)
            if self._num_head_bytes >= self._limits.max_header_bytes and not self._dropping:
                message = f"The headers take {self._num_head_bytes} bytes or more (--max-header-bytes)."
                self._stop_reading(Refused(431, message, "headers_too_large"))

    def eof_received(self) -> bool:
        """Whether to keep the other direction open: a client may end its own side and wait for its answer."""
        self._ended = True
        if self._receiving is not None:
            self._stop_reading(Refused(400, "The connection was closed within the request's body.", "body_incomplete"))
        self._dropping = True
        self._disarm()
        if not self._exchanges:
            return False
        if self._is_secure:
            return False  # TLS has no half-closed connections
        self._look_for_client(self._loop.time(), next_byte_s=0.0)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        if self._counted:
            self._open.leave(self._address)
        self._state.connections.discard(self)
        self._dropping = True
        self._disarm()
        self.resume_writing()
        for exchange in self._exchanges:
            exchange.disconnect()
        del self._parser  # which has this connection's methods: the two would stay until the collector comes by

    def pause_writing(self) -> None:
        """Ours is full. A client that takes a few bytes now and then does not empty it."""
        self._writable.clear()
        self._stall_timer = self._loop.call_later(self._limits.slow_reader_s, self._cut_off)

    def resume_writing(self) -> None:
        self._writable.set()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _cut_off(self) -> None:
        self._stall_timer = None
        logger.warning(
            "cut off %s: it has not read what waits for it in %g s (--slow-reader-timeout)",
            self._address, self._limits.slow_reader_s,
        )  # fmt: skip
        self.abort()

    # What the parser calls. An exception here reaches `_parse` as the context of the parser's own.

    def on_message_begin(self) -> None:
        self._in_head = True
        self._url = b""
        self._headers: Headers = []
        self._arm(self._limits.header_s, self._head_is_late)

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # behind a chunked body; nothing here reads those
        if len(self._headers) == self._limits.max_headers:
            message = f"There are more than {self._limits.max_headers} headers (--max-header-count)."
            raise Refused(431, message, "headers_too_large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        method, version = self._parser.get_method().decode("ascii"), self._parser.get_http_version()
        if method == "CONNECT" or version not in ("1.0", "1.1"):
            raise Refused(501, f"{method} with HTTP/{version} is not supported.", "not_supported")
        if self._parser.should_upgrade():
            self._upgrade_offered = True
            return
        scope = self._scope(method, version)
        self._in_head = False
        self._num_head_bytes = 0
        if self._exchanges:
            self._num_bytes_ahead += len(self._url) + sum(len(n) + len(v) + _HEADER_BYTES for n, v in self._headers)
            if len(self._exchanges) > self._limits.max_pipelined or self._too_much_ahead():
                self._take_no_more()
                return
        self._receiving = Exchange(
            self,
            scope,
            self._app,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expects_continue=version == "1.1" and (b"expect", b"100-continue") in _lowered(self._headers),
        )
        self._arm(self._limits.body_s, self._body_is_late)
        self._enqueue(self._receiving)

    def on_body(self, body: bytes) -> None:
        exchange = self._receiving
        if exchange is None:
            return
        self._num_head_bytes = 0
        exchange.feed(body)
        if exchange is not self._exchanges[0]:
            self._num_bytes_ahead += len(body)
            if self._too_much_ahead():
                self._exchanges.pop()
                self._receiving = None
                self._take_no_more()

    def on_message_complete(self) -> None:
        if self._upgrade_offered or self._receiving is None:
            return
        exchange, self._receiving = self._receiving, None
        self._num_head_bytes = 0
        exchange.end_body()
        self._disarm()
        if not exchange.keep_alive:
            self._dropping = True

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline_upgrade(data[offer.args[0] :])
        except httptools.HttpParserError as error:
            if self._dropping:
                return  # more after a request that was said to be the last
            cause = error.__context__
            if isinstance(cause, Refused):
                self._stop_reading(cause)
            else:
                self._stop_reading(Refused(400, f"The request is not valid HTTP: {error}.", "bad_request"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Reads the request once more as if it had offered nothing: its body follows, framed as its header says."""
        self._upgrade_offered = False
        lines = [b"%s %s HTTP/%s" % (self._parser.get_method(), self._url, self._parser.get_http_version().encode())]
        lines += [b"%s: %s" % header for header in self._headers if header[0] != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._parse(b"".join(line + b"\r\n" for line in [*lines, b""]))
        if rest and not self._dropping:
            self._parse(rest)

    def _scope(self, method: str, version: str) -> Scope:
        target = b"/*" if self._url == b"*" else self._url
        try:
            url = httptools.parse_url(target)
            path = url.path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
            raise Refused(400, f"The request's target is not a URL: {target[:80]!r}.", "bad_request") from None
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self._server,
            "client": self._client,
            "scheme": "https" if self._is_secure else "http",
            "method": method,
            "root_path": "",
            "path": unquote(path),
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self._headers,
            "state": self._app_state.copy(),
        }

    # Requests and their answers, in their order.

    def _enqueue(self, exchange: Exchange) -> None:
        self._exchanges.append(exchange)
        if len(self._exchanges) == 1:
            self._start(exchange)

    def _start(self, exchange: Exchange) -> None:
        task = self._loop.create_task(exchange.run())
        task.add_done_callback(self._state.tasks.discard)
        self._state.tasks.add(task)

    def answered(self, exchange: Exchange) -> None:
        self.resume()
        self._state.total_requests += 1
        self._exchanges.popleft()
        self._num_bytes_ahead = 0
        if not exchange.keep_alive or (self._ended and not self._exchanges):
            if exchange.body_complete and not self._dropped:
                self._transport.close()
            else:
                self._linger()
        elif self._exchanges:
            self._start(self._exchanges[0])
        elif not self._in_head:
            self._arm(self._limits.keep_alive_s, self._transport.close)

    def _stop_reading(self, refused: Refused) -> None:
        """Nothing that comes can be understood any more. The request that this befalls is told why."""
        if self._receiving is None:
            self._refuse(refused)
        else:
            self._receiving.fail(refused.error)
            self._receiving = None
        self._dropping = True
        self._disarm()

    def _refuse(self, refused: Refused) -> None:
        """Answers with an error, after the answers that are on their way, and closes the connection."""
        self._dropping = True
        self._in_head = False
        response = error_response(*describe(refused.error))
        scope = {"type": "http", "method": "GET", "http_version": "1.1"}
        self._enqueue(Exchange(self, scope, response, keep_alive=False, expects_continue=False))

    def _too_much_ahead(self) -> bool:
        return self._num_bytes_ahead > self._limits.max_pipelined_bytes

    def _take_no_more(self) -> None:
        """What lies behind the last request is too much to be kept: it is dropped, and the connection ends with it."""
        self._dropping = self._dropped = True
        self._exchanges[-1].keep_alive = False
        self._disarm()

    def _linger(self) -> None:
        """Ends this side and reads on for a while: a reset would take from the client what it has not read yet."""
        self._dropping = True
        if self._ended or self._transport.is_closing():
            self._transport.close()
            return
        if not self._is_secure:
            self._transport.write_eof()
        self._arm(_LINGER_S, self._transport.close)

    def _look_for_client(self, ended_at: float, next_byte_s: float) -> None:
        """Finds out whether a client that sends no more waits for its answer, or has gone.

        Both look alike until it is sent something. The bytes for that are few, so each comes after twice the time.
        """
        if self._transport.is_closing() or not self._exchanges:
            return
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), 0)  # errors and hang-ups are always told
        if poll.poll(0):
            self._transport.abort()
            return
        waited_s = self._loop.time() - ended_at
        if waited_s >= next_byte_s:
            self._exchanges[0].write_ahead()
            next_byte_s = max(2 * waited_s, _MIN_LOOK_S)
        pause_s = min(max(waited_s / 8, _MIN_LOOK_S), _MAX_LOOK_S)
        self._loop.call_later(pause_s, self._look_for_client, ended_at, next_byte_s)

    # What an exchange asks for.

    @property
    def default_headers(self) -> Headers:
        return self._state.default_headers

    def write(self, data: bytes) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def pause(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    async def drain(self) -> None:
        await self._writable.wait()

    def abort(self) -> None:
        self._transport.abort()

    # Time.

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        if self._in_head:
            seconds = self._limits.header_s
            message = f"The headers did not arrive within {seconds:g} s (--header-timeout)."
            self._refuse(Refused(408, message, "request_timeout"))
        else:
            self._transport.close()

    def _body_is_late(self) -> None:
        seconds = self._limits.body_s
        message = f"The body did not arrive within {seconds:g} s (--body-timeout)."
        self._stop_reading(Refused(408, message, "request_timeout"))


def _address(name: object) -> tuple[str, int] | None:
    """Host and port. A Unix socket has neither."""
    return (name[0], name[1]) if isinstance(name, tuple) else None


def _lowered(headers: Headers) -> Headers:
    return [(name, value.lower()) for name, value in headers]
