"""Whether an answer is right. Pure functions of a case and a text; choices and judges are asked for in `ask.py`."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import cast

import msgspec
import regex

from ingle.eval.cases import Case, wanted_list
from ingle.eval.numbers import number_in

_PATTERN_S = 1.0
"""That a pattern of a case may take on one answer."""
_FENCE = regex.compile(r"```(?:json)?\s*\n(.*?)```", regex.DOTALL)
_OPENS = regex.compile(r"[{\[]")
_MAX_JSON = 1 << 20
_MOST_TRIES = 100
"""Places where JSON may begin: each may take a look at all that follows."""


class Score(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an answer is worth."""

    right: bool
    value: float
    """0 to 1: of json the share of fields that are right, of judge what it gave; else 0 or 1."""
    why: str = ""
    """What was wrong, for people."""


def score(case: Case, answer: str) -> Score:
    """Of a kind that needs the text alone. The thinking that a server leaves in an answer does not count."""
    text = without_thoughts(answer)
    match case.scoring.kind:
        case "exact":
            return _exact(case, text)
        case "contains":
            return _contains(case, text)
        case "regex":
            return _regex(case, text)
        case "numeric":
            return _numeric(case, text)
        case "json":
            return _json(case, text)
        case kind:
            raise ValueError(f"scoring {kind} is not of a text alone")


def without_thoughts(answer: str) -> str:
    _, closed, rest = answer.rpartition("</think>")
    return (rest if closed else answer).strip()


def _of(right: bool, why: str = "") -> Score:
    return Score(right, float(right), "" if right else why)


def _folded(text: str, case_sensitive: bool) -> str:
    """Without differences that nobody means: width and form of characters, runs of white space, capitals."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text if case_sensitive else text.casefold()


def _exact(case: Case, text: str) -> Score:
    capitals = case.scoring.case_sensitive
    found = _folded(text, capitals)
    wanted = [_folded(_text(each), capitals) for each in wanted_list(case)]
    bare = found.rstrip(".。!！")  # a sentence's end, unless it is asked for
    return _of(found in wanted or bare in wanted, "another text")


def _contains(case: Case, text: str) -> Score:
    capitals = case.scoring.case_sensitive
    found = _folded(text, capitals)
    missing = [each for each in wanted_list(case) if _folded(_text(each), capitals) not in found]
    if case.scoring.all:
        return _of(not missing, f"without {_shown(missing)}")
    return _of(len(missing) < len(wanted_list(case)), f"without {_shown(missing)}")


def _regex(case: Case, text: str) -> Score:
    flags = 0 if case.scoring.case_sensitive else regex.IGNORECASE
    for each in wanted_list(case):
        try:
            if regex.search(str(each), text, flags, timeout=_PATTERN_S):
                return _of(True)
        except TimeoutError:
            return _of(False, f"{each!r:.60} took longer than {_PATTERN_S:g} s on this answer")
    return _of(False, f"no match of {_shown(wanted_list(case))}")


def _near(found: float, wanted: float, case: Case) -> bool:
    room = max(case.scoring.tolerance, case.scoring.relative_tolerance * abs(wanted))
    return abs(found - wanted) <= room


def _numeric(case: Case, text: str) -> Score:
    found = number_in(text)
    if found is None:
        return _of(False, "no number in it")
    wanted = [cast(float, number_in(_text(each))) for each in wanted_list(case)]
    return _of(any(_near(found, each, case) for each in wanted), f"{found:g} in place of {wanted[0]:g}")


def json_in(text: str) -> object:
    """The JSON value of an answer: all of it, that of the last fence, or the first object or list within. Raises
    `ValueError`."""
    candidates = [text, *reversed(_FENCE.findall(text))] if len(text) <= _MAX_JSON else []
    for candidate in candidates:
        try:
            return cast(object, json.loads(candidate))
        except (ValueError, RecursionError):
            continue
    decoder = json.JSONDecoder()
    for match in itertools.islice(_OPENS.finditer(text[:_MAX_JSON]), _MOST_TRIES):
        try:
            return cast(object, decoder.raw_decode(text, match.start())[0])
        except (ValueError, RecursionError):
            continue
    raise ValueError("no JSON in it")


_MISSING = object()


def _json(case: Case, text: str) -> Score:
    try:
        found = json_in(text)
    except ValueError as error:
        return _of(False, str(error))
    paths = [tuple(path.split(".")) for path in case.scoring.fields] or _leaves(case.wanted)
    wrong = [path for path in paths if not _equal(_at(found, path), _at(case.wanted, path), case)]
    share = 1 - len(wrong) / len(paths)
    named = ", ".join(".".join(path) or "the value" for path in wrong[:5])
    return Score(not wrong, share, f"{len(wrong)} of {len(paths)} fields: {named}" if wrong else "")


def _leaves(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where an expected value has texts, numbers and lists."""
    if isinstance(value, dict) and value:
        return [leaf for name, inner in value.items() for leaf in _leaves(inner, (*path, name))]
    return [path]


def _at(value: object, path: Sequence[str]) -> object:
    for name in path:
        if isinstance(value, dict) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return _MISSING
    return value


def _equal(found: object, wanted: object, case: Case) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool) or wanted is None:
        return found is wanted
    if isinstance(wanted, (int, float)):
        return isinstance(found, (int, float)) and _near(found, wanted, case)
    if isinstance(wanted, str):
        capitals = case.scoring.case_sensitive
        return isinstance(found, str) and _folded(found, capitals) == _folded(wanted, capitals)
    if isinstance(wanted, list):
        same = isinstance(found, list) and len(found) == len(wanted)
        return same and all(_equal(a, b, case) for a, b in zip(cast(list[object], found), wanted, strict=True))
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_equal(found.get(key, _MISSING), wanted[key], case) for key in wanted)
    return False


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shown(values: Sequence[object]) -> str:
    return ", ".join(repr(_text(value)[:60]) for value in values[:3])
