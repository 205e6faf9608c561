"""Tools for models whose chat template knows none: described in the system message, in the words that Hermes 2 Pro and
Qwen 2.5 were trained on, which many models follow without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_DESCRIPTION = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


def described(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with the tools at the end of its first system message."""
    text = _DESCRIPTION.format(tools="\n".join(json.dumps(tool, ensure_ascii=False, default=repr) for tool in tools))
    first = messages[0] if messages else {}
    if first.get("role") not in ("system", "developer"):
        return [{"role": "system", "content": text}, *messages]
    content = first.get("content") or ""
    if isinstance(content, list):
        return [{**first, "content": [*content, {"type": "text", "text": text}]}, *messages[1:]]
    return [{**first, "content": f"{content}\n\n{text}" if content else text}, *messages[1:]]


def call_in_words(name: str, arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def result_in_words(content: Any) -> str:
    return f"<tool_response>\n{text_of(content)}\n</tool_response>"


def text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
