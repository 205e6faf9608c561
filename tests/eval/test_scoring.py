"""What counts as right: by hand, one line a case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingle.errors import ConfigError
from ingle.eval.cases import Case, read_cases, right_choice
from ingle.eval.numbers import number_in
from ingle.eval.scoring import json_in, score


def case_of(tmp_path: Path, **fields: Any) -> Case:
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"prompt": "?", **fields}), encoding="utf-8")
    return read_cases([path])[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("It is 42.", 42),
        ("-3.5", -3.5),
        ("−7", -7),
        ("1,234,567", 1234567),
        ("1 234", 1234),
        ("3, 4 and 5", 5),
        ("3,4,5", 5),
        ("17 + 25 = 42", 42),
        ("4.5e3", 4500),
        ("８５％", 85),
        ("答案是１２。", 12),
        (".5", 0.5),
        ("99.", 99),
        ("none", None),
        ("", None),
        ("1e999", None),
        ("٣", 3),
    ],
)
def test_the_last_number_of_an_answer(text: str, number: float | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', {"a": 1}),
        ('Sure! {"a": {"b": [1]}} ok', {"a": {"b": [1]}}),
        ("{not} but [1, 2]", [1, 2]),
        ("7", 7),
    ],
)
def test_json_in_an_answer(text: str, value: object) -> None:
    assert json_in(text) == value


@pytest.mark.parametrize("text", ["", "no", "{", "[" * 100_000, "{" * 100_000])
def test_an_answer_without_json(text: str) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        json_in(text)


@pytest.mark.parametrize(
    ("scoring", "expected", "answer", "right"),
    [
        ("exact", "Paris", " paris.\n", True),
        ("exact", "Paris", "It is Paris", False),
        ("exact", ["a", "b"], "B", True),
        ({"type": "exact", "case_sensitive": True}, "Paris", "paris", False),
        ("exact", "北京", "北京。", True),
        ("exact", 7, "7", True),
        ("contains", "Paris", "<think>Rome?</think>It is PARIS!", True),
        ("contains", "Rome", "<think>Rome?</think>Paris", False),
        ({"type": "contains", "all": True}, ["red", "blue"], "Red and green", False),
        ({"type": "contains", "all": True}, ["red", "blue"], "Red and Blue", True),
        ("contains", ["red", "blue"], "Red and green", True),
        ("regex", r"^\d{4}-\d\d$", "2024-03", True),
        ("regex", r"^\d{4}$", "2024-03", False),
        ("regex", "(a+)+$", "a" * 40 + "!", False),
        ("numeric", 42, "so it is 42", True),
        ("numeric", 42, "43", False),
        ({"type": "numeric", "tolerance": 1}, 42, "43", True),
        ({"type": "numeric", "relative_tolerance": 0.01}, 300000, "299,792", True),
        ("numeric", [1, 2], "2", True),
        ("json", {"a": 1, "b": {"c": "X"}}, '{"b": {"c": "x"}, "a": 1.0, "more": 0}', True),
        ("json", {"a": 1}, '{"a": "1"}', False),
        ("json", {"a": True}, '{"a": 1}', False),
        ("json", {"a": None}, "{}", False),
        ("json", [1, 2], "[1, 2]", True),
        ({"type": "json", "fields": ["items.0.id"]}, {"items": [{"id": 3}], "n": 1}, '{"items": [{"id": 3}]}', True),
    ],
)
def test_right_and_wrong(tmp_path: Path, scoring: Any, expected: Any, answer: str, right: bool) -> None:
    found = score(case_of(tmp_path, scoring=scoring, expected=expected), answer)
    assert found.right is right and (right or found.why)


def test_json_is_scored_by_its_fields(tmp_path: Path) -> None:
    case = case_of(tmp_path, scoring="json", expected={"name": "Ann", "age": 31, "city": "Rome", "of": {"x": 1}})
    found = score(case, '{"name": "ann", "age": 30, "of": {"x": 2}, "city": "Rome"}')
    assert (found.right, found.value, found.why) == (False, 0.5, "2 of 4 fields: age, of.x")


@pytest.mark.parametrize("expected", ["apple", "B", "b", 1, "1"])
def test_a_choice_goes_by_text_letter_or_index(tmp_path: Path, expected: Any) -> None:
    assert right_choice(case_of(tmp_path, scoring="choice", expected=expected, choices=["stone", "apple"])) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"prompt": None}, "either prompt or messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either prompt or messages"),
        ({"expect": 1}, "unknown field 'expect'"),
        ({"expected": None}, "exact needs an expected answer"),
        ({"max_tokens": 0}, "at least 1"),
        ({"scoring": "fuzzy"}, "fuzzy"),
        ({"scoring": {"type": "exact", "speed": 1}}, "speed"),
        ({"scoring": "numeric", "expected": "many"}, "'many' is no number"),
        ({"scoring": "regex", "expected": "("}, "no regular expression"),
        ({"scoring": "choice"}, "2 to 26 choices"),
        ({"scoring": "choice", "choices": ["a", "b"], "expected": "c"}, "none of the 2 choices"),
        ({"scoring": "judge", "expected": None}, "needs a rubric"),
        (
            {
                "scoring": "likelihood",
                "prompt": None,
                "messages": [{"role": "user", "content": "x"}],
                "choices": ["a", "b"],
                "expected": 0,
            },
            "continues a prompt",
        ),
    ],
)
def test_bad_cases_are_told_with_their_line(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=r"cases\.jsonl, line 1: ") as error:
        case_of(tmp_path, **{"expected": "x", **fields})
    assert told in str(error.value)


def test_files_that_hold_no_cases(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    for text, told in (("", "no case in it"), ("[1]", "no JSON object"), ("{", "no JSON"), ("[" * 9999, "no JSON")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_cases([path])
    path.write_text('{"id": 1, "prompt": "?", "expected": 1}\n' * 2)
    with pytest.raises(ConfigError, match=r"line 2: the id '1' is that of .*line 1"):
        read_cases([path])
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_cases([path])


def test_csv_is_the_same_as_jsonl(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "cases.csv", tmp_path / "cases.jsonl"
    csv.write_text(
        'id,question,answer,scoring,choices,tags,max_tokens\n1,"Which, then?",b,choice,a|b,x|y,\n'
        '2,Who?,"{""n"": 1}","{""type"": ""json"", ""tolerance"": 1}",,x,9\n',
        encoding="utf-8-sig",  # as Excel writes it
    )
    first = {"id": "1", "prompt": "Which, then?", "expected": "b", "scoring": "choice", "choices": ["a", "b"]}
    second = {"id": "2", "prompt": "Who?", "expected": {"n": 1}, "scoring": {"type": "json", "tolerance": 1}}
    lines = [{**first, "tags": ["x", "y"]}, {**second, "tags": "x", "max_tokens": 9}]
    jsonl.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [case.fingerprint for case in read_cases([csv])] == [case.fingerprint for case in read_cases([jsonl])]


def test_the_examples_are_cases() -> None:
    folder = Path(__file__).parents[2] / "examples/eval"
    assert len(read_cases([folder / "cases.jsonl"])) == 50 and read_cases([folder / "cases.csv"])
