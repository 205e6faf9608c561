from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.text.stop import StopMatch, StopMatcher

LETTERS = "ab你"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=6), max_size=12)


def first_match(text: str, stops: list[str], ends_after: int = 0) -> tuple[str, str] | None:
    """The text before the first stop string to be complete, and that string; the longest of those that end together."""
    matches = [
        (start + len(stop), start, stop)
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > ends_after
    ]
    if not matches:
        return None
    _, start, stop = min(matches)
    return text[:start], stop


def feed(matcher: StopMatcher, pieces: list[str], num_unarmed: int = 0) -> tuple[str, str | None]:
    given_out = ""
    for i, piece in enumerate(pieces):
        safe = matcher.push(piece, armed=i >= num_unarmed)
        if isinstance(safe, StopMatch):
            return given_out + safe.text, safe.string
        given_out += safe
    return given_out + matcher.flush(), None


@given(STOPS, PIECES)
def test_any_split_finds_what_the_whole_text_has(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    assert feed(StopMatcher(stops), pieces) == (first_match(text, stops) or (text, None))


@given(STOPS, PIECES, st.integers(0, 12))
def test_a_match_ends_in_armed_text(stops: list[str], pieces: list[str], num_unarmed: int) -> None:
    text = "".join(pieces)
    expected = first_match(text, stops, ends_after=len("".join(pieces[:num_unarmed])))
    found_text, found = feed(StopMatcher(stops), pieces, num_unarmed)
    if expected is None:
        assert (found_text, found) == (text, None)
    else:
        # What was given out before the matcher was armed stays out, even if the match began there.
        assert found == expected[1] and found_text.startswith(expected[0])


@given(STOPS, PIECES)
def test_only_a_possible_start_is_held_back(stops: list[str], pieces: list[str]) -> None:
    matcher, text, given_out = StopMatcher(stops), "", ""
    for piece in pieces:
        safe = matcher.push(piece)
        if isinstance(safe, StopMatch):
            return
        text, given_out = text + piece, given_out + safe
        starts = [start for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops)]
        assert text[len(given_out) :] == (text[starts[0] :] if starts else "")


def test_without_stop_strings_text_passes() -> None:
    assert feed(StopMatcher(()), ["a", "b"]) == ("ab", None)


@pytest.mark.parametrize("stop", [" a" * 4000 + "b", "a" * 8000 + "b", "ab" * 4000 + "c"])
def test_the_time_does_not_grow_with_the_stop_strings(stop: str) -> None:
    """64 of them, all of which begin as the text goes on."""
    text = stop[:-1] * 4
    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]

    def seconds(stops: list[str]) -> float:
        matcher = StopMatcher(stops)
        started = time.perf_counter()
        for piece in pieces:
            assert isinstance(matcher.push(piece), str)
        return time.perf_counter() - started

    many = [stop[:length] + str(length) for length in range(1, 4000, 63)] + [stop]
    assert seconds(many) < 10 * seconds([stop[:4] + "!"]) + 0.2
