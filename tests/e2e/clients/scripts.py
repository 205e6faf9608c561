"""What the scripted model says, in Qwen's way to call tools. See `scripted_engine`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Script = list[dict[str, Any]]


def call(name: str, **arguments: Any) -> str:
    said = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


def step(say: str, *expects: str, needs_tools: bool = True) -> dict[str, Any]:
    return {"say": say, "expects": list(expects), "needs_tools": needs_tools}


Tool = Callable[..., str]
"""How an agent spells one of its tools."""

AWKWARD = 'printf \'%s\\n\' "引号 \\"和\\" 反斜杠 \\\\" > awkward.txt'


def session(shell: Tool, write: Tool, read: Tool, edit: Tool) -> Script:
    """Ten turns of a coding agent, of which each but the first needs what came before."""
    return [
        step(write("notes.txt", "first line\nsecond line\n")),
        step(read("notes.txt")),
        step(f"I change it. {edit('notes.txt', 'second', '2nd')}", "first line"),
        step(shell("cat notes.txt; echo marker-$((20 + 22))")),
        step("\n".join([shell("echo one-$((1 + 1))"), shell("echo two-$((2 + 2))")]), "2nd line", "marker-42"),
        step(shell(AWKWARD), "one-2", "two-4"),
        step(shell("cat awkward.txt; echo status-$((6 * 7)); false")),
        step(shell("seq -s ' ' 1 400"), "引号", "status-42"),
        # Qwen's template forgets thoughts once its user speaks again, as Claude Code does for them with its reminders.
        step(f"<think>\nNow the lines.\n</think>\n\n{shell('wc -l < notes.txt')}", "398 399 400"),
        step("All ten are done: 十步都完成了。", "2"),
    ]  # fmt: skip


def codex_shell(command: str) -> str:
    return call("exec_command", cmd=command)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


CODEX = session(
    codex_shell,
    write=lambda path, text: codex_shell(f"printf '%s' {quoted(text)} > {path}"),
    read=lambda path: codex_shell(f"cat {path}"),
    edit=lambda path, old, new: codex_shell(f"sed -i s/{old}/{new}/ {path}"),
)


def claude(folder: str) -> Script:
    return session(
        lambda command: call("Bash", command=command, description="As asked"),
        write=lambda path, text: call("Write", file_path=f"{folder}/{path}", content=text),
        read=lambda path: call("Read", file_path=f"{folder}/{path}"),
        edit=lambda path, old, new: call("Edit", file_path=f"{folder}/{path}", old_string=old, new_string=new),
    )


def opencode(folder: str) -> Script:
    return session(
        lambda command: call("bash", command=command, description="As asked"),
        write=lambda path, text: call("write", filePath=f"{folder}/{path}", content=text),
        read=lambda path: call("read", filePath=f"{folder}/{path}"),
        edit=lambda path, old, new: call("edit", filePath=f"{folder}/{path}", oldString=old, newString=new),
    )


WEATHER = [
    step(f"<think>\nA tool knows.\n</think>\n\nI look. {call('get_weather', city='Paris')}"),
    step("It is 18 degrees in Paris.", "18 degrees"),
]
BOTH = [
    step("\n".join([call("get_weather", city="Paris"), call("get_weather", city="北京")])),
    step("18 in Paris, 7 in 北京.", "18 degrees", "7 degrees"),
]
AGAIN = [step("And again.")]
PLAIN = [step("Hello! 你好 👋", needs_tools=False)]
THINKS = [step("<think>\nLet me see.\n</think>\n\nIt is four.", needs_tools=False)]
ANIMAL = [
    step('```json\n{"kind": "cat", "name": "Tom", "legs": 9, "friends": []}\n```', needs_tools=False),
    step('```json\n{"kind": "cat", "name": "Tom", "legs": 4, "friends": []}\n```', "less than", needs_tools=False),
]

SCRIPTED: Mapping[str, Sequence[object]] = {
    "weather": WEATHER,
    "both": BOTH,
    "again": AGAIN,
    "plain": PLAIN,
    "thinks": THINKS,
    "animal": ANIMAL,
}
