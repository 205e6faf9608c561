"""Which formats a model answers in, as its chat template shows them."""

from __future__ import annotations

from collections.abc import Sequence

from ingle.text.formats.declared import (
    REASONING_FORMATS,
    REASONING_NAMES,
    TOOL_NAMES,
    ReasoningFormat,
    ToolFormat,
    reasoning_format,
    tool_format,
)
from ingle.text.formats.of_model import Formats

_IN_SOURCE: Sequence[tuple[str, tuple[str, ...]]] = (
    ("openai", ("<|channel|>", "<|message|>", "commentary")),
    ("deepseek_v32", ("｜DSML｜",)),
    ("minimax_m2", ("minimax:tool_call", "<invoke name=")),
    ("seed_oss", ("<seed:tool_call>",)),
    ("gemma4", ("<|tool_call>", "call:")),
    ("functiongemma", ("<start_function_call>",)),
    ("kimi_k2", ("<|tool_call_begin|>", "<|tool_call_argument_begin|>")),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("deepseek_v3", ("tool▁sep", "```json")),
    ("deepseek_v31", ("tool▁sep",)),
    ("glm45", ("<arg_key>", "<tool_call>")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("lfm2", ("<|tool_call_start|>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("phi4_mini_json", ("functools",)),
    ("phi4_mini_json", ("<|/tool_call|>",)),
    ("apriel", ("<tool_calls>",)),
    ("hermes", ("<tool_call>",)),
    ("granite", ("<|tool_call|>",)),
    ("nemotron_json", ("<TOOLCALL>",)),
    ("functionary_v3", ("<function=",)),
    ("llama3_json", ("<|start_header_id|>", '"parameters"', "tools")),
    ("pythonic", ("<|python_start|>",)),
)
"""Format, and what a template holds, all of it, that writes calls so. The first that fits counts."""

NONE = "none"
"""The name that switches a parser off."""


def tools_of(source: str, name: str | None = None) -> ToolFormat | None:
    """Of a chat template. A name, as vLLM's flag takes it, goes before what is found.

    Raises `ValueError` for a name that is not known, listing those that are.
    """
    if name == NONE:
        return None
    if name is not None:
        if name not in TOOL_NAMES:
            raise ValueError(f"{name!r:.60} is no format of calls: give {', '.join(sorted(TOOL_NAMES))}, or {NONE}")
        return tool_format(name)
    found = next((found for found, parts in _IN_SOURCE if all(part in source for part in parts)), None)
    # Where the template knows no tools they are described as Hermes' are (`words.py`).
    return tool_format(found or "hermes")


def reasoning_of(source: str, name: str | None = None) -> ReasoningFormat | None:
    """The same of thoughts."""
    if name == NONE:
        return None
    if name is not None:
        if name not in REASONING_NAMES:
            known = ", ".join(sorted(REASONING_NAMES))
            raise ValueError(f"{name!r:.60} is no format of thoughts: give {known}, or {NONE}")
        return reasoning_format(name)
    return next(
        (each for each in REASONING_FORMATS if ("<|channel|>" if each.channels else each.close) in source), None
    )


def in_words(formats: Formats, *, template_knows_tools: bool) -> str:
    """What is shown at the start."""
    if formats.template is not None:
        return "calls of tools and thoughts: as response_template in tokenizer_config.json declares"
    tools = formats.tools.name if formats.tools is not None else "not read"
    if formats.tools is not None and not template_knows_tools:
        tools += " (the chat template knows no tools: the system message describes them)"
    reasoning = formats.reasoning.name if formats.reasoning is not None else "none"
    return f"calls of tools: {tools}, thoughts: {reasoning}"
