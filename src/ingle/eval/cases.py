"""Cases: what a model is asked and which answer is right, from JSONL or CSV.

    {"id": "sum-1", "prompt": "What is 17 + 25?", "expected": 42, "scoring": "numeric", "tags": ["sums"]}

`scoring` is a name, or an object with a name and its options: {"type": "numeric", "tolerance": 0.01}. In CSV the first
line names the columns; tags and choices are separated by `|`.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ingle.errors import ConfigError, printable
from ingle.eval.numbers import number_in

Kind = Literal["exact", "contains", "regex", "json", "numeric", "choice", "likelihood", "judge"]
_MAX_BYTES = 256 << 20
_MAX_CASES = 100_000
_MAX_CHOICES = 26
_MAX_TOLD = 10
_SEPARATOR = "|"


class Scoring(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"kind": "type"}, omit_defaults=True):
    """How an answer is judged."""

    kind: Kind = "exact"
    case_sensitive: bool = False
    """Of exact, contains and regex: whether capitals count."""
    all: bool = False
    """Of contains: whether all of several texts are wanted, or any."""
    tolerance: float = 0.0
    """Of numeric and json: how far a number may be from the expected one."""
    relative_tolerance: float = 1e-6
    """The same, as a share of the expected number. The wider of the two counts."""
    fields: tuple[str, ...] = ()
    """Of json: what is compared, such as `address.city` or `items.0`; without it all that is expected."""
    rubric: str | None = None
    """Of judge: what a good answer has."""
    normalize: bool = True
    """Of likelihood: whether a choice's log probability is divided by its length, as lm-eval's acc_norm."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


