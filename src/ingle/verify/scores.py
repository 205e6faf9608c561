"""What a model makes of a sequence, token by token: ours by the engine, the reference by one plain forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ingle.engine.engine import Engine
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, SamplingParams, TokenLogprobs, token_ids

_ROWS = 64
"""Rows of logits whose softmax is taken at once."""


@dataclass(frozen=True)
class Scores:
    """Of a sequence's tokens, the first left out: given all before it, how likely each one is and what is likeliest."""

    logprobs: list[float]
    best_ids: list[int]
    best_logprobs: list[float]

    def last(self, count: int) -> Scores:
        return Scores(self.logprobs[-count:], self.best_ids[-count:], self.best_logprobs[-count:])


@dataclass(frozen=True)
class Answer:
    """A prompt, its greedy continuation, and what our engine makes of both."""

    prompt: list[int]
    token_ids: list[int]
    decoded: Scores
    """Of the continuation, as it was decoded."""
    forced: Scores
    """Of prompt and continuation, read as one prompt, in chunks."""

    @property
    def sequence(self) -> list[int]:
        return self.prompt + self.token_ids


def answer_all(engine: Engine, prompts: Sequence[list[int]], num_tokens: int) -> list[Answer]:
    """Greedy continuations, all prompts in one batch; then the same tokens as prompts."""
    greedy = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
    decoded = _run(engine, prompts, greedy)
    tokens = [[token for output in outputs for token in output.token_ids] for outputs in decoded]
    forced = score_by_engine(engine, [prompt + answer for prompt, answer in zip(prompts, tokens, strict=True)])
    return [
        Answer(
            prompt=list(prompt),
            token_ids=answer,
            decoded=_scores([entry for output in outputs for entry in output.logprobs or ()]),
            forced=read,
        )
        for prompt, answer, outputs, read in zip(prompts, tokens, decoded, forced, strict=True)
    ]


def perplexity(scores: Sequence[Scores]) -> float:
    """Of all tokens but the first of each sequence; NaN of none."""
    values = [value for each in scores for value in each.logprobs]
    return math.exp(-sum(values) / len(values)) if values else math.nan


def score_by_engine(engine: Engine, sequences: Sequence[list[int]]) -> list[Scores]:
    """Each sequence read as a prompt; the context must hold one token more."""
    reading = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=1)
    read = _run(engine, sequences, reading)
    return [_scores([entry for entry in outputs[0].prompt_logprobs or () if entry is not None]) for outputs in read]


def _run(engine: Engine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[EngineOutput]]:
    outputs: dict[str, list[EngineOutput]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(index), token_ids(prompt), params))
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason == "error":
                raise EngineError(f"prompt {output.id} failed: {output.error}")
            outputs[output.id].append(output)
    return list(outputs.values())


def _scores(entries: Sequence[TokenLogprobs]) -> Scores:
    return Scores(
        [entry.logprobs[0] for entry in entries],
        [entry.token_ids[1] for entry in entries],
        [entry.logprobs[1] for entry in entries],
    )


@torch.inference_mode()
def scores_of(logits: torch.Tensor, sequence: Sequence[int]) -> Scores:
    """Of the logits [n, vocab] that a plain forward gives for the n tokens of a sequence."""
    following = torch.tensor(sequence[1:], device=logits.device)
    logprobs, best_ids, best_logprobs = [], [], []
    for low in range(0, len(following), _ROWS):
        ids = following[low : low + _ROWS]
        rows = logits[low : low + len(ids)].float().log_softmax(-1)
        logprobs += rows.gather(1, ids[:, None])[:, 0].tolist()
        best = rows.max(-1)
        best_ids += best.indices.tolist()
        best_logprobs += best.values.tolist()
    return Scores(logprobs, best_ids, best_logprobs)
