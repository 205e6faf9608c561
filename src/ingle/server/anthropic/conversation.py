"""From the messages of Anthropic's API to those that chat templates know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ingle.server.anthropic.protocol import (
    AnyBlock,
    DocumentBlock,
    ForeignBlock,
    ImageBlock,
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
from ingle.server.conversation import UNSEEN_IMAGE, Conversation, call, function


def conversation_of(body: MessagesInput) -> Conversation:
    made = Conversation()
    _add_system(made, body.system)
    for message in body.messages:
        if message.role == "system":
            _add_system(made, message.content)
        elif message.role == "assistant":
            _add_answer(made, message)
        else:
            _add_user(made, message)
    return made


def tools_of(tools: Sequence[InputTool] | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Functions, and where tools stood that are left out: those that Anthropic's servers would run."""
    custom = [tool for tool in tools or () if tool.is_custom]
    skipped = [f"tools[{tool.type}]" for tool in tools or () if not tool.is_custom]
    return [function(tool.name, tool.description, tool.input_schema) for tool in custom], skipped


def _add_system(made: Conversation, content: str | Sequence[AnyBlock]) -> None:
    for text in _texts(content):
        made.system(text)


def _add_user(made: Conversation, message: InputMessage) -> None:
    """Results of tools stand right behind their calls, before what else the user says."""
    for block in _blocks(made, message):
        if isinstance(block, ToolResultBlock):
            text = "\n".join(_texts(block.content))
            made.result(block.tool_use_id, f"Error: {text}" if block.is_error else text)
            if not isinstance(block.content, str) and any(isinstance(each, ImageBlock) for each in block.content):
                made.skipped.append("messages[].content[].content[image]")
    for text in _texts(message.content):
        made.user(text)


def _add_answer(made: Conversation, message: InputMessage) -> None:
    made.assistant("".join(_texts(message.content)))
    for block in _blocks(made, message):
        if isinstance(block, ThinkingBlock):
            made.assistant(thought=block.thinking)
        elif isinstance(block, ToolUseBlock):
            made.assistant(calls=[call(block.id, block.name, block.input)])


def _blocks(made: Conversation, message: InputMessage) -> Iterator[AnyBlock]:
    """Those of a message, without what another server did; notes it."""
    for block in () if isinstance(message.content, str) else message.content:
        if isinstance(block, ForeignBlock):
            made.skipped.append(f"messages[].content[{block.type}]")
        else:
            yield block


def _texts(content: str | Sequence[Any]) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    for block in content:
        match block:
            case TextBlock():
                yield block.text
            case DocumentBlock():
                source = block.source
                inner = [source.data] if source.type == "text" else _texts(source.content)
                yield "\n".join(filter(None, [block.title, block.context, *inner]))
            case SearchResultBlock():
                yield "\n".join([block.title, block.source, *_texts(block.content)])
            case ToolReferenceBlock():
                yield block.tool_name
            case ImageBlock():
                yield UNSEEN_IMAGE
