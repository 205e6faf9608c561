from __future__ import annotations

import torch

from ingle.verify.scores import Answer, Scores, scores_of
from ingle.verify.verdict import Distance, Tolerance, compare, distance, tolerance_for

PROMPT, ANSWER = [1, 2], [3, 4, 5]


def scores(logprobs: list[float], best_ids: list[int], best_logprobs: list[float]) -> Scores:
    return Scores(logprobs, best_ids, best_logprobs)


def answered(*, forced: list[float], decoded: list[float]) -> Answer:
    ours = [-1.0] * 4
    return Answer(PROMPT, ANSWER, scores(decoded, ANSWER, decoded), scores(forced, [2, *ANSWER], ours))


def test_ties_are_told_from_wrong_tokens() -> None:
    right = scores([-1.0, -1.0, -1.5, -2.0], [2, 3, 9, 9], [-1.0, -1.0, -1.45, -1.0])
    answer = answered(forced=right.logprobs, decoded=right.logprobs[1:])
    found = compare(answer, right, Tolerance(1.0, 1.0, tie=0.1, why=""))
    assert (found.num_equal, found.num_ties, found.num_wrong, found.worst_gap) == (1, 1, 1, 1.0)
    assert found.distance == Distance(0.0, 0.0)


def test_both_ways_of_computing_a_token_count() -> None:
    right = scores([-1.0] * 4, [2, 3, 4, 5], [-1.0] * 4)
    assert distance([answered(forced=[-1.0, -1.0, -1.0, -1.7], decoded=[-1.0] * 3)], [right]) == Distance(0.7 / 7, 0.7)
    assert distance([answered(forced=[-1.0] * 4, decoded=[-1.7, -1.0, -1.0])], [right]) == Distance(0.7 / 7, 0.7)


def test_nan_is_never_within_a_tolerance() -> None:
    far = Distance.between([float("nan")], [1.0])
    assert not far.mean <= 1e9


def test_sixteen_bits_are_measured_by_the_references_own() -> None:
    right = [scores([-1.0, -2.0], [1, 2], [-1.0, -0.5])]
    same = [scores([-1.25, -2.0], [1, 2], [-1.0, -0.4])]
    float32, bfloat16 = tolerance_for("float32", right, None), tolerance_for("bfloat16", right, same)
    assert float32.max < 1e-3 and float32.mean < 1e-4
    assert 0.125 < bfloat16.mean < 0.2 and 0.5 <= bfloat16.max < 0.51 and 0.2 <= bfloat16.tie < 0.21


def test_scores_of_logits() -> None:
    logits, sequence = torch.randn(130, 50), torch.randint(0, 50, (130,)).tolist()
    found, expected = scores_of(logits, sequence), logits.log_softmax(-1)
    assert found.logprobs == [float(expected[i, token]) for i, token in enumerate(sequence[1:])]
    assert found.best_ids == logits[:-1].argmax(-1).tolist()
    assert found.best_logprobs == expected[:-1].max(-1).values.tolist()
