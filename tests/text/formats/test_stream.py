"""Special tokens that mark calls and thoughts reach the parser, though the text of an answer has none."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken

from ingle.events import Begin, Event, Finish, Text, fold
from ingle.request import EngineOutput, SamplingParams, TokenLogprobs
from ingle.text.formats.declared import reasoning_format, tool_format
from ingle.text.formats.of_model import Formats
from ingle.text.formats.stream import Telling, ToldStream
from ingle.text.tokenizer import Tokenizer
from tests.text import toys

MARKS = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[other]"]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = toys.byte_level()
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    end = backend.token_to_id("<|im_end|>")
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"}, eos_token_ids=[end], chat_template=None)


def told(tokenizer: Tokenizer, text: str, size: int, tools: Any = TOOLS, **sampling: Any) -> list[Event]:
    formats = Formats(tool_format("mistral"), reasoning_format("mistral"))
    params = SamplingParams(max_tokens=None, **sampling)
    stream = ToldStream(Telling(formats, tools), tokenizer, params, (), 0)
    ids = tokenizer.encode(text + "<|im_end|>", add_special_tokens=False)
    events: list[Event] = []
    for start in range(0, len(ids), size):
        step = ids[start : start + size]
        scores = [TokenLogprobs([token_id], [-1.0], 1) for token_id in step] if params.logprobs is not None else None
        reason = "stop" if start + size >= len(ids) else None
        events += stream.push(EngineOutput("r", step, reason, logprobs=scores))
    assert stream.finish_reason is not None and stream.num_tokens == len(ids)
    return events


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize("skip", [True, False])
def test_marks_that_are_special_tokens(tokenizer: Tokenizer, size: int, skip: bool) -> None:
    text = '[THINK]so[/THINK][other]ok[TOOL_CALLS]f[ARGS]{"a": "你好"}'
    events = told(tokenizer, text, size, skip_special_tokens=skip, logprobs=0)
    choice = fold(events).choices[0]
    assert choice.thought == "so" and choice.calls[0].arguments == '{"a": "你好"}'
    assert choice.text == ("ok" if skip else "[other]ok<|im_end|>")
    assert choice.finish == Finish(0, "tool_calls", None, len(tokenizer.encode("[THINK]so[/THINK]", False)))
    assert choice.logprobs is not None and len(choice.logprobs) == len(choice.token_ids)
    assert isinstance(events[0], Begin)
    assert sum(len(event.token_ids) for event in events if isinstance(event, Text)) == len(choice.token_ids)


def test_marks_that_nobody_asked_for_stay_hidden(tokenizer: Tokenizer) -> None:
    choice = fold(told(tokenizer, "[TOOL_CALLS]f[ARGS]{}", 1, tools=())).choices[0]
    assert (choice.text, choice.calls, choice.finish_reason) == ("f{}", {}, "stop")


def test_a_stop_string_ends_an_answer_within_a_call(tokenizer: Tokenizer) -> None:
    formats = Formats(tool_format("mistral"))
    stream = ToldStream(Telling(formats, TOOLS), tokenizer, SamplingParams(stop=("STOP",), max_tokens=None), (), 0)
    ids = tokenizer.encode('[TOOL_CALLS]f[ARGS]{"a": "xSTOPy"}', False)
    choice = fold(stream.push(EngineOutput("r", ids))).choices[0]
    assert choice.calls[0].arguments == '{"a": "x' and choice.stop_reason == "STOP"
