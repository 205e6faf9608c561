from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.events import Begin, Choice, Finish, Text, fold
from ingle.request import EngineOutput, FinishReason, SamplingParams, TokenLogprobs
from ingle.text.stream import TextStream
from ingle.text.tokenizer import Tokenizer
from tests.text import toys

TOKENIZER = Tokenizer(
    toys.byte_level(), special_tokens={"eos_token": "<|im_end|>"}, eos_token_ids=[], chat_template=None
)
END = TOKENIZER.eos_token_ids[0]


def ids_of(*texts: str) -> list[int]:
    """One token per character, so that tests can count."""
    return [token_id for text in texts for char in text for token_id in TOKENIZER.encode(char)]


def output(
    token_ids: list[int], finish: FinishReason | None = None, stop_token_id: int | None = None, logprobs: bool = False
) -> EngineOutput:
    entries = [TokenLogprobs([token_id], [-1.0], 1) for token_id in token_ids] if logprobs else None
    return EngineOutput("r", token_ids, finish, stop_token_id, logprobs=entries)


def stream(**sampling: Any) -> TextStream:
    return TextStream(TOKENIZER, SamplingParams(**sampling))


def push(text: TextStream, new: EngineOutput) -> Choice:
    """All that one output brings."""
    return fold(text.push(new)).choices.get(0, Choice())


def told(delta: Choice) -> tuple[object, ...]:
    return delta.text, delta.token_ids, delta.logprobs, delta.finish_reason


def test_plain_text_ends_with_the_limit() -> None:
    text = stream()
    assert told(push(text, output(ids_of("h")))) == ("h", ids_of("h"), None, None)
    assert told(push(text, output(ids_of("i"), "length"))) == ("i", ids_of("i"), None, "length")
    assert (text.num_tokens, text.finish_reason) == (2, "length")
    assert told(push(text, output(ids_of("x")))) == ("", [], None, None) and text.num_tokens == 2


@pytest.mark.parametrize(("skip", "shown"), [(True, "hi"), (False, "hi<|im_end|>")])
def test_end_token_is_special_text(skip: bool, shown: str) -> None:
    delta = push(stream(skip_special_tokens=skip), output([*ids_of("hi"), END], "stop"))
    assert (delta.text, delta.token_ids) == (shown, [*ids_of("hi"), END])
    assert (delta.finish_reason, delta.stop_reason) == ("stop", None)


@pytest.mark.parametrize(("include", "shown"), [(False, "hi"), (True, "hi!")])
def test_stop_token_shows_when_asked_for(include: bool, shown: str) -> None:
    stop = ids_of("!")[0]
    text = stream(stop_token_ids=(stop,), include_stop_str_in_output=include)
    delta = push(text, output([*ids_of("hi"), stop], "stop", stop))
    assert (delta.text, delta.stop_reason, len(delta.token_ids)) == (shown, stop, 3)


@pytest.mark.parametrize(("include", "shown"), [(False, "one "), (True, "one STOP")])
def test_stop_string_cuts_text_tokens_and_logprobs(include: bool, shown: str) -> None:
    text = stream(stop=("STOP",), include_stop_str_in_output=include)
    assert push(text, output(ids_of("one S"), logprobs=True)).text == "one "
    delta = push(text, output(ids_of("TOP and on"), logprobs=True))
    assert delta.text == shown.removeprefix("one ")
    assert (delta.finish_reason, delta.stop_reason) == ("stop", "STOP")
    assert delta.token_ids == ids_of("TOP")
    assert [entry.token_ids for entry in delta.logprobs or []] == [[token_id] for token_id in delta.token_ids]
    assert text.num_tokens == len("one STOP")


START = TOKENIZER.encode("<|im_start|>")[0]


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize(
    ("stops", "before", "stop"),
    [
        (["<|im_start|>"], "hi", "<|im_start|>"),
        (["hi<|im_start|>"], "", "hi<|im_start|>"),
        (["<|im_start|>us", "never"], "hi", "<|im_start|>us"),
        (["i<|im_start|>user\n"], "h", "i<|im_start|>user\n"),
        (["<|im_start|>x", "er"], "hi<|im_start|>us", "er"),
        (["iuse!", "<|im_start|>use"], "hi", "<|im_start|>use"),
        (["<|endoftext|>", "<|im_start|>user\n<|im_end|>"], "hi", "<|im_start|>user\n<|im_end|>"),
        (["<|im_end|>"], "hi<|im_start|>user\n", "<|im_end|>"),
    ],
)
def test_a_stop_string_may_spell_special_tokens(
    skip: bool, include: bool, stops: list[str], before: str, stop: str
) -> None:
    token_ids = [*ids_of("hi"), START, *ids_of("user\n"), END]
    for size in (1, 3, 100):
        for ends in (True, False):  # the engine, at its end token
            text = stream(stop=stops, skip_special_tokens=skip, include_stop_str_in_output=include, ignore_eos=not ends)
            deltas = []
            for at in range(0, len(token_ids), size):
                last = at + size >= len(token_ids)
                deltas.append(push(text, output(token_ids[at : at + size], "stop" if last and ends else None)))
            if not ends:
                deltas.append(push(text, output(ids_of("and on"), "length")))
            shown = before.replace("<|im_start|>", "") if skip else before
            assert "".join(delta.text for delta in deltas) == shown + (stop if include else "")
            assert [delta.stop_reason for delta in deltas if delta.finish_reason] == [stop]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([*"abS", "<|im_start|>", "<|endoftext|>"]), max_size=12),
    st.lists(st.lists(st.sampled_from([*"abS", "<|im_start|>"]), min_size=1, max_size=3).map("".join), max_size=3),
)
def test_the_first_stop_string_to_be_complete_counts(parts: list[str], stops: list[str]) -> None:
    """Whether it stands in the text as it is shown, or as it is with the special tokens that it spells."""
    text = stream(stop=tuple(stops))
    delta = push(text, output([token_id for part in parts for token_id in TOKENIZER.encode(part)], "length"))
    whole, shown, wanted = "", "", None
    for part in parts:
        whole += part if part != "<|endoftext|>" else ""
        shown += part if len(part) == 1 else ""
        ends = [stop for stop in stops if (shown if len(part) == 1 else whole).endswith(stop) or whole.endswith(stop)]
        if part != "<|endoftext|>" and ends:
            wanted = ends
            break
    if wanted is None:
        assert (delta.text, delta.stop_reason) == (shown, None)
    else:
        assert delta.stop_reason in wanted and shown.startswith(delta.text)
        assert delta.text + str(delta.stop_reason).replace("<|im_start|>", "") == shown


