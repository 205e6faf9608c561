"""The description of a KV cache: groups of layers, and the pages that a sequence needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.kv import KvSpec, first_page_seen, group_layers, longest, pages_held

windows = st.lists(st.sampled_from([None, 1, 7, 64]), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("kinds", "sizes", "num_empty"),
    [
        ([None] * 30, [30], 0),
        ([4096] * 32, [32], 0),
        ([64, None] * 13, [13, 13], 0),
        (([1024] * 5 + [None]) * 8, [8] * 6, 0),  # Gemma 3 12B
        (([1024] * 5 + [None]) * 5 + [1024] * 4, [5] * 6 + [5], 1),  # 4B
        (([512] * 5 + [None]) * 4 + [512] * 2, [4] * 7, 2),  # 1B
        (([1024] * 5 + [None]) * 10 + [1024] * 2, [6] * 11, 4),  # 27B: of 10, eight would be empty
        ([None] * 27 + [64], [28], 0),  # one layer is not worth 28 groups
    ],
)
def test_groups_are_large_and_nearly_full(kinds: list[int | None], sizes: list[int], num_empty: int) -> None:
    spec = KvSpec(group_layers(kinds), 2, 4, 256, "bfloat16")
    assert (len(spec.groups), spec.num_places) == (len(sizes), sizes[0])
    assert len(spec.groups) * spec.num_places - len(kinds) == num_empty
    assert spec.page_bytes(16) == 16 * sizes[0] * 2 * 4 * 256 * 2
    assert spec.token_bytes == len(kinds) * 2 * 4 * 256 * 2


@given(windows)
def test_every_layer_has_a_place_of_its_own_and_is_kept_as_long_as_it_reads(kinds: list[int | None]) -> None:
    spec = KvSpec(group_layers(kinds), 2, 1, 1, "float16")
    assert len(spec.located) == len(set(spec.located)) == len(kinds)
    for window, (group, place) in zip(kinds, spec.located, strict=True):
        kept = spec.groups[group].window
        assert place < spec.num_places
        assert kept is None or (window is not None and window <= kept)


@given(
    st.lists(st.sampled_from([None, 1, 7, 64]), min_size=1, max_size=4),
    st.integers(1, 40), st.integers(1, 8), st.integers(1, 50), st.integers(1, 300), st.integers(0, 80),
)  # fmt: skip
def test_pages_that_a_sequence_holds(
    kinds: list[int | None], length: int, page_size: int, chunk: int, most: int, num_pages: int
) -> None:
    """Counted out for every chunk; and the longest that fits is the longest."""
    most_held = max(
        sum(-(-min(start + chunk, length) // page_size) - first_page_seen(window, start, page_size) for window in kinds)
        for start in range(length)
    )
    assert most_held <= pages_held(kinds, length, page_size, chunk) <= most_held + len(kinds)
    found = longest(kinds, num_pages, page_size, chunk, most)
    assert found == 0 or pages_held(kinds, found, page_size, chunk) <= num_pages
    assert found == most or pages_held(kinds, found + 1, page_size, chunk) > num_pages
