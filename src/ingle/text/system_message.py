"""A system message for templates that take none: its text stands before that of the first user message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ingle.errors import RequestError

UNSUPPORTED = "system_role_unsupported"
_ROLES = ("system", "developer")
_ADVICE = "--merge-system (merge_system=True) puts a system message before the first user message, which it takes"


def num_leading_system(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many system messages the conversation begins with."""
    return next((index for index, each in enumerate(messages) if each.get("role") not in _ROLES), len(messages))


def merged(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with its leading system messages at the beginning of the first user message.

    Where an assistant speaks first, or nobody does, they are a user message of their own.
    """
    count = num_leading_system(messages)
    text = "\n\n".join(filter(None, (_text(message.get("content")) for message in messages[:count])))
    rest = list(messages[count:])
    if not text and rest:
        return rest
    if not rest or rest[0].get("role") != "user":
        return [{"role": "user", "content": text}, *rest]
    return [{**rest[0], "content": _after(text, rest[0].get("content"))}, *rest[1:]]


def advised(error: RequestError) -> RequestError:
    """The error of a template that takes the conversation once its system message is merged."""
    message = f"{str(error).rstrip('.')}. {_ADVICE}"
    return RequestError(message, param=error.param, code=error.code or UNSUPPORTED, status=error.status)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, Mapping) and "text" in part)
    return content if isinstance(content, str) else ""


def _after(text: str, content: Any) -> Any:
    if isinstance(content, list):
        return [{"type": "text", "text": text}, *content]
    return f"{text}\n\n{content}" if content else text
