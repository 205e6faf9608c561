"""Results for people: a page in one file, which loads nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ingle.eval.cases import Case, right_choice
from ingle.eval.record import Answer, Asking
from ingle.eval.results import Results

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class _Row:
    """A case that some model has wrong."""

    case: Case
    question: str
    expected: str
    answers: list[Answer | None]
    """One a model."""

    @property
    def differs(self) -> bool:
        """Whether models are of different minds."""
        return len({answer.is_right for answer in self.answers if answer is not None}) > 1


def page(results: Results, asking: Asking, title: str) -> str:
    """HTML. All that comes from cases and models is text in it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: f"{100 * value:.1f} %"
    environment.filters["signed"] = lambda value: f"{100 * value:+.1f}"
    rows = [_row(case, results, asking) for case in results.cases]
    wrong = [row for row in rows if any(answer is None or not answer.is_right for answer in row.answers)]
    tags = list(dict.fromkeys(tag for case in results.cases for tag in case.tags))
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(results=results, rows=wrong, tags=tags, title=title, asking=asking)


def _row(case: Case, results: Results, asking: Asking) -> _Row:
    turns = case.conversation(asking.system)
    question = turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{t['role']}: {t['content']}" for t in turns)
    answers = [model.answers.get(case.id) for model in results.models]
    return _Row(case, question, _expected(case), answers)


def _expected(case: Case) -> str:
    if case.choices:
        index = right_choice(case)
        return f"{chr(ord('A') + index)}. {case.choices[index]}"
    if case.wanted is None:
        return case.scoring.rubric or ""
    return case.wanted if isinstance(case.wanted, str) else json.dumps(case.wanted, ensure_ascii=False)
