"""Thoughts and calls are told apart from the text, and the same wherever it was cut."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.events import Arguments, Event, Thought, ToolCall, fold
from ingle.text.formats.bodies import typed
from ingle.text.formats.declared import REASONING_FORMATS, TOOL_FORMATS, reasoning_format, tool_format
from ingle.text.formats.of_model import Formats
from ingle.text.formats.parser import Parser

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
        "a": {"type": "string"}, "n": {"type": "integer"}, "o": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "e": {"enum": ["1", "2"]}, "m": {"type": ["string", "number"]}}}}},
    {"type": "function", "function": {"name": "g"}},
]  # fmt: skip


class Found(NamedTuple):
    thought: str
    text: str
    calls: list[tuple[str, str]]


def events_of(parser: Parser, pieces: Iterable[str]) -> list[Event]:
    found = [event for piece in pieces for event in parser.push(piece)]
    return found + parser.flush()


def read(
    text: str,
    tools: str | None = None,
    reasoning: str | None = None,
    *,
    cuts: Sequence[int] = (),
    **options: Any,
) -> Found:
    formats = Formats(tool_format(tools) if tools else None, reasoning_format(reasoning) if reasoning else None)
    edges = [0, *sorted(cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
    choice = fold(events_of(Parser(formats, TOOLS if tools else (), **options), pieces)).choices.get(0)
    if choice is None:
        return Found("", "", [])
    called = [(call.begin.name, call.arguments) for call in choice.calls.values() if call.begin is not None]
    return Found(choice.thought, choice.text, called)


F, G = ("f", '{"a": 1}'), ("g", "{}")
QUOTED = '{"a": "</tool_call>\\"}{[", "n": [1, {"b": "\\\\"}]}'
CASES: dict[str, tuple[str, str | None, str | None, Found]] = {
    # text, format of calls, of thoughts, what is found
    "text": ("Hello \n", "hermes", "think", Found("", "Hello \n", [])),
    "a call": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "hermes", None, Found("", "", [F])),
    "marks in a text of JSON": (f'<tool_call>{{"name": "f", "arguments": {QUOTED}}}</tool_call>', "hermes", None,
                                Found("", "", [("f", QUOTED)])),
    "words around calls": ('Hi.\n\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>'
                           '{"name": "g", "arguments": {}}</tool_call>\n\nbye ', "hermes", None,
                           Found("", "Hi.\n\nbye ", [F, G])),
    "the name last": ('<tool_call>{"arguments": {"a": 1}, "x": [2], "name": "f"}</tool_call>', "hermes", None,
                      Found("", "", [F])),
    "arguments as text": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "hermes", None,
                          Found("", "", [F])),
    "no arguments": ('<tool_call>{"name": "g"}</tool_call>', "hermes", None, Found("", "", [("g", "{}")])),
    "broken off": ('<tool_call>{"name": "f", "arguments": {"a": 1', "hermes", None, Found("", "", [("f", '{"a": 1')])),
    "no call": ("a <tool_call>b</tool_call> c", "hermes", None, Found("", "a <tool_call>b</tool_call> c", [])),
    "no name": ('<tool_call>{"x": 1}</tool_call>', "hermes", None, Found("", '<tool_call>{"x": 1}</tool_call>', [])),
    "a call in what is none": ('<tool_call> <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "hermes",
                               None, Found("", "<tool_call>", [F])),
    "half a mark": ("1 < 2 <tool_cal", "hermes", None, Found("", "1 < 2 <tool_cal", [])),
    "thought": ("<think>\nhm\n</think>\n\nyes", "hermes", "think", Found("hm", "yes", [])),
    "thought alone": ("<think>hm ", None, "think", Found("hm", "", [])),
    "no thought": ("a <think>b</think>", None, "think", Found("", "a <think>b</think>", [])),
    "thought and call": ('<think>a</think>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>', "hermes", "think",
                         Found("a", "", [G])),
    "a call in thoughts": ('<think>a <tool_call>{"name": "g", "arguments": {}}</tool_call></think>b', "hermes", "think",
                           Found('a <tool_call>{"name": "g", "arguments": {}}</tool_call>', "b", [])),
    "Qwen3-Coder": ('ok\n<tool_call>\n<function=f>\n<parameter=a>\nx\n"y"\n</parameter>\n<parameter=n>\n5\n</parameter>'
                    '\n<parameter=o>\n{"k": [1]}\n</parameter>\n<parameter=z>\nTrue\n</parameter>\n</function>\n'
                    "</tool_call>", "qwen3_coder", None,
                    Found("", "ok", [("f", '{"a": "x\\n\\"y\\"", "n": 5, "o": {"k": [1]}, "z": true}')])),
    "Qwen3.5, whose call ends its thoughts": ("hm\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
                                              "qwen3_coder", "think", Found("hm", "", [G])),
    "Llama 3": ('{"name": "f", "parameters": {"a": 1}}', "llama3_json", None, Found("", "", [F])),
    "Llama 3, several": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
                         "llama3_json", None, Found("", "", [F, G])),
    "Llama 3, JSON that is an answer": ('{"name": "Ann", "parameters": {}}', "llama3_json", None,
                                        Found("", '{"name": "Ann", "parameters": {}}', [])),
    "Llama 3, Python": ("<|python_tag|>print(1)", "llama3_json", None, Found("", "<|python_tag|>print(1)", [])),
    "pythonic": ('[f(a="x)]\'", n=[1, {"k": None}]), g()]', "pythonic", None,
                 Found("", "", [("f", '{"a": "x)]\'", "n": [1, {"k": null}]}'), G])),
    "pythonic, a list": ("[1, 2]", "pythonic", None, Found("", "[1, 2]", [])),
    "pythonic, no literal": ("[f(a=g())]", "pythonic", None, Found("", "[f(a=g())]", [])),
    "pythonic, another's": ("[h(a=1)]", "pythonic", None, Found("", "[h(a=1)]", [])),
    "LFM2": ("x <|tool_call_start|>[f(a=1)]<|tool_call_end|>", "lfm2", None, Found("", "x", [F])),
    "Mistral": ('[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "mistral", None,
                Found("", "", [F, G])),
    "Mistral, later": ('[THINK]x[/THINK]y[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]g{}', "mistral",
                       "mistral", Found("x", "y", [F, G])),
    "DeepSeek V3": ('<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```'
                    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>"
                    "<｜tool▁calls▁end｜>", "deepseek_v3", "think", Found("", "", [F, G])),
    "DeepSeek V3.1": ('a<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
                      "<｜tool▁calls▁end｜>", "deepseek_v31", None, Found("", "a", [F])),
    "DeepSeek V3.2": ('<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="z" string="true">1'
                      '</｜DSML｜parameter>\n<｜DSML｜parameter name="y" string="false">[1]</｜DSML｜parameter>\n'
                      "</｜DSML｜invoke>\n</｜DSML｜function_calls>", "deepseek_v32", None,
                      Found("", "", [("f", '{"z": "1", "y": [1]}')])),
    "Kimi K2": ('<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}'
                "<|tool_call_end|><|tool_calls_section_end|>", "kimi_k2", None, Found("", "", [F])),
    "GLM": ("<think>z</think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>5</arg_value>\n<arg_key>n</arg_key>\n"
            "<arg_value>5</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>", "glm45", "think",
            Found("z", "", [("f", '{"a": "5", "n": 5}'), G])),
    "MiniMax": ('<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">5</parameter>\n</invoke>\n'
                "</minimax:tool_call>", "minimax_m2", None, Found("", "", [("f", '{"a": "5"}')])),
    "Seed": ("<seed:think>q</seed:think><seed:tool_call>\n<function=g>\n</function>\n</seed:tool_call>", "seed_oss",
             "seed_oss", Found("q", "", [G])),
    "Gemma 4": ('<|channel>thought\nhm<channel|>yes<|tool_call>'
                'call:f{a:<|"|>x"},y<|"|>,n:5,l:[1,{z:true}]}<tool_call|>',
                "gemma4", "gemma4", Found("hm", "yes", [("f", '{"a": "x\\"},y", "n": 5, "l": [1, {"z": true}]}')])),
    "Function Gemma": ("<start_function_call>call:f{a:<escape>x<escape>}<end_function_call>", "functiongemma", None,
                       Found("", "", [("f", '{"a": "x"}')])),
    "Phi 4 mini": ('functools[{"name": "f", "arguments": {"a": 1}}]', "phi4_mini_json", None, Found("", "", [F])),
    "Granite": ('<|tool_call|>[{"name": "f", "arguments": {"a": 1}}]', "granite", None, Found("", "", [F])),
    "Functionary": ('<function=f>{"a": 1}</function><function=g>{}</function>', "functionary_v3", None,
                    Found("", "", [F, G])),
    "gpt-oss": ('<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>so<|end|>'
                '<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
                "openai", "openai", Found("hm", "so", [F])),
    "gpt-oss, the tool first": (' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>', "openai",
                                "openai", Found("", "", [F])),
    "gpt-oss, final": ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b\n"
                       "<|return|>", None, "openai", Found("a", "b\n", [])),
    "gpt-oss, no header": ("Hi", "openai", "openai", Found("", "Hi", [])),
}  # fmt: skip
BEGUN = {"Qwen3.5, whose call ends its thoughts", *(name for name in CASES if name.startswith("gpt-oss"))}
"""The prompt ends within thoughts, or a header."""


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    text, tools, reasoning, found = CASES[name]
    begun = name in BEGUN
    assert read(text, tools, reasoning, thinking=begun) == found
    for cut in range(len(text)):
        assert read(text, tools, reasoning, cuts=[cut], thinking=begun) == found, text[:cut]
    assert read(text, tools, reasoning, cuts=range(len(text)), thinking=begun) == found


MARKS = sorted({mark for each in (*TOOL_FORMATS, *REASONING_FORMATS) for mark in each.marks})
BITS = [
    *('{"name": "f", "arguments": {', '{"name": "'),
    *('"name": "g"', '"arguments": ', '"parameters": {"a": "', '"}}', "}"),
    *("{", "[", "]", '"', "\\", "'", ",", ":", ";", "\n", " ", "f", "g", "f(", "a=", ")", "call:f", "text", "é", "😀"),
    *("<", "|", "<think", "function", "name", "functions.f:0", " to=functions.f", "commentary", "analysis"),
    *("<parameter=a>", "</parameter>", "<arg_key>", "</arg_value>", '<parameter name="', '">', "```json", "[ARGS]"),
    *("<function=f>", "<|message|>", 'string="true"', "null", "5"),
]  # fmt: skip
JUMBLES = st.lists(st.sampled_from([*MARKS, *BITS]), max_size=24).map("".join)


@pytest.mark.parametrize("tools", [each.name for each in TOOL_FORMATS])
@settings(deadline=None)
@given(text=JUMBLES, cuts=st.lists(st.integers(0, 400), max_size=6), thinking=st.booleans(), parallel=st.booleans())
def test_cuts_change_nothing(tools: str, text: str, cuts: list[int], thinking: bool, parallel: bool) -> None:
    for reasoning in ("openai",) if tools == "openai" else (None, "think"):
        options = {"thinking": thinking, "parallel": parallel}
        whole = read(text, tools, reasoning, **options)
        assert read(text, tools, reasoning, cuts=[min(cut, len(text)) for cut in cuts], **options) == whole
        assert read(text, tools, reasoning, cuts=range(len(text)), **options) == whole


@settings(deadline=None)
@given(text=JUMBLES)
def test_without_formats_nothing_is_changed(text: str) -> None:
    assert read(text) == Found("", text, [])


@settings(deadline=None)
@given(text=st.text("ab <>{}[]\n", max_size=40), tools=st.sampled_from(["hermes", "mistral", "deepseek_v3", "kimi_k2"]))
def test_text_without_marks_stays_as_it_is(text: str, tools: str) -> None:
    assert read(text, tools, "think") == Found("", text, [])


def test_arguments_come_as_they_are_written() -> None:
    parser = Parser(Formats(tool_format("hermes")), TOOLS)
    assert parser.push('<tool_call>{"name": "f", "arguments": ') and parser.push('{"a": "x') != []
    (more,) = parser.push("yz")
    assert isinstance(more, Arguments) and more.text == "yz"


def test_texts_between_tags_come_as_they_are_written() -> None:
    parser = Parser(Formats(tool_format("qwen3_coder")), TOOLS)
    parser.push("<function=f>\n<parameter=a>\n")
    assert [event.text for event in parser.push('one "two"\n') if isinstance(event, Arguments)] == ['one \\"two\\"']
    assert [event.text for event in parser.push("three") if isinstance(event, Arguments)] == ["\\nthree"]


def test_a_text_is_given_at_once_where_no_mark_can_begin() -> None:
    parser = Parser(Formats(tool_format("hermes"), reasoning_format("think")), TOOLS, thinking=True)
    (thought,) = parser.push("so")
    assert isinstance(thought, Thought) and thought.text == "so"


def test_ids() -> None:
    def ids(format: str, text: str) -> list[str]:
        parser = Parser(Formats(tool_format(format)), TOOLS)
        return [event.id for event in events_of(parser, [text]) if isinstance(event, ToolCall)]

    first, second = ids("hermes", '<tool_call>[{"name": "f"}, {"name": "f"}]')
    assert first.startswith("call_") and first != second
    assert (
        ids("mistral", "[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}")[0]
        == "abcdefghi"
    )
    assert all(len(id) == 9 and id.isalnum() for id in ids("mistral", "[TOOL_CALLS]f{}[TOOL_CALLS]f{}"))
    assert ids("kimi_k2", CASES["Kimi K2"][0]) == ["functions.f:0"]


def test_one_call_is_enough() -> None:
    text = CASES["words around calls"][0]
    parser = Parser(Formats(tool_format("hermes")), TOOLS, parallel=False)
    found = fold(events_of(parser, [text])).choices[0]
    assert list(found.calls) == [0] and found.text == "Hi." and parser.ended


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("5", {"integer"}, 5),
        ("5", {"string"}, "5"),
        ("5", {"string", "number"}, 5),
        ("5", set(), 5),
        ("x", {"integer"}, "x"),
        ("True", {"boolean"}, True),
        ("null", {"string", "null"}, None),
        ("null", {"string"}, "null"),
        ('"a"', {"string", "null"}, '"a"'),
        ("[1", {"array"}, "[1"),
        ("NaN", {"number"}, "NaN"),
        ("1e999", {"number"}, "1e999"),
        ("[1e999]", set(), "[1e999]"),
        ("9" * 5000, {"integer"}, "9" * 5000),
        ("[" * 10_000, set(), "[" * 10_000),
    ],
)
def test_values_between_tags_have_the_types_of_the_schema(text: str, types: set[str], value: Any) -> None:
    assert typed(text, frozenset(types)) == value
    json.dumps(typed(text, frozenset(types)), allow_nan=False)


@pytest.mark.parametrize(
    "text",
    ['<tool_call>{"x": "' * 4000, "<tool_call>[" * 6000, "<tool_call>{" * 6000, "<" * 100_000, "<tool_call" * 10_000,
     '<tool_call>{"name": "f", "arguments": ' + '{"a": [' * 20_000, "<think>" * 10_000, " \n" * 50_000],
)  # fmt: skip
def test_hostile_answers_take_no_time(text: str) -> None:
    started = time.process_time()
    read(text, "hermes", "think", cuts=range(0, len(text), 4))
    assert time.process_time() - started < 3.0


@pytest.mark.parametrize(
    "text", ["[f(a=" + "(" * 5000, "[f(a=" + "-" * 50_000 + "1)]", "[f(a=" + "[" * 900 + "]" * 900 + ")]"]
)
def test_hostile_python(text: str) -> None:
    assert read(text, "pythonic").calls in ([], [("f", '{"a": ' + "[" * 900 + "]" * 900 + "}")])
