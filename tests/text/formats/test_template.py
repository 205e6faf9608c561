"""A model's own `response_template`, against transformers' reading of it."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.events import fold
from ingle.text.formats.detect import in_words
from ingle.text.formats.template import read_response_template
from ingle.text.formats.template_parser import TemplateParser
from ingle.text.load import load_text_side
from tests.text import toys

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {
    "n": {"type": "integer"}, "a": {"type": "string"}}}}}]  # fmt: skip
CALLED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
QWEN = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open_pattern": r"\s*<tool_call>", "close": "</tool_call>", "repeats": True, "content": "json",
                       "transform": {"type": "function", "function": "{content}"}},
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)"},
    },
}  # fmt: skip
TAGS = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {"open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                       "close_pattern": r"</function>\s*</tool_call>", "repeats": True, "content": "xml-inline",
                       "content_args": {
                           "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"},
                       "transform": CALLED},
        "content": {},
    },
}  # fmt: skip
GEMMA = {
    "start_anchor": ["<|turn>model\n", "<tool_response|>"],
    "fields": {
        "reasoning_content": {"open": "<|channel>thought\n", "close": "<channel|>"},
        "tool_calls": {"open_pattern": r"<\|tool_call>call:(?P<name>\w+)", "close": "<tool_call|>", "repeats": True,
                       "content": "json", "content_args": {"unquoted_keys": True,
                                                           "string_delims": [['<|"|>', '<|"|>']]},
                       "transform": CALLED},
        "content": {"close": ["<turn|>", "<|tool_response>", "<eos>"]},
    },
}  # fmt: skip
LIST = {
    "start_anchor_pattern": r"<bot>",
    "fields": {
        "tool_calls": {"open": "<calls>", "close": "</calls>", "content": "json", "transform_each": True,
                       "transform": {"function": {"name": "{name}", "arguments": "{args}"}}},
        "content": {},
    },
}  # fmt: skip
F = ("f", '{"n": 1, "a": "x"}')
CASES: dict[str, tuple[dict[str, Any], str, str, tuple[str, str, list[tuple[str, str]]]]] = {
    # template, prompt, answer; thought, text, calls
    "json": (QWEN, "<|im_start|>assistant\n", '<think>\nhm\n</think>\n\nso\n<tool_call>\n{"name": "f", "arguments": '
             '{"n": 1, "a": "x"}}\n</tool_call>\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
             ("hm", "so", [F, ("f", "{}")])),
    "begun": (QWEN, "<think><|im_start|>assistant\n<think>\n", "hm</think>so", ("hm", "so", [])),
    "not begun": (QWEN, "<|im_start|>assistant\n<think>\n\n</think>\n\n", "so", ("", "so", [])),
    "broken": (QWEN, "", "<tool_call>{</tool_call>", ("", "<tool_call>{", [])),
    "tags": (TAGS, "", "ok<tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n<parameter=a>\nx\n</parameter>\n"
             "</function>\n</tool_call>", ("", "ok", [F])),
    "other marks": (GEMMA, "<|turn>model\n", '<|channel>thought\nhm<channel|>so<|tool_call>call:f{n:1,a:<|"|>x<|"|>}'
                    "<tool_call|>", ("hm", "so", [F])),
    "each of a list": (LIST, "<bot>", '<calls>[{"name": "f", "args": {"n": 1, "a": "x"}}]</calls>', ("", "", [F])),
}  # fmt: skip


def read(spec: dict[str, Any], prompt: str, text: str, cuts: Sequence[int] = ()) -> tuple[str, str, list[Any]]:
    parser = TemplateParser(read_response_template(spec), TOOLS, prompt=prompt)
    edges = [0, *sorted(cuts), len(text)]
    events = [event for start, end in itertools.pairwise(edges) for event in parser.push(text[start:end])]
    choice = fold([*events, *parser.flush()]).choices.get(0)
    if choice is None:
        return "", "", []
    return choice.thought, choice.text, [(c.begin.name, c.arguments) for c in choice.calls.values() if c.begin]


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    spec, prompt, text, found = CASES[name]
    assert read(spec, prompt, text) == found
    for cut in range(len(text)):
        assert read(spec, prompt, text, [cut]) == found, text[:cut]
    assert read(spec, prompt, text, range(len(text))) == found


@pytest.mark.parametrize("name", [name for name in CASES if name != "broken"])
def test_transformers_finds_the_same(name: str) -> None:
    parsing = pytest.importorskip("transformers.utils.chat_parsing")
    spec, prompt, text, (thought, said, calls) = CASES[name]
    theirs = parsing.ResponseParser(spec, prompt, tools=TOOLS)
    theirs.feed(text)
    answer, _ = theirs.finalize()
    assert (answer.get("reasoning_content", "") or "").strip() == thought
    assert (answer.get("content") or "").strip() == said
    called = [
        call["function"]
        for each in answer.get("tool_calls", [])
        for call in (each if isinstance(each, list) else [each])
    ]
    assert [(each["name"], json.dumps(each["arguments"])) for each in called] == calls


BITS = [
    *("<think>", "</think>", " ", "\n", "<tool_call>", "</tool_call>", '{"name": "f", "arguments": {}}', "<|im_end|>"),
    *("<function=f>", "<parameter=n>", "1", "</parameter>", "</function>", "<tool", "x", "<turn|>"),
    *("<|channel>thought\n", "<channel|>", "<|tool_call>call:f", "{n:1}", "<tool_call|>"),
]


@settings(deadline=None)
@given(
    spec=st.sampled_from([QWEN, TAGS, GEMMA]),
    text=st.lists(st.sampled_from(BITS), max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=5),
)
def test_cuts_change_nothing(spec: dict[str, Any], text: str, cuts: list[int]) -> None:
    whole = read(spec, "", text)
    assert read(spec, "", text, [min(cut, len(text)) for cut in cuts]) == whole
    assert read(spec, "", text, range(len(text))) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "another version"),
        ({"x": 1}, "has 'x'"),
        ({"fields": {}}, "no fields"),
        ({"fields": {"content": {"close": 5}}}, "close is no text"),
        ({"fields": {"content": {"open_pattern": "("}}}, "cannot be used"),
        ({"fields": {"content": {"open_pattern": "a" * 5000}}}, "too long"),
        ({"fields": {"content": {"content": "python"}}}, "'python', which is not known"),
        ({"fields": {"content": {"content": "xml-inline"}}}, "a pattern that is no text"),
        ({"fields": {"content": {}, "more": {}}}, "nothing opens"),
        ({"fields": {"content": {"eval": "1"}}}, "not of a known form"),
        ({"start_anchor": None}, "no start_anchor"),
    ],
)
def test_what_cannot_be_used_is_said(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_response_template(QWEN | changes)
    with pytest.raises(ValueError, match="is no object"):
        read_response_template("x")


def test_a_pattern_that_never_ends_ends() -> None:
    slow = {"start_anchor": "x", "fields": {"tool_calls": {"open_pattern": r"(a|aa|aaa)+(a|b)+$c"}, "content": {}}}
    started = time.process_time()
    text = "a" * 5000
    assert read(slow, "", text, range(0, 5000, 10))[1] == text
    assert time.process_time() - started < 2.0


def test_a_model_that_has_one(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"
    config = {"chat_template": template, "response_template": QWEN}
    folder = toys.write_folder(tmp_path, toys.byte_level(), tokenizer_config__json=config)
    formats = load_text_side(folder).formats
    assert formats.template is not None and formats.template_marks == ("<|endoftext|>", "<|im_end|>")
    assert "response_template" in in_words(formats, template_knows_tools=True)
    config["response_template"] = {"version": 9}
    toys.write_folder(tmp_path, toys.byte_level(), tokenizer_config__json=config)
    side = load_text_side(folder)
    assert side.formats.template is None and "response_template is of another version" in str(side.notices)
