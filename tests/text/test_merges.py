from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingle.text.merges import merges_of


def by_definition(pieces: list[str]) -> list[tuple[str, str]]:
    cuts = ((piece[:at], piece[at:]) for piece in pieces for at in range(len(piece) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in pieces and right in pieces]


@given(st.lists(st.text("ab▁𝄞", max_size=7), unique=True, max_size=60))
def test_every_cut_into_two_pieces_in_order(pieces: list[str]) -> None:
    assert merges_of(pieces) == by_definition(pieces)


@given(st.integers(1, 400))
def test_a_long_piece(length: int) -> None:
    pieces = ["a" * length, "a", "a" * (length + 1), "\U0010ffff", "a\U0010ffff"]
    assert merges_of(pieces) == by_definition(pieces)