def test_starts_of_tokens() -> None:
    text = stream(logprobs=0, stop=("lo",))
    token_ids = [START, *ids_of("h你"), *TOKENIZER.encode("鬱"), *ids_of("lo")]
    delta = push(text, output(token_ids, logprobs=True))
    assert delta.text == "h你鬱" and len(delta.starts) == len(delta.token_ids) == len(token_ids)
    for token_id, start in zip(delta.token_ids, delta.starts, strict=True):
        token = TOKENIZER.token(token_id)
        assert "h你鬱lo".startswith(token, start) or "\ufffd" in token or token_id == START
    assert delta.starts[:2] == [0, 0] and delta.starts[-2:] == [3, 4]
    assert push(stream(), output(token_ids)).starts == []


def test_held_text_comes_when_no_stop_string_follows() -> None:
    text = stream(stop=("STOP",))
    assert told(push(text, output(ids_of("a STO")))) == ("a ", ids_of("a STO"), None, None)
    assert told(push(text, output([END], "stop"))) == ("STO", [END], None, "stop")


def test_stop_string_counts_over_the_limit_and_in_the_last_character() -> None:
    assert push(stream(stop=("x",)), output(ids_of("axb"), "length")).stop_reason == "x"
    half = TOKENIZER.encode("鬱")[:1]
    delta = push(stream(stop=("\ufffd",)), output([*ids_of("a"), *half], "length"))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", "stop", "\ufffd")


def test_an_error_stays_an_error() -> None:
    text = stream(stop=("ab",))
    push(text, output(ids_of("xa")))
    assert told(push(text, output([], "error"))) == ("a", [], None, "error")


def test_stop_strings_wait_for_min_tokens() -> None:
    text = stream(stop=("ab",), min_tokens=4)
    assert push(text, output(ids_of("abx"))).text == "abx"
    delta = push(text, output(ids_of("abx")))
    assert (delta.text, delta.token_ids, delta.stop_reason) == ("", ids_of("ab"), "ab")


def test_stop_string_may_complete_with_the_last_of_min_tokens() -> None:
    assert push(stream(stop=("ab",), min_tokens=2), output(ids_of("abab"))).token_ids == ids_of("ab")


@settings(deadline=None)
@given(
    st.text("abST 你😀", max_size=20),
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
    st.lists(st.text("abST你", min_size=1, max_size=3), max_size=2),
)
def test_deltas_join_to_the_text_however_the_engine_batches(text: str, sizes: list[int], stops: list[str]) -> None:
    token_ids = [*ids_of(text), END]
    whole = push(stream(stop=tuple(stops)), output(token_ids, "stop"))
    parts, deltas, rest = stream(stop=tuple(stops)), [], token_ids
    for size in sizes:
        chunk, rest = rest[:size], rest[size:]
        deltas.append(push(parts, output(chunk, None if rest else "stop")))
        if deltas[-1].finish_reason is not None:
            break
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token_id for delta in deltas for token_id in delta.token_ids] == whole.token_ids
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", whole.stop_reason)
    if not stops:
        assert whole.text == text


def test_the_events_of_a_choice() -> None:
    """`Begin` comes with the first token, though its text may be held back; tokens come as soon as they are there."""
    text = TextStream(TOKENIZER, SamplingParams(stop=("STOP",)), choice=3)
    first = EngineOutput("r", ids_of("S"), num_cached_tokens=7)
    assert text.push(first) == [Begin(3, 7), Text(3, "", ids_of("S"))]
    assert text.push(output(ids_of("a"))) == [Text(3, "Sa", ids_of("a"))]
    assert text.push(output(ids_of("STOP and on"))) == [Text(3, "", ids_of("STOP")), Finish(3, "stop", "STOP")]
    assert text.push(output(ids_of("x"))) == []
    only_scored = EngineOutput("r", [], "length", prompt_logprobs=[None])
    assert TextStream(TOKENIZER, SamplingParams()).push(only_scored) == [Begin(0, 0, [None]), Finish(0, "length")]
