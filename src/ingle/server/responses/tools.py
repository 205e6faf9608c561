"""Tools of the Responses API as functions: those that the client runs, whatever their type.

A custom tool, which takes any text, is a function of one text. Tools of a namespace carry its name before their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ingle.errors import RequestError
from ingle.server.body import show
from ingle.server.conversation import function

_ANY_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The text that the tool takes, as it is."}},
    "required": ["input"],
}


@dataclass(frozen=True)
class ToolOrigin:
    """What a function was in the request."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass
class Tools:
    functions: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, ToolOrigin] = field(default_factory=dict)
    """By the function's name."""
    skipped: list[str] = field(default_factory=list)
    """Where tools stood that are left out: those that OpenAI's servers would run."""
    choice: Literal["auto", "none", "required"] = "auto"
    chosen: str | None = None
    """The function that must be called."""

    def origin(self, name: str) -> ToolOrigin:
        return self.origins.get(name) or ToolOrigin(name)


def full_name(name: str, namespace: str | None) -> str:
    return name if namespace is None else f"{namespace}__{name}"


def read_tools(tools: Sequence[dict[str, Any]], choice: str | dict[str, Any] | None) -> Tools:
    """Raises `RequestError` naming what is wrong."""
    read = Tools()
    for index, tool in enumerate(tools):
        _add(read, tool, f"tools[{index}]", None)
    _choose(read, choice)
    return read


def _add(read: Tools, tool: dict[str, Any], where: str, namespace: str | None) -> None:
    kind = tool.get("type")
    if not isinstance(kind, str):
        raise RequestError(f"{where}.type is required", param=f"{where}.type")
    if kind == "namespace" and namespace is None:
        inner = tool.get("tools")
        if not isinstance(inner, list) or not all(isinstance(each, dict) for each in inner):
            raise RequestError(f"{where}.tools must be a list of tools, got {show(inner)}", param=f"{where}.tools")
        for index, each in enumerate(inner):
            _add(read, each, f"{where}.tools[{index}]", _name(tool, where))
        return
    if kind not in ("function", "custom"):
        read.skipped.append(f"tools[{kind}]")
        return
    # As chat completions have it, some clients send what describes a function within another object.
    said = tool["function"] if isinstance(tool.get("function"), dict) else tool
    origin = ToolOrigin(_name(said, where), namespace, kind == "custom")
    name = full_name(origin.name, namespace)
    description, parameters = said.get("description"), said.get("parameters")
    for field_name, value, wanted in (("description", description, str), ("parameters", parameters, dict)):
        if value is not None and not isinstance(value, wanted):
            at = f"{where}.{field_name}"
            raise RequestError(f"{at} has the wrong type, got {show(value)}", param=at)
    if name in read.origins:
        raise RequestError(f"{where} is the second tool that is named {show(name)}", param=where)
    read.origins[name] = origin
    read.functions.append(function(name, _description(said, origin), _ANY_TEXT if origin.custom else parameters))


def _description(said: dict[str, Any], origin: ToolOrigin) -> str | None:
    """With the grammar of a custom tool's text, which the model is to keep to."""
    texts = [said.get("description")]
    grammar = said.get("format")
    if origin.custom and isinstance(grammar, dict) and isinstance(grammar.get("definition"), str):
        texts.append(f"The input follows this grammar ({grammar.get('syntax', 'lark')}):\n{grammar['definition']}")
    return "\n".join(filter(None, texts)) or None


def _name(said: dict[str, Any], where: str) -> str:
    name = said.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}.name is required", param=f"{where}.name")
    return name


def _choose(read: Tools, choice: str | dict[str, Any] | None) -> None:
    if choice is None or choice == "auto":
        return
    if choice == "none":
        read.choice = "none"
    elif choice == "required":
        read.choice = "required"
        _check_any(read)
    elif isinstance(choice, dict) and choice.get("type") in ("function", "custom"):
        said = choice["function"] if isinstance(choice.get("function"), dict) else choice
        names = [name for name, origin in read.origins.items() if said.get("name") in (name, origin.name)]
        if not names:
            raise RequestError(
                f"tool_choice names {show(said.get('name'))}, which is not in tools", param="tool_choice"
            )
        read.chosen = names[0]
    elif isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        _allow(read, choice)
    else:
        asked = choice.get("type") if isinstance(choice, dict) else choice
        raise RequestError(
            f"tool_choice may be none, auto, required, or name a function, a custom tool or allowed_tools, "
            f"got {show(asked)}",
            param="tool_choice",
            code="unsupported_argument",
        )


def _check_any(read: Tools) -> None:
    if not read.functions:
        raise RequestError("tool_choice is required, but tools names none that can be called", param="tool_choice")


def _allow(read: Tools, choice: dict[str, Any]) -> None:
    listed = choice.get("tools")
    allowed = set(_names(listed if isinstance(listed, list) else []))
    read.functions = [
        each
        for each in read.functions
        if {(name := each["function"]["name"]), read.origins[name].name, read.origins[name].namespace} & allowed
    ]
    if choice.get("mode") == "required":
        read.choice = "required"
        _check_any(read)


def _names(listed: Sequence[Any]) -> Iterator[str]:
    for each in listed:
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            yield each["name"]
