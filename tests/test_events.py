"""The fold of events: whatever comes between the events of a choice, and wherever it is cut."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ingle.events import Begin, Event, Finish, Text, Usage, fold
from ingle.request import TokenLogprobs

ENTRY = TokenLogprobs([1], [-1.0], 1)
texts = st.builds(
    lambda text, scored, ids: (text, ids, [ENTRY] * len(ids) if scored else None),
    st.text(max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 9), max_size=3),
)


@given(st.lists(st.lists(texts, max_size=4), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_choices_fold_apart(choices: list[list[Any]], random: Random) -> None:
    streams: list[list[Event]] = []
    for index, each_text in enumerate(choices):
        told = [Text(index, *each, [0] * len(each[1])) for each in each_text]
        streams.append([Begin(index, index), *told, Finish(index, "stop", index)])
    usage, mixed = Usage(1, 2, 3), []
    while any(streams):
        mixed.append(random.choice([stream for stream in streams if stream]).pop(0))
    answer = fold([*mixed, usage])
    assert answer.usage is usage and sorted(answer.choices) == list(range(len(choices)))
    for index, each_text in enumerate(choices):
        choice = answer.choices[index]
        assert choice.text == "".join(text for text, _, _ in each_text)
        assert choice.token_ids == [token_id for _, ids, _ in each_text for token_id in ids]
        assert len(choice.starts) == len(choice.token_ids)
        assert len(choice.logprobs or ()) == sum(len(entries or ()) for _, _, entries in each_text)
        assert choice.begin == Begin(index, index) and (choice.finish_reason, choice.stop_reason) == ("stop", index)
    cut = random.randrange(len(mixed) + 1)
    pieces = [fold(part).choices for part in (mixed[:cut], mixed[cut:])]
    for index, choice in answer.choices.items():
        assert "".join(piece[index].text for piece in pieces if index in piece) == choice.text


def test_a_fold_leaves_the_events_alone() -> None:
    event = Text(0, "a", [1], [ENTRY], [0])
    fold([event, event])
    assert event == Text(0, "a", [1], [ENTRY], [0])
