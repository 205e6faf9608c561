"""What was asked lately, and how long it took; not what was said."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from ingle.server.request_log import RequestRecord

_MAX_ENDED = 100


class RecentRequest(msgspec.Struct, kw_only=True):
    """Times are in seconds; what is not known yet, or never will be, is null."""

    id: str
    started: float
    """Unix seconds."""
    route: str
    model: str
    client: str
    """The name of its key."""
    status: int | None
    """Null while it is answered."""
    streamed: bool
    duration_s: float
    queue_s: float | None
    ttft_s: float | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    finish_reasons: list[str]
    aborted: bool


class RecentRequests(msgspec.Struct, kw_only=True):
    running: list[RecentRequest]
    ended: list[RecentRequest]
    """The newest first."""


class Recent:
    """Keeps the last requests that asked a model for something."""

    def __init__(self) -> None:
        self._running: dict[int, RequestRecord] = {}
        self._ended: deque[RequestRecord] = deque(maxlen=_MAX_ENDED)

    def begin(self, record: RequestRecord) -> None:
        self._running[id(record)] = record

    def end(self, record: RequestRecord) -> None:
        self._running.pop(id(record), None)
        if record.model:
            self._ended.append(record)

    def told(self) -> RecentRequests:
        now_s, now = time.perf_counter(), time.time()
        running = [_told(each, now_s, now) for each in self._running.values() if each.model]
        return RecentRequests(running=running[::-1], ended=[_told(each, now_s, now) for each in reversed(self._ended)])


def _told(record: RequestRecord, now_s: float, now: float) -> RecentRequest:
    age_s = now_s - record.started_s
    return RecentRequest(
        id=record.id,
        started=now - age_s,
        route=record.route or record.path,
        model=record.model,
        client=record.client,
        status=record.status or None,
        streamed=record.streamed,
        duration_s=record.duration_s or age_s,
        queue_s=record.queue_s,
        ttft_s=record.ttft_s,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        output_tokens=record.output_tokens,
        finish_reasons=record.finish_reasons,
        aborted=record.aborted,
    )
