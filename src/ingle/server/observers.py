"""Who is told of the requests of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from ingle.server.recent import Recent
from ingle.server.request_log import RequestsLog
from ingle.server.statistics import ServerStatistics
from ingle.server.tracing import Tracer


@dataclass(frozen=True)
class Observers:
    statistics: ServerStatistics = field(default_factory=ServerStatistics)
    tracer: Tracer | None = None
    requests: RequestsLog | None = None
    """What they ask for, word for word."""
    recent: Recent = field(default_factory=Recent)
