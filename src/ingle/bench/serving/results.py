"""The file that a run leaves: `results.json`, whose fields are documented in docs/benchmarking.md.

Times are in seconds from the level's begin, lengths in tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ingle.errors import ConfigError, lack_of_disk

SCHEMA = "ingle-bench-serve/1"
"""The number rises when a field changes its meaning or goes; new fields may come at any time."""
PERCENTS = (0, 1, 2, 5, *range(10, 100, 5), 98, 99, 99.5, 99.9, 100)


class Spread(msgspec.Struct, frozen=True):
    """How a figure is spread over requests, or over tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    quantiles: list[float]
    """At `Report.percents`, for curves."""


class ClientCost(msgspec.Struct, frozen=True):
    """What measuring took of the machine it ran on, and whether that shaped the figures."""

    cpu_s: float
    cpu_share: float
    """Of one processor, over the level. One is all that the client can use."""
    lag_mean_s: float
    lag_p99_s: float
    lag_max_s: float
    """How late the event loop was, for what was due."""
    limited: bool
    """Whether the client was too busy or too late for the figures to be the server's."""


class Figures(msgspec.Struct, frozen=True):
    """A level in numbers. What needs an answered request is None without any."""

    duration_s: float
    """From the first request to the end of the last answer."""
    num_ok: int
    num_errors: int
    errors: dict[str, int]
    """By message."""
    prompt_tokens: int
    """As the server counts them, its template's included; without `usage`, those of the texts."""
    cached_tokens: int | None
    """Of the prompts, that the server had computed before; None where it does not say."""
    output_tokens: int
    counted_by: str
    """usage, tokenizer, or events: by what output tokens were counted."""
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    mean_concurrency: float
    """Requests at once, in the mean over the level."""
    tokens_per_event: float
    """More than one where the server sends several at once."""
    request_tokens_per_s: Spread | None
    """Output tokens of a request by its whole time."""
    ttft_s: Spread | None
    """From sending to the first token."""
    tpot_s: Spread | None
    """Of a request: the time behind its first event by the tokens that came in it."""
    itl_s: Spread | None
    """Between two tokens; an event that brings several shares its time among them."""
    event_gap_s: Spread | None
    """Between two events, whatever they hold."""
    e2e_s: Spread | None
    """Whole requests."""
    short_answers: int = 0
    """Answers that ended before the length that was asked for."""
    goodput_requests_per_s: float | None = None
    goodput_share: float | None = None
    """Of all requests, those that kept the targets; None without targets."""


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One as it went."""

    sent_s: float
    ended_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int = 0
    events: int = 0
    session: int = 0
    turn: int = 0
    error: str | None = None


class LevelResult(msgspec.Struct, frozen=True):
    concurrency: int | None
    rate: float | None
    num_sessions: int
    complete: bool
    begun_unix_s: float
    """When the first request was sent."""
    figures: Figures
    client: ClientCost
    requests: list[Request]

    @property
    def title(self) -> str:
        return str(self.concurrency) if self.rate is None else f"{self.rate:g}/s"


class Report(msgspec.Struct):
    schema: str
    status: str
    """running, complete, or partial: then `stopped` says why, and `--resume` completes it."""
    stopped: str | None
    started: str
    """The time, by ISO 8601."""
    command: list[str]
    settings: dict[str, Any]
    """All flags of `ingle bench serve`, but for the key."""
    server: dict[str, Any]
    client: dict[str, Any]
    """Versions and hardware where the client ran."""
    data: dict[str, Any]
    percents: list[float]
    notices: list[str]
    levels: list[LevelResult]

    @property
    def model(self) -> str:
        return str(self.server.get("model", "?"))


def write(path: Path, report: Report) -> None:
    """In one move, so that a reader never sees half of it. Raises `ConfigError`."""
    text = msgspec.json.format(msgspec.json.encode(report), indent=1)
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(text + b"\n")
        beside.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path}: {lack_of_disk(error) or error.strerror or error}") from None


def read(path: Path) -> Report:
    """Raises `ConfigError` for what is no such file, or of a newer kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    try:
        schema = msgspec.json.decode(content, type=_Kind).schema
        if not schema.startswith("ingle-bench-serve/"):
            raise ConfigError(f"{path}: its schema is {schema!r:.60}, not that of `ingle bench serve`")
        if schema != SCHEMA:
            raise ConfigError(f"{path} was written as {schema!r:.60}; this ingle reads {SCHEMA}")
        return msgspec.json.decode(content, type=Report)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} holds no results of `ingle bench serve`: {error}") from None


class _Kind(msgspec.Struct):
    schema: str
