"""What a server tells of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ingle.errors import ConfigError

LogFormat = Literal["text", "json"]


@dataclass(frozen=True)
class MonitoringConfig:
    """What a server tells of itself, beside GET /metrics."""

    log_format: LogFormat = "text"
    """json: each line of the log is a JSON object, and that of a request has its tokens and times as fields."""
    log_requests: bool = False
    """Log what requests say, prompts included. Default: nobody's prompts are written anywhere."""
    max_log_len: int = 1000
    """Most characters of a request that --log-requests writes."""
    disable_log_stats: bool = False
    """Do not log how the engine stands, which is done every ten seconds while requests run."""
    otlp_traces_endpoint: str | None = None
    """Send a span of each request to this OpenTelemetry collector, such as http://localhost:4317; its packages come
    with ingle[otel]."""

    def __post_init__(self) -> None:
        if self.log_format not in get_args(LogFormat):
            raise ConfigError(f"--log-format {self.log_format!r} is not one of {', '.join(get_args(LogFormat))}")
        if not isinstance(self.max_log_len, int) or self.max_log_len < 1:
            raise ConfigError(f"--max-log-len {self.max_log_len!r} is not a number of characters: give 1 or more")
