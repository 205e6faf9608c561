"""What is known of one HTTP request once it is answered, and how the log tells it: a line, as text or as JSON."""

from __future__ import annotations

import logging
import re
import time
from contextvars import ContextVar
from urllib.parse import quote

import msgspec
from starlette.datastructures import Headers
from starlette.types import Scope

from ingle.errors import printable
from ingle.server.access import client_of

access_logger = logging.getLogger("ingle.access")
_requests_logger = logging.getLogger("ingle.requests")

PROBES = ("/health", "/health/live", "/health/ready", "/ping", "/metrics", "/ingle/requests")
_FILES = "/page/"
_MAX_ADDRESS_CHARS, _MAX_PATH_CHARS = 64, 512
_TRACE_PARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
"""W3C Trace Context: version, trace, span of the caller, flags, and what later versions may add."""
_MAX_TRACE_PARENT_CHARS = 256


class Trace(msgspec.Struct, frozen=True):
    """Where a request stands in the trace of its caller, as W3C's `traceparent` says it."""

    trace_id: str
    parent_id: str
    """The caller's span."""
    sampled: bool

    @classmethod
    def of(cls, headers: Headers) -> Trace | None:
        """None without the header, and for one that is none."""
        given = headers.getlist("traceparent")
        if len(given) != 1 or len(given[0]) > _MAX_TRACE_PARENT_CHARS:
            return None
        match = _TRACE_PARENT.fullmatch(given[0].strip())
        if match is None or (given[0].startswith("00") and match[4]):
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1))


class RequestRecord(msgspec.Struct):
    """Filled in as the request goes its way; whoever has the first word says who asks, the engine's side the rest."""

    id: str
    """As its answer carries it in `X-Request-Id`."""
    method: str
    path: str
    """As it was sent, quoted; the beginning of a long one."""
    started_s: float = msgspec.field(default_factory=time.perf_counter)
    route: str = ""
    """The application's for this path, with its parameters' names."""
    status: int = 0
    """499 of a client that left before its answer, 0 where there was none."""
    duration_s: float = 0.0
    address: str = ""
    client: str = ""
    """The name of the key that it brought."""
    trace: Trace | None = None
    model: str = ""
    answer_id: str = ""
    """With which the engine's names for its requests begin."""
    streamed: bool = False
    num_choices: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    queue_s: float | None = None
    """That the first of its requests to the engine waited there."""
    ttft_s: float | None = None
    """From its arrival to its first token."""
    finish_reasons: list[str] = []
    """Of its choices, no two alike."""
    aborted: bool = False
    """Its client left before all of the answer was out."""

    def begun(self, first_s: float | None, num_cached_tokens: int, queued_s: float | None) -> None:
        """A request to the engine has its first token, if it is to have any, at `first_s`."""
        self.cached_tokens = (self.cached_tokens or 0) + num_cached_tokens
        if first_s is not None and self.ttft_s is None:
            self.ttft_s = first_s - self.started_s
        if queued_s is not None and self.queue_s is None:
            self.queue_s = queued_s

    def ended(self, reason: str, num_tokens: int) -> None:
        self.output_tokens = (self.output_tokens or 0) + num_tokens
        if reason not in self.finish_reasons:
            self.finish_reasons = [*self.finish_reasons, reason]

    def answered(self, scope: Scope, status: int, *, cut_off: bool) -> None:
        """All of it is out that will be."""
        self.route, self.status = route_of(scope), status
        self.duration_s = time.perf_counter() - self.started_s
        self.client = client_of(scope).name
        self.aborted = cut_off

    def fields(self) -> dict[str, object]:
        """For a line of JSON."""
        told = msgspec.structs.asdict(self)
        del told["started_s"], told["trace"]
        if self.trace is not None:
            told |= {"trace_id": self.trace.trace_id, "parent_id": self.trace.parent_id}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in told.items()
            if value not in (None, "", [])
        }

    def line(self) -> str:
        """For people."""
        who = f"{self.address or '-'} {self.client}".rstrip()
        line = f'{who} "{self.method} {self.path}" {self.status} {self.duration_s * 1000:.0f} ms {self.id}'
        if self.output_tokens is None:
            return line
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        first = f", first after {self.ttft_s * 1000:.0f} ms" if self.ttft_s is not None else ""
        tokens = f"{self.prompt_tokens or 0}{cached} + {self.output_tokens} tokens{first}"
        return f"{line} {tokens}, {' and '.join(self.finish_reasons)}"


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)
"""Of the HTTP request at hand; None where there is none, as for the lines of a batch."""


def begin_record(scope: Scope, request_id: str) -> RequestRecord:
    client = scope.get("client")
    return RequestRecord(
        request_id,
        scope["method"],
        quote(scope["path"][:_MAX_PATH_CHARS])[:_MAX_PATH_CHARS],
        address=printable(client[0])[:_MAX_ADDRESS_CHARS] if client else "",  # which a proxy may have told
        trace=Trace.of(Headers(scope=scope)),
    )


def route_of(scope: Scope) -> str:
    """The application's for the path that was asked for; empty where it has none."""
    route, app = scope.get("route"), scope.get("app")
    if route is None and app is not None:  # it was refused before it came there, or its method was
        route = next((each for each in app.routes if each.path_regex.match(scope["path"])), None)
    return getattr(route, "path", "")


def log_access(record: RequestRecord) -> None:
    """A probe that found all well is told at `debug`: they come every few seconds, as long as the server runs. So are
    the files of a page, of which there are dozens."""
    is_usual = (record.status == 200 and record.route in PROBES) or (
        record.status in (200, 304) and record.route.startswith(_FILES)
    )
    access_logger.log(logging.DEBUG if is_usual else logging.INFO, "%s", record.line(), extra={"record": record})


class RequestsLog:
    """What requests ask for, word for word, for who has asked to see that: `--log-requests`."""

    def __init__(self, max_chars: int) -> None:
        self._max_chars = max_chars

    def tell(self, request_id: str, path: str, body: bytes) -> None:
        shown = printable(body[: 4 * self._max_chars].decode(errors="replace")[: self._max_chars])
        more = f" … ({len(body)} bytes)" if len(shown) < len(body) and len(body) > self._max_chars else ""
        _requests_logger.info("request %s for %s: %s%s", request_id, path, shown, more)
