"""Errors as Anthropic's clients read them: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from ingle.server.errors import Dialect, ErrorBody, ErrorDetail, current_request_id
from ingle.server.streaming import named_event

OVERLOADED = 529
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""By status; what is not here is `invalid_request_error`, or `api_error` from 500 on."""
_TOO_LONG = re.compile(r"length is (\d+) tokens, but the prompt has (\d+) tokens")


class AnthropicErrorDetail(msgspec.Struct):
    type: str
    message: str


class AnthropicError(msgspec.Struct):
    error: AnthropicErrorDetail
    request_id: str
    type: Literal["error"] = "error"


def anthropic_error(status: int, detail: ErrorDetail) -> AnthropicError:
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return AnthropicError(AnthropicErrorDetail(kind, _message(detail)), current_request_id.get())


def _message(detail: ErrorDetail) -> str:
    """In the words by which Claude Code knows that it should shorten the conversation."""
    if detail.code != "context_length_exceeded":
        return detail.message
    found = _TOO_LONG.search(detail.message)
    numbers = f" {found[2]} tokens > {found[1]} maximum." if found else ""
    return f"prompt is too long:{numbers} {detail.message}"


def _status(status: int) -> int:
    return OVERLOADED if status == 503 else status


def error_event(status: int, body: ErrorBody) -> bytes:
    """The last event of a stream that cannot go on."""
    return named_event("error", anthropic_error(_status(status), body.error))


ANTHROPIC = Dialect(_status, anthropic_error, "request-id")
