"""What a configuration says is given out as asked for, or refused in one line that names it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from ingle.errors import ModelError
from ingle.weights.checked import Checked

VALUES = Checked(
    {"layers": 4, "eps": 1e-6, "tied": True, "act": "silu", "kinds": ["a", "b"], "rope": {"factor": 2}, "unsaid": None},
    "config.json",
)


def test_what_is_there_is_given_out() -> None:
    assert VALUES.integer("layers", least=4, most=4) == VALUES.optional_integer("layers") == 4
    assert VALUES.number("layers") == 4.0 and type(VALUES.number("layers")) is float
    assert VALUES.optional_number("eps") == 1e-6
    assert VALUES.flag("tied") is True
    assert VALUES.choice("act", {"silu": 1}, "relu") == 1
    assert VALUES.items("kinds", str, "names") == ["a", "b"]
    assert VALUES.section("rope").number("factor") == 2.0


@pytest.mark.parametrize("key", ["absent", "unsaid"])
def test_null_counts_as_absent(key: str) -> None:
    assert key not in VALUES and "layers" in VALUES
    assert (VALUES.integer(key, 7), VALUES.number(key, 0.5), VALUES.flag(key), VALUES.flag(key, True)) == (
        7, 0.5, False, True,
    )  # fmt: skip
    assert VALUES.optional_integer(key) is None and VALUES.optional_number(key) is None
    assert VALUES.choice(key, {"silu": 1}, "silu") == 1
    assert VALUES.items(key, str, "names") == [] and "factor" not in VALUES.section(key)
    with pytest.raises(ModelError, match=f"config.json: {key} is None, not a whole number"):
        VALUES.integer(key)
    with pytest.raises(ModelError, match=f"config.json: {key} is None, not a number"):
        VALUES.number(key)


ODD = (True, "4", 4.5, [4], {}, -1, 0, math.nan, math.inf, 10**400)


def refused(key: str, value: object, get: Callable[[Checked], object], expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        get(Checked({key: value}, "file", "rope "))
    message = str(caught.value)
    assert message.startswith(f"file: rope {key} is ") and message.endswith(f", not {expected}"), message
    assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_odd_values_are_refused(value: object) -> None:
    refused("k", value, lambda values: values.integer("k", 1, most=9), "a whole number from 1 to 9")
    if type(value) is not bool:
        refused("k", value, lambda values: values.flag("k", True), "true or false")
    if value != 4.5:
        refused("k", value, lambda values: values.number("k", 1.0), "a number above 0")
    if not isinstance(value, list):
        refused("k", value, lambda values: values.items("k", int, "layers"), "a list of layers")
    if not isinstance(value, dict):
        refused("k", value, lambda values: values.section("k"), "an object")


def test_bounds() -> None:
    values = Checked({"one": 1, "true": [1, True]}, "file")
    assert values.number("one", least=1, most=1) == 1.0
    refused("k", 1, lambda values: values.number("k", above=1.0, most=5), "a number above 1 and at most 5")
    refused("k", 1.5, lambda values: values.number("k", least=2), "a number of at least 2")
    refused("k", [1, True], lambda values: values.items("k", int, "layers"), "a list of layers")
    with pytest.raises(ModelError, match=r"file: one 1 is not supported; known are a, b"):
        values.choice("one", {"a": 1, "b": 2}, "a")
