"""From two models' scores of the same tokens to a verdict, by a tolerance that the arithmetic itself sets.

In float32 the two differ by the order in which they add up. In 16 bits nobody computes float32's numbers; what is asked
is to be no farther from them than transformers' own code is in the same type, which is measured on the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ingle.verify.scores import Answer, Scores

FLOAT32_MEAN, FLOAT32_MAX = 2e-5, 2e-4
MEAN_FACTOR, MAX_FACTOR = 1.25, 2.0
"""How much farther from float32 than transformers in the same type: roundings fall elsewhere, and some are unlucky."""


@dataclass(frozen=True)
class Distance:
    """Of log probabilities, in nats."""

    mean: float
    max: float

    @staticmethod
    def between(a: Iterable[float], b: Iterable[float]) -> Distance:
        apart = [abs(x - y) for x, y in zip(a, b, strict=True)]
        return Distance(sum(apart) / len(apart), max(apart)) if apart else Distance(0.0, 0.0)


@dataclass(frozen=True)
class Tolerance:
    """Of log probabilities, in nats."""

    mean: float
    max: float
    tie: float
    """By how much the reference may prefer its own token to ours."""
    why: str


@dataclass(frozen=True)
class Comparison:
    """Of one prompt and its answer, or of all together."""

    num_prompt_tokens: int
    num_answer_tokens: int
    distance: Distance
    num_equal: int
    """Answer tokens that the reference finds likeliest, too, after the same tokens."""
    num_ties: int
    """Others, which it finds less likely by no more than the tolerance of ties."""
    num_wrong: int
    worst_gap: float
    """By how much the reference prefers its own token at the worst, in nats."""


def tolerance_for(dtype: str, right: Sequence[Scores], same_dtype: Sequence[Scores] | None) -> Tolerance:
    """`right` are the reference's scores in float32, `same_dtype` those that it has in `dtype` itself.

    Two tokens tie when each may be off by as much as the likeliest ones are, in opposite directions.
    """
    if same_dtype is None:
        return Tolerance(FLOAT32_MEAN, FLOAT32_MAX, 2 * FLOAT32_MAX, "float32: what the order of additions may change")
    every = Distance.between(*([value for one in scores for value in one.logprobs] for scores in (same_dtype, right)))
    best = Distance.between(*([v for one in scores for v in one.best_logprobs] for scores in (same_dtype, right)))
    return Tolerance(
        FLOAT32_MEAN + MEAN_FACTOR * every.mean,
        FLOAT32_MAX + MAX_FACTOR * every.max,
        2 * (FLOAT32_MAX + best.max),
        f"{dtype}: {MEAN_FACTOR:g} and {MAX_FACTOR:g} times as far from float32 as the reference's own {dtype}, "
        f"whose mean is {every.mean:.2g} and maximum {every.max:.2g} on these tokens",
    )


def distance(answers: Sequence[Answer], references: Sequence[Scores]) -> Distance:
    """Of every token but the first of each prompt, read in chunks, and of every token that was decoded."""
    ours, theirs = [], []
    for answer, reference in zip(answers, references, strict=True):
        ours += answer.forced.logprobs + answer.decoded.logprobs
        theirs += reference.logprobs + reference.last(len(answer.token_ids)).logprobs
    return Distance.between(ours, theirs)


def compare(answer: Answer, reference: Scores, tolerance: Tolerance) -> Comparison:
    """Against the reference's float32 scores of the whole sequence: each token is judged after those that we chose."""
    chosen = reference.last(len(answer.token_ids))
    gaps = [
        best - own
        for token, best_id, best, own in zip(
            answer.token_ids, chosen.best_ids, chosen.best_logprobs, chosen.logprobs, strict=True
        )
        if token != best_id
    ]
    num_wrong = sum(gap > tolerance.tie for gap in gaps)
    return Comparison(
        num_prompt_tokens=len(answer.prompt),
        num_answer_tokens=len(answer.token_ids),
        distance=distance([answer], [reference]),
        num_equal=len(answer.token_ids) - len(gaps),
        num_ties=len(gaps) - num_wrong,
        num_wrong=num_wrong,
        worst_gap=max(gaps, default=0.0),
    )
