"""From the messages of Anthropic's API to those that chat templates know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ingle.server.anthropic.protocol import (
    AnyBlock,
    DocumentBlock,
    ForeignBlock,
    InputMessage,
    InputTool,
    MessagesInput,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ingle.text.changing_lines import without_changing_lines

_REMINDER = "<system-reminder>\n{}\n</system-reminder>"
"""How the system speaks amid a conversation, where templates know no system: as a part of what the user says."""


@dataclass
class Conversation:
    messages: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Where blocks were that are left out."""


def conversation_of(body: MessagesInput) -> Conversation:
    """The system's text first; what one speaker says in several messages becomes one."""
    made = Conversation()
    system = [_system_text(body.system)]
    rest = list(body.messages)
    while rest and rest[0].role == "system":
        system.append(_system_text(rest.pop(0).content))
    if text := "\n".join(filter(None, system)):
        made.messages.append({"role": "system", "content": text})
    names = {b.id: b.name for message in rest for b in _blocks(message.content) if isinstance(b, ToolUseBlock)}
    for message in rest:
        foreign = (block.type for block in _blocks(message.content) if isinstance(block, ForeignBlock))
        made.skipped += (f"messages[].content[{kind}]" for kind in foreign)
        if message.role == "assistant":
            _add_assistant(made.messages, message)
        elif message.role == "system":
            _add_text(made.messages, "user", _REMINDER.format(_system_text(message.content)))
        else:
            _add_user(made.messages, message, names)
    return made


def tools_of(tools: Sequence[InputTool] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Functions as chat templates know them, and where tools were that are left out."""
    functions, skipped = [], []
    for tool in tools or ():
        if not tool.is_custom:
            skipped.append(f"tools[{tool.type}]")
            continue
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        function["parameters"] = tool.input_schema
        functions.append({"type": "function", "function": function})
    return functions, skipped


def _blocks(content: str | list[AnyBlock]) -> Sequence[AnyBlock]:
    return () if isinstance(content, str) else content


def _system_text(content: str | Sequence[AnyBlock]) -> str:
    texts = [content] if isinstance(content, str) else [b.text for b in content if isinstance(b, TextBlock)]
    return "\n".join(filter(None, map(without_changing_lines, texts)))


def _add_text(messages: list[dict[str, Any]], role: str, text: str) -> None:
    if messages and messages[-1]["role"] == role:
        messages[-1]["content"] += "\n" + text
    else:
        messages.append({"role": role, "content": text})


def _add_user(messages: list[dict[str, Any]], message: InputMessage, names: dict[str, str]) -> None:
    """Results of tools stand right behind their calls, before what else the user says."""
    if isinstance(message.content, str):
        _add_text(messages, "user", message.content)
        return
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            result = {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result_text(block)}
            if block.tool_use_id in names:
                result["name"] = names[block.tool_use_id]
            messages.append(result)
    for text in _texts(message.content):
        _add_text(messages, "user", text)


def _add_assistant(messages: list[dict[str, Any]], message: InputMessage) -> None:
    if isinstance(message.content, str):
        thoughts, text, calls = "", message.content, []
    else:
        thoughts = "".join(block.thinking for block in message.content if isinstance(block, ThinkingBlock))
        text = "".join(_texts(message.content))
        calls = [_call(block) for block in message.content if isinstance(block, ToolUseBlock)]
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is None:
        messages.append(last := {"role": "assistant", "content": ""})
    last["content"] += text
    if thoughts:
        last["reasoning_content"] = last.get("reasoning_content", "") + thoughts
    if calls:
        last["tool_calls"] = [*last.get("tool_calls", ()), *calls]


def _call(block: ToolUseBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


def _texts(blocks: Sequence[Any]) -> Iterator[str]:
    for block in blocks:
        match block:
            case TextBlock():
                yield block.text
            case DocumentBlock():
                source = block.source
                parts = [block.title, block.context]
                parts.append(source.data if source.type == "text" else "\n".join(_texts_or_one(source.content)))
                yield "\n".join(filter(None, parts))
            case SearchResultBlock():
                yield "\n".join([block.title, block.source, *_texts(block.content)])
            case ToolReferenceBlock():
                yield block.tool_name


def _texts_or_one(content: str | Sequence[Any]) -> Iterator[str]:
    return iter([content]) if isinstance(content, str) else _texts(content)


def _result_text(block: ToolResultBlock) -> str:
    text = "\n".join(_texts_or_one(block.content))
    return f"Error: {text}" if block.is_error else text
