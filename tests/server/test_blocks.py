"""Blocks: however events are cut, the same."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from ingle.events import Event, Text, Thought, fold
from ingle.server.blocks import Block, Blocks, Closed, Grown, Opened, blocks_of

from .scripts import answers, portions


def shown(block: Block) -> Block:
    return replace(block, pieces=[block.text])


@settings(deadline=None)
@given(answers, st.randoms(use_true_random=False))
def test_a_whole_answer_has_the_blocks_of_its_stream(told: list[Event], random: Random) -> None:
    streamed = Blocks()
    open_block, texts = None, []
    for portion in portions(told, random):
        for step in streamed.steps(portion):
            match step:
                case Opened(block):
                    assert open_block is None and block.index == len(texts)
                    open_block = block
                    texts.append("")
                case Grown(block, text):
                    assert block is open_block
                    texts[-1] += text
                case Closed(block):
                    assert block is open_block
                    open_block = None
    assert open_block is None and texts == [block.text for block in streamed.blocks]
    choice = fold(told).choices[0]
    whole = blocks_of(choice)
    assert list(map(shown, whole.blocks)) == list(map(shown, streamed.blocks))
    again = fold(choice.replay()).choices[0]
    assert (again.runs, again.text, again.thought) == (choice.runs, choice.text, choice.thought)
    assert (again.token_ids, again.logprobs or [], again.finish) == (
        choice.token_ids,
        choice.logprobs or [],
        choice.finish,
    )
    assert {at: each.arguments for at, each in again.calls.items()} == {
        at: each.arguments for at, each in choice.calls.items()
    }


@settings(deadline=None)
@given(answers)
def test_no_text_is_lost_but_white_space(told: list[Event]) -> None:
    blocks = blocks_of(fold(told).choices[0]).blocks
    shown = "".join(block.text for block in blocks if block.kind == "text")
    assert "".join(shown.split()) == "".join("".join(e.text for e in told if isinstance(e, Text)).split())
    assert all(block.text.strip() for block in blocks if block.kind == "text")
    thoughts = "".join(block.text for block in blocks if block.kind == "thought")
    assert thoughts == "".join(event.text for event in told if isinstance(event, Thought))
