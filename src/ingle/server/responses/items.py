"""From the items of the Responses API to a conversation."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator, Sequence

from ingle.server.conversation import UNSEEN_IMAGE, Conversation, call
from ingle.server.responses.protocol import (
    AnyItem,
    CallOutputItem,
    CustomCallItem,
    ForeignItem,
    FunctionCallItem,
    ImagePart,
    MessageItem,
    ReasoningItem,
    ReferenceItem,
    RefusalPart,
    TextPart,
)
from ingle.server.responses.tools import full_name

_OPAQUE = "ingle:"


def conversation_of(instructions: str | None, items: Iterable[AnyItem]) -> Conversation:
    made = Conversation()
    if instructions:
        made.system(instructions)
    for item in items:
        match item:
            case MessageItem(role="assistant"):
                made.assistant("".join(_texts(item.content)))
            case MessageItem(role="user"):
                for text in _texts(item.content):
                    made.user(text)
            case MessageItem():
                for text in _texts(item.content):
                    made.system(text)
            case ReasoningItem():
                if thought := _thought(item):
                    made.assistant(thought=thought)
            case FunctionCallItem():
                name = full_name(item.name, item.namespace)
                made.assistant(calls=[call(item.call_id, name, item.arguments or "{}")])
            case CustomCallItem():
                name = full_name(item.name, item.namespace)
                made.assistant(calls=[call(item.call_id, name, {"input": item.input})])
            case CallOutputItem():
                made.result(item.call_id, "\n".join(_texts(item.output)))
                if any(isinstance(part, ImagePart) for part in item.output):
                    made.skipped.append("input[].output[input_image]")
            case ForeignItem():
                made.skipped.append(f"input[{item.type}]")
    return made


def resolved(items: Sequence[AnyItem], find: Callable[[str], AnyItem]) -> list[AnyItem]:
    """With the items themselves in the place of references, as `find` has them."""
    return [find(item.id) if isinstance(item, ReferenceItem) else item for item in items]


def _texts(content: str | Sequence[TextPart | RefusalPart | ImagePart]) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for part in content:
        match part:
            case TextPart():
                yield part.text
            case RefusalPart():
                yield part.refusal
            case ImagePart():
                yield UNSEEN_IMAGE


def _thought(item: ReasoningItem) -> str:
    """What of a thought was given out: its text, or what stands for it."""
    shown = "".join(part.text for part in item.content or ()) or "".join(part.text for part in item.summary)
    return shown or (revealed(item.encrypted_content) if item.encrypted_content else "")


def opaque(thought: str) -> str:
    """A thought as clients send it back that keep none: not secret, but nobody's to read."""
    return base64.b64encode((_OPAQUE + thought).encode(errors="replace")).decode()


def revealed(text: str) -> str:
    """The thought that `opaque` made this of; empty for another server's."""
    try:
        thought = base64.b64decode(text, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return ""
    return thought.removeprefix(_OPAQUE) if thought.startswith(_OPAQUE) else ""
