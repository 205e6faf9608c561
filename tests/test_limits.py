"""Limits: each is a flag that is checked at the start, and each word of a refusal says which flag it was."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from ingle.cli.flags import parse
from ingle.config import ServeConfig
from ingle.errors import ConfigError, RequestError
from ingle.limits import OFFLINE, LimitsConfig, flag_of, holding, limits
from ingle.request import SamplingParams
from ingle.structured import StructuredOutputs

NAMES = [field.name for field in fields(LimitsConfig)]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_value_is_refused_by_its_flag(name: str) -> None:
    wrong: list[Any] = [-1, "many", True, float("nan"), 10**30]
    for value in wrong if "timeout" not in name else wrong[:-1]:
        with pytest.raises(ConfigError, match=rf"^{flag_of(name)} ") as error:
            LimitsConfig(**{name: value})
        assert len(error.value.lines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_limit_is_a_flag_of_serve(name: str) -> None:
    default = getattr(LimitsConfig(), name)
    value = (1 if default is None else default) if name != "max_bodies_bytes" else 2 * default
    config = parse(ServeConfig, ["m", f"{flag_of(name)}={value}"], command="serve")
    assert getattr(config.server.limits, name) == value


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--h11-max-incomplete-event-size", "max_header_bytes"),
        ("--h11-max-header-count", "max_header_count"),
        ("--payload-limit", "max_body_bytes"),
        ("--max-queued-requests", "max_num_queued_reqs"),
    ],
)
def test_names_of_other_tools(flag: str, name: str) -> None:
    config = parse(ServeConfig, ["m", flag, "2048"], command="serve")
    assert getattr(config.server.limits, name) == 2048


def test_bodies_together_hold_one() -> None:
    with pytest.raises(ConfigError, match="--max-bodies-bytes 4096 is too small: one body may have 8192"):
        LimitsConfig(max_body_bytes=8192, max_bodies_bytes=4096)


def test_nobody_is_kept_from_their_own_machine() -> None:
    assert limits() is OFFLINE
    assert SamplingParams(n=1000, stop=("a",) * 100).n == 1000
    StructuredOutputs(choice=tuple(map(str, range(5000))))
    with holding(LimitsConfig(max_n=2)), pytest.raises(RequestError, match=r"n must be between 1 and 2 \(--max-n\)"):
        SamplingParams(n=3)
    assert limits() is OFFLINE


def test_what_tables_of_devices_hold_is_a_limit_for_all() -> None:
    for wrong in ({"logprobs": 21}, {"prompt_logprobs": 21}, {"logit_bias": dict.fromkeys(range(1025), 1.0)}):
        with pytest.raises(RequestError, match=r"2[01]|1024"):
            SamplingParams(**wrong)  # type: ignore[arg-type]
