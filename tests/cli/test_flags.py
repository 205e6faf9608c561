from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingle.cli.fields import parse_int
from ingle.cli.flags import parse
from ingle.errors import ConfigError


@dataclass(frozen=True)
class Inner:
    """What is inside."""

    model: str
    """The model."""
    count: int | None = None
    """How many."""
    share: float = 0.5
    """How much."""
    fast: bool = False
    """Hurry."""
    careful: bool = True
    """Take care."""
    maybe: bool | None = None
    """Undecided."""
    names: tuple[str, ...] = ()
    """What to
    call it."""
    kind: Literal["a", "b"] = "a"
    quantization: str | None = None
    """Short: -q."""


@dataclass(frozen=True)
class Outer:
    """The command."""

    inner: Inner
    some_file: Path | None = None
    """A file."""


def read(*argv: str) -> Outer:
    return parse(Outer, argv, command="test")


def test_defaults_and_values() -> None:
    assert read("m") == Outer(Inner("m"))
    argv = "m --count 3 --share 0.25 --fast --no-careful --maybe true --names x y --kind b -q z --some-file f"
    assert read(*argv.split()) == Outer(Inner("m", 3, 0.25, True, False, True, ("x", "y"), "b", "z"), Path("f"))


@pytest.mark.parametrize(
    "argv", ["m --some-file f", "m --some_file f", "m --some_file=f", "--some-file f m", "--some-file=f --model m"]
)
def test_spellings(argv: str) -> None:
    assert read(*argv.split()) == Outer(Inner("m"), Path("f"))


def test_the_word_none_is_text() -> None:
    assert read("m", "-q", "None").inner.quantization == "None"


@pytest.mark.parametrize("argv", ["m", "--model m", "--model=m", "m --model m", "--model m --model=m"])
def test_model_both_ways(argv: str) -> None:
    assert read(*argv.split()).inner.model == "m"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "ingle test needs a MODEL: `ingle test "),
        ("m --cuont 3", "unknown flag --cuont; did you mean --count?"),
        ("m --cuont=3", "unknown flag --cuont; did you mean --count?"),
        ("m --some_fil f", "unknown flag --some_fil; did you mean --some-file?"),
        ("m --no-carefull", "did you mean --no-careful?"),
        ("m --zzz", "unknown flag --zzz"),
        ("m extra", "unexpected argument 'extra'"),
        ("m --model other", "unexpected argument 'm'; the model was already given as --model other"),
        ("--model a --model b", "--model was given twice: 'a' and 'b'"),
        ("--model", "--model needs a value"),
        ("--model --fast", "--model needs a value"),
        ("m --count", "--count needs a value"),
        ("m --count x", "--count: 'x' is not a whole number"),
        ("m --count 1.5", "--count: '1.5' is not a whole number"),
        ("m --share x", "--share: could not convert string to float: 'x'"),
        ("m --kind c", "invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b')"),
        ("m --maybe None", "invalid choice 'None' for argument '--maybe'"),
    ],
)
def test_mistakes_are_told_in_one_line(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(*argv.split())
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_help_is_the_docstrings(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        read("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: ingle test [-h] [OPTIONS] MODEL" in out
    for text in (
        "The command.",
        "What is inside.",
        "How much. (default: 0.5)",
        "What to call it.",
        "--maybe {true,false}",
    ):
        assert text in out
    assert "None" not in out


def test_hidden_fields_have_no_flag() -> None:
    hide = {Inner: {"count"}}
    assert parse(Outer, ["m", "--share", "1"], command="test", hide=hide).inner == Inner("m", share=1.0)
    with pytest.raises(ConfigError, match="unknown flag --count"):
        parse(Outer, ["m", "--count", "1"], command="test", hide=hide)


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("-1", -1), ("4k", 4000), ("4K", 4096), ("25.6k", 25_600), ("1.5M", 1_572_864), ("2g", 2 * 10**9)],
)
def test_whole_numbers(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "1e3", "1_000", "4kk", "4 k", "0x10", "nan", "9" * 1000])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        parse_int(text)


@given(st.integers(-(10**17), 10**17))
def test_plain_integers_are_themselves(value: int) -> None:
    assert parse_int(str(value)) == value


@given(st.text(max_size=30))
def test_numbers_or_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_int(text), int)
