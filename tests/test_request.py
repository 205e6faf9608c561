"""Sampling parameters: every bad value is refused by name, before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ingle.errors import RequestError
from ingle.request import SamplingParams, check_prompt

BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
    ("top_p", 0.0), ("top_p", 1.1), ("top_k", -2), ("top_k", 1.5), ("min_p", -1.0), ("n", 0), ("n", True),
    ("seed", 1 << 70), ("repetition_penalty", 0.0), ("presence_penalty", 3.0), ("frequency_penalty", math.nan),
    ("max_tokens", 0), ("min_tokens", 20), ("logprobs", 21), ("stop", ("",)), ("stop", ("a",) * 65),
    ("stop_token_ids", (-1,)), ("logit_bias", {5: 101.0}), ("logit_bias", {-5: 1.0}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name and "\n" not in str(caught.value)


def test_stop_takes_a_string_or_several() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_max_tokens_is_cut_to_what_the_context_leaves() -> None:
    limits = {"vocab_size": 100, "max_model_len": 10}
    assert check_prompt([1] * 7, 50, **limits) == 3
    assert check_prompt([1] * 7, None, **limits) == 3
    assert check_prompt([1] * 7, 2, **limits) == 2
    with pytest.raises(RequestError, match="Shorten it by at least 1"):
        check_prompt([1] * 10, 1, **limits)
