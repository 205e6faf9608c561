"""Intervals and tests against published figures and brute force."""

from __future__ import annotations

import itertools
import math

import pytest

from ingle.eval.statistics import Paired, wilson


@pytest.mark.parametrize(
    ("num_right", "num", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson(num_right: int, num: int, low: float, high: float) -> None:
    assert wilson(num_right, num) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_of_no_case_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0) and Paired(0, 0, 0).p == 1.0 and Paired(0, 0, 0).difference == 0.0


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 5), (0, 6), (7, 2), (4, 4)])
def test_mcnemar_counts_all_splits_as_uneven(first: int, second: int) -> None:
    changed = first + second
    splits = list(itertools.product((0, 1), repeat=changed))
    as_uneven = sum(abs(2 * sum(split) - changed) >= abs(first - second) for split in splits)
    assert Paired(100, first, second).p == pytest.approx(as_uneven / len(splits))


def test_mcnemar_of_very_many() -> None:
    assert Paired(100_000, 20_000, 20_000).p == pytest.approx(1.0) and Paired(100_000, 1000, 2000).p < 1e-9


def test_a_difference_and_its_interval() -> None:
    paired = Paired(100, 5, 20)
    assert paired.difference == pytest.approx(0.15) and paired.is_more_than_noise
    low, high = paired.interval
    half = 1.959964 * math.sqrt(5.5 + 20.5 - 15**2 / 102) / 102
    assert (low, high) == (pytest.approx(15 / 102 - half), pytest.approx(15 / 102 + half)) and low > 0