class Case(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question. Either `messages` or `prompt` stands."""

    id: str
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    system: str | None = None
    """Put before a prompt or messages without one."""
    expected: msgspec.Raw = msgspec.Raw(b"null")
    """JSON of any kind: texts, several of which any will do; a number; an object; the letter, the text or the index
    of a choice."""
    choices: tuple[str, ...] = ()
    scoring: Scoring = Scoring()
    tags: tuple[str, ...] = ()
    max_tokens: int | None = None
    """Else the command's."""

    @property
    def wanted(self) -> object:
        """`expected`, decoded."""
        return msgspec.json.decode(self.expected)

    @property
    def fingerprint(self) -> str:
        """Of all that decides about the answer and its score: a case that was changed is asked again."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    def conversation(self, system: str | None) -> list[dict[str, str]]:
        """As /v1/chat/completions takes it. `system` is for cases that bring none."""
        turns = [{"role": each.role, "content": each.content} for each in self.messages]
        turns = turns or [{"role": "user", "content": self.prompt or ""}]
        system = self.system if self.system is not None else system
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        return turns


def read_cases(paths: Sequence[Path], *, scoring: Scoring | None = None) -> list[Case]:
    """All cases of the files. `scoring` is for those that say none. Raises `ConfigError`."""
    cases, seen, wrong = list[Case](), dict[str, str](), list[str]()
    for path in paths:
        for where, fields in _rows(path):
            try:
                case = _case(fields, scoring or Scoring(), default_id=f"{path.stem}-{where}")
            except (msgspec.ValidationError, ValueError) as error:
                wrong.append(f"{path}, line {where}: {printable(str(error))}")
                continue
            if case.id in seen:
                wrong.append(f"{path}, line {where}: the id {case.id!r:.60} is that of {seen[case.id]}")
            seen[case.id] = f"{path}, line {where}"
            cases.append(case)
            if len(cases) > _MAX_CASES:
                raise ConfigError(f"{path}: more than {_MAX_CASES:,} cases: split the file")
    if wrong:
        more = f"; and {len(wrong) - _MAX_TOLD} lines more" if len(wrong) > _MAX_TOLD else ""
        raise ConfigError("; ".join(wrong[:_MAX_TOLD]) + more)
    if not cases:
        raise ConfigError(f"{', '.join(map(str, paths))}: no case in it")
    return cases


def _rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and fields."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: more than {_MAX_BYTES >> 20} MiB: split the file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not UTF-8'}") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        yield from _of_csv(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}, line {number}: no JSON: {printable(str(error))}") from None
            if not isinstance(fields, dict):
                raise ConfigError(f"{path}, line {number}: {line.strip()[:40]!r} is no JSON object")
            yield number, fields


def _of_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(f"{path}, line {reader.line_num}: it has not the columns of the first line")
            fields: dict[str, object] = _renamed({name.strip(): cell for name, cell in row.items() if cell != ""})
            for name in ("tags", "choices"):
                if name in fields:
                    fields[name] = [each.strip() for each in str(fields[name]).split(_SEPARATOR)]
            for name in ("scoring", "expected"):  # an object, if it is one
                value = str(fields.get(name, "")).strip()
                if value[:1] in ("{", "["):
                    fields[name] = json.loads(value)
            if "max_tokens" in fields:
                fields["max_tokens"] = int(str(fields["max_tokens"]))
            yield reader.line_num, fields
    except (csv.Error, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {printable(str(error))}") from None


_OTHER_NAMES = {"question": "prompt", "input": "prompt", "answer": "expected", "ideal": "expected", "tag": "tags"}


def _renamed(fields: Mapping[str, object]) -> dict[str, object]:
    return {_OTHER_NAMES.get(name, name): value for name, value in fields.items()}


def _case(fields: Mapping[str, object], scoring: Scoring, *, default_id: str) -> Case:
    """Raises `ValueError` and `msgspec.ValidationError`."""
    known = _renamed(fields)
    unknown = sorted(set(known) - set(Case.__struct_fields__) - set(_IGNORED))
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r:.60}: a case has {', '.join(Case.__struct_fields__)}")
    if isinstance(known.get("tags"), str):
        known["tags"] = [known["tags"]]
    if isinstance(known.get("scoring"), str):
        known["scoring"] = {"type": known["scoring"]}
    known["id"] = str(known.get("id", default_id))
    known["expected"] = msgspec.Raw(msgspec.json.encode(known.get("expected")))
    known.setdefault("scoring", scoring)
    case = msgspec.convert({name: known[name] for name in Case.__struct_fields__ if name in known}, Case)
    _check(case)
    return case


_IGNORED = ("comment", "note")


def _check(case: Case) -> None:
    """Raises `ValueError`."""
    kind = case.scoring.kind
    if (case.prompt is None) == (not case.messages):
        raise ValueError("give either prompt or messages")
    if case.max_tokens is not None and case.max_tokens < 1:
        raise ValueError(f"max_tokens is {case.max_tokens}: give at least 1")
    if kind in ("choice", "likelihood"):
        if not 2 <= len(case.choices) <= _MAX_CHOICES:
            raise ValueError(f"scoring {kind} needs 2 to {_MAX_CHOICES} choices, and there are {len(case.choices)}")
        right_choice(case)
    elif kind == "judge":
        if case.scoring.rubric is None and case.wanted is None:
            raise ValueError("scoring judge needs a rubric, or an expected answer to compare with")
    elif case.wanted is None:
        raise ValueError(f"scoring {kind} needs an expected answer")
    if kind == "likelihood" and case.messages:
        raise ValueError("scoring likelihood continues a prompt: give prompt in place of messages, or scoring choice")
    if kind == "numeric":
        for each in wanted_list(case):
            if number_in(str(each)) is None:
                raise ValueError(f"expected {each!r:.60} is no number")
    if kind == "regex":
        import regex

        for each in wanted_list(case):
            try:
                regex.compile(str(each))
            except regex.error as error:
                raise ValueError(f"expected {each!r:.60} is no regular expression: {error}") from None


def wanted_list(case: Case) -> list[object]:
    """Expected answers of which any will do."""
    wanted = case.wanted
    return list(wanted) if isinstance(wanted, list) else [wanted]


def right_choice(case: Case) -> int:
    """The index of the expected one, which may be given as its text, its letter or its index. Raises `ValueError`."""
    wanted = case.wanted
    if isinstance(wanted, str):
        if wanted in case.choices:
            return case.choices.index(wanted)
        letter = ord(wanted.strip().upper()) - ord("A") if len(wanted.strip()) == 1 else -1
        if 0 <= letter < len(case.choices):
            return letter
        if wanted.strip().isdecimal():
            wanted = int(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 0 <= wanted < len(case.choices):
        return wanted
    raise ValueError(f"expected {case.wanted!r:.60} is none of the {len(case.choices)} choices, nor a letter or index")
