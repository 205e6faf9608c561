"""Sampling parameters: every bad value is refused by name, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ingle.errors import RequestError
from ingle.request import SamplingParams, TokenLogprobs, check_prompt

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -1.0), ("n", 0), ("n", True),
    ("seed", 1 << 70), ("repetition_penalty", 0.0), ("presence_penalty", 3.0), ("frequency_penalty", math.nan),
    ("max_tokens", -1), ("max_tokens", 1.0), ("min_tokens", 20), ("logprobs", 21), ("stop", ("",)),
    ("stop", ("a",) * 65), ("stop_token_ids", (-1,)), ("logit_bias", {5: 101.0}), ("logit_bias", {-5: 1.0}),
    ("logit_bias", {5: 10**4000}), ("logit_bias", {10**5000: 1.0}), ("seed", 10**5000), ("temperature", 10**5000),
    ("stop_token_ids", (1, 10**5000)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[name for name, _ in BAD])
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name and "\n" not in str(caught.value)


def test_stop_takes_a_string_or_several() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_all_bad_values_are_refused_together() -> None:
    with pytest.raises(RequestError, match=r"n must be.*; temperature must be.*; stop takes") as caught:
        SamplingParams(temperature=-1.0, n=0, stop=("",))
    assert caught.value.param == "n"


def test_seeds_of_choices() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert [SamplingParams(seed=5, n=3).of_choice(i, 1).seed for i in range(3)] == [5, 6, 7]
    edges = [SamplingParams(seed=seed, n=2).of_choice(1, 1).seed for seed in (-2, 2**63 - 1)]
    assert all(type(seed) is int and -(2**63) <= seed < 2**63 for seed in edges)
    assert SamplingParams(n=2).of_choice(1, 1).seed is None


def test_the_chosen_token_comes_before_its_equals() -> None:
    ranked = TokenLogprobs.ranked
    assert ranked(7, -1.0, 1, [5], [-1.0]) == TokenLogprobs([7, 7], [-1.0, -1.0], 1), "it was left out of the likeliest"
    assert ranked(7, -1.0, 2, [9, 5, 7], [-0.5, -1.0, -1.0]).token_ids == [7, 9, 7, 5]
    assert ranked(7, -1.0, 2, [9], [-0.5]) == TokenLogprobs([7, 9], [-1.0, -0.5], 2)
    assert ranked(7, -1.0, 1, [], []) == TokenLogprobs([7], [-1.0], 1)


def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    limits = {"vocab_size": 100, "max_model_len": 10}
    assert check_prompt([1] * 7, 50, **limits) == 3
    assert check_prompt([1] * 7, None, **limits) == 3
    assert check_prompt([1] * 7, 2, **limits) == 2
    assert check_prompt([1] * 10, 0, **limits) == 0
    with pytest.raises(RequestError, match="Shorten it by at least 1"):
        check_prompt([1] * 11, 0, **limits)
    with pytest.raises(RequestError, match="Shorten it by at least 1"):
        check_prompt([1] * 10, 1, **limits)
