"""A conversation as chat templates know one, made of what protocols with items of their own say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""How the system speaks amid a conversation, where most templates know no system: as a part of what the user says.

It stays where it was said: what stands before it is in the prefix cache.
"""
UNSEEN_IMAGE = "(an image, which this model cannot see)"
"""In the place of one that a tool gave back. The agent goes on, and the model knows what it lacks."""


class Conversation:
    """Grows by what is said. What one speaker says in a row becomes one message: many templates want it so."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        """Where something stood that is left out."""
        self._names: dict[str, str] = {}
        """Of tools, by the ids of their calls."""

    def system(self, text: str) -> None:
        if not text:
            return
        if not self.messages or self.messages[-1]["role"] == "system":
            self._say("system", text)
        else:
            self._say("user", _REMINDER.format(text))

    def user(self, text: str) -> None:
        self._say("user", text)

    def assistant(self, text: str = "", *, thought: str = "", calls: Sequence[dict[str, Any]] = ()) -> None:
        """Texts and thoughts go on where the last ended: they are pieces of one answer."""
        last = self._last("assistant")
        last["content"] += text
        if thought:
            last["reasoning_content"] = last.get("reasoning_content", "") + thought
        if calls:
            last["tool_calls"] = [*last.get("tool_calls", ()), *calls]
            self._names.update((call["id"], call["function"]["name"]) for call in calls)

    def result(self, call_id: str, text: str) -> None:
        """Of a tool that was called."""
        message = {"role": "tool", "tool_call_id": call_id, "content": text}
        if call_id in self._names:
            message["name"] = self._names[call_id]
        self.messages.append(message)

    def ends_with_answer(self) -> bool:
        """Whether the last is a text of the assistant, which is to be continued. One without a word is dropped."""
        last = self.messages[-1] if self.messages else {"role": ""}
        if last["role"] != "assistant" or last.get("tool_calls"):
            return False
        if not last["content"].strip():
            self.messages.pop()
            return False
        return True

    def _last(self, role: str) -> dict[str, Any]:
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": ""})
        return self.messages[-1]

    def _say(self, role: str, text: str) -> None:
        last = self._last(role)
        last["content"] = f"{last['content']}\n{text}" if last["content"] else text


def call(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    """One of a tool; `arguments` are an object, or its JSON."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def function(name: str, description: str | None, parameters: Any) -> dict[str, Any]:
    """A tool that may be called."""
    said = {"description": description} if description else {}
    return {"type": "function", "function": {"name": name, **said, "parameters": parameters or _NO_PARAMETERS}}


_NO_PARAMETERS = {"type": "object", "properties": {}}
