"""What all answers amount to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ingle.eval.cases import Case
from ingle.eval.record import Answer, Asking, Record
from ingle.eval.statistics import Paired, wilson

VERSION = 1
"""Of the form of `results.json`."""


@dataclass(frozen=True)
class Share:
    """Right answers among some cases."""

    num: int
    num_right: int
    mean_score: float

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num if self.num else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.num_right, self.num)


@dataclass(frozen=True)
class ModelResult:
    """One model on the cases that it answered and that were judged."""

    name: str
    answers: Mapping[str, Answer]
    """By case, in the order of the cases."""
    every: Share
    tags: Mapping[str, Share]
    num_missing: int
    """Cases without an answer or a verdict."""
    num_errors: int
    """Refused by the server; they count as wrong."""
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """During which at least one answer was on its way."""


@dataclass(frozen=True)
class Pair:
    first: str
    second: str
    paired: Paired
    changed: Sequence[str]
    """Cases that one of the two alone has right."""


@dataclass(frozen=True)
class Results:
    cases: Sequence[Case]
    models: Sequence[ModelResult]
    pairs: Sequence[Pair]

    @property
    def is_whole(self) -> bool:
        return not any(model.num_missing for model in self.models)


def results_of(cases: Sequence[Case], models: Sequence[str], asking: Asking, record: Record) -> Results:
    each = [_of_model(name, cases, asking, record) for name in models]
    pairs = [_pair(first, second) for first, second in itertools.combinations(each, 2)]
    return Results(cases, each, [pair for pair in pairs if pair.paired.num])


def _of_model(name: str, cases: Sequence[Case], asking: Asking, record: Record) -> ModelResult:
    found = ((case, record.of(name, case.id, asking.fingerprint(case.fingerprint))) for case in cases)
    answered = [(case, answer) for case, answer in found if answer is not None and answer.score is not None]
    tags = dict.fromkeys(tag for case in cases for tag in case.tags)
    answers = [answer for _, answer in answered]
    return ModelResult(
        name,
        {answer.id: answer for answer in answers},
        _share(answers),
        {tag: _share([answer for case, answer in answered if tag in case.tags]) for tag in tags},
        len(cases) - len(answered),
        sum(answer.error is not None for answer in answers),
        sum(answer.prompt_tokens for answer in answers),
        sum(answer.completion_tokens for answer in answers),
        _seconds(answers),
    )


def _share(answers: Sequence[Answer]) -> Share:
    values = [answer.score.value for answer in answers if answer.score is not None]
    mean = sum(values) / len(values) if values else 0.0
    return Share(len(answers), sum(answer.is_right for answer in answers), mean)


def _seconds(answers: Sequence[Answer]) -> float:
    total, until = 0.0, 0.0
    for answer in sorted(answers, key=lambda each: each.begun):
        total += max(0.0, answer.ended - max(until, answer.begun))
        until = max(until, answer.ended)
    return total


def _pair(first: ModelResult, second: ModelResult) -> Pair:
    both = [id_ for id_ in first.answers if id_ in second.answers]
    only_first = [id_ for id_ in both if first.answers[id_].is_right and not second.answers[id_].is_right]
    only_second = [id_ for id_ in both if second.answers[id_].is_right and not first.answers[id_].is_right]
    paired = Paired(len(both), len(only_first), len(only_second))
    return Pair(first.name, second.name, paired, [id_ for id_ in both if id_ in {*only_first, *only_second}])


def figures(results: Results, asking: Asking, command: Sequence[str]) -> dict[str, object]:
    """As `results.json` has it."""
    from ingle.version import __version__

    def of_share(share: Share) -> dict[str, object]:
        low, high = share.interval
        return {
            "cases": share.num,
            "right": share.num_right,
            "accuracy": share.accuracy,
            "interval_95": [low, high],
            "mean_score": share.mean_score,
        }

    return {
        "version": VERSION,
        "ingle": __version__,
        "command": list(command),
        "asking": {"max_tokens": asking.max_tokens, "temperature": asking.temperature, "seed": asking.seed,
                   "system": asking.system},
        "whole": results.is_whole,
        "models": [
            {
                "model": model.name,
                **of_share(model.every),
                "missing": model.num_missing,
                "errors": model.num_errors,
                "prompt_tokens": model.prompt_tokens,
                "completion_tokens": model.completion_tokens,
                "seconds": model.seconds,
                "tags": {tag: of_share(share) for tag, share in model.tags.items()},
            }
            for model in results.models
        ],
        "pairs": [
            {
                "first": pair.first,
                "second": pair.second,
                "cases": pair.paired.num,
                "only_first_right": pair.paired.only_first,
                "only_second_right": pair.paired.only_second,
                "difference": pair.paired.difference,
                "interval_95": list(pair.paired.interval),
                "p": pair.paired.p,
                "changed": list(pair.changed),
            }
            for pair in results.pairs
        ],
        "answers": [
            {
                "model": model.name,
                "id": answer.id,
                "right": answer.is_right,
                "score": answer.score.value if answer.score else None,
                "why": answer.score.why if answer.score else None,
                "text": answer.text,
                "error": answer.error,
            }
            for model in results.models
            for answer in model.answers.values()
        ],
    }  # fmt: skip
