"""Sampling parameters: every bad value is refused by name, before anything runs."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest

from ingle.errors import RequestError
from ingle.request import Sampling, SamplingParams, TokenLogprobs, room_for, token_ids, vocabulary_ids

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -1.0), ("n", 0), ("n", True),
    ("seed", 1 << 70), ("repetition_penalty", 0.0), ("presence_penalty", 3.0), ("frequency_penalty", math.nan),
    ("max_tokens", -1), ("max_tokens", 1.0), ("min_tokens", 20), ("logprobs", 21), ("stop", ("",)),
    ("stop", ("a",) * 16_385), ("stop_token_ids", (-1,)), ("logit_bias", {5: 101.0}), ("logit_bias", {-5: 1.0}),
    ("logit_bias", {5: 10**4000}), ("logit_bias", {10**5000: 1.0}), ("seed", 10**5000), ("temperature", 10**5000),
    ("stop_token_ids", (1, 10**5000)), ("allowed_token_ids", ()), ("allowed_token_ids", (-1,)), ("bad_words", ("",)),
    ("bad_words", ("a",) * 16_385), ("bad_token_ids", ((),)), ("bad_token_ids", ((1, -1),)), ("priority", 2**64),
    ("truncate_prompt_tokens", -2), ("cache_salt", "s" * 1025),
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


def test_min_tokens_must_fit_what_the_context_leaves() -> None:
    params = SamplingParams(min_tokens=5, max_tokens=None)
    assert params.of_choice(0, 5).min_tokens == 5
    with pytest.raises(RequestError, match=r"min_tokens \(5\) is greater than max_tokens \(4\)") as caught:
        params.of_choice(0, 4)
    assert caught.value.param == "min_tokens"


def test_the_chosen_token_comes_before_its_equals() -> None:
    ranked = TokenLogprobs.ranked
    assert ranked(7, -1.0, 1, [5], [-1.0]) == TokenLogprobs([7, 7], [-1.0, -1.0], 1), "it was left out of the likeliest"
    assert ranked(7, -1.0, 2, [9, 5, 7], [-0.5, -1.0, -1.0]).token_ids == [7, 9, 7, 5]
    assert ranked(7, -1.0, 2, [9], [-0.5]) == TokenLogprobs([7, 9], [-1.0, -0.5], 2)
    assert ranked(7, -1.0, 1, [], []) == TokenLogprobs([7], [-1.0], 1)


def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    assert room_for(7, 50, 10) == 3
    assert room_for(7, None, 10) == 3
    assert room_for(7, 2, 10) == 2
    assert room_for(10, 0, 10) == 0
    with pytest.raises(RequestError, match="Shorten it by at least 1"):
        room_for(11, 0, 10)
    with pytest.raises(RequestError, match="Shorten it by at least 1"):
        room_for(10, 1, 10)
    with pytest.raises(RequestError, match="the prompt is empty"):
        room_for(0, 0, 10)


@pytest.mark.parametrize("length", [1, 5, 4096, 4097, 10_000])
@pytest.mark.parametrize("wrong", [-1, 300, 2**31, -(2**40), 10**5000], ids=["-1", "300", "2^31", "-2^40", "10^5000"])
def test_token_ids_that_the_model_lacks_are_named(length: int, wrong: int) -> None:
    """Few and many, in any place, of any size."""
    ids = [(7 * i) % 300 for i in range(length)]
    assert vocabulary_ids(ids, 300) == token_ids(ids) and vocabulary_ids(token_ids(ids), 300) == token_ids(ids)
    for place in {0, length // 2, length - 1}:
        shown = f"{wrong} " if abs(wrong) < 2**99 else "an integer of"
        with pytest.raises(RequestError, match=f"token id {shown}.*vocabulary of 300 tokens") as caught:
            vocabulary_ids([*ids[:place], wrong, *ids[place + 1 :]], 300)
        assert caught.value.param == "prompt"


def test_token_ids_in_an_array_of_another_type() -> None:
    ids = [7] * 5000
    assert vocabulary_ids(array("q", ids), 300) == token_ids(ids)
    with pytest.raises(RequestError, match="token id 4294967296 is not in the model's vocabulary"):
        vocabulary_ids(array("q", [*ids, 1 << 32]), 300)


def test_the_engine_gets_what_it_needs_and_no_text() -> None:
    params = SamplingParams(temperature=0.5, stop=("x",), n=3, seed=1, logprobs=2, stop_token_ids=[7], ignore_eos=True)
    assert params.of_choice(2, 9) == Sampling(
        temperature=0.5, seed=3, logprobs=2, stop_token_ids=(7,), ignore_eos=True, max_tokens=9
    )
    apart = set(SamplingParams.__struct_fields__) - set(Sampling.__struct_fields__)
    of_text = {"n", "stop", "include_stop_str_in_output", "skip_special_tokens", "bad_words"}
    assert apart == of_text | {
        "truncate_prompt_tokens",
        "priority",
        "cache_salt",
        "return_progress",
        "structured_outputs",
    }
