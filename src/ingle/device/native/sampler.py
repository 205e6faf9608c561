"""From logits to tokens without PyTorch: what `kernels.reference_sampling` does, a row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64, c_uint8

import numpy as np
import numpy.typing as npt

from ingle.device import LogprobRows
from ingle.kernels.cpu import library
from ingle.request import Sampling, TokenLogprobs
from ingle.step import Admission, Masks

Row = npt.NDArray[np.float32]

_MANTISSA = np.int32(0x7FFFFF)
"""All other bits are minus infinity's."""
_FEW = 8
"""Below this part of the vocabulary, tokens that may come are taken out of a row and drawn among themselves."""
_MAX_LOGIT = np.finfo(np.float32).max
_WORD = (1 << 64) - 1
_RUN = 256
"""Tokens that are added up together before single ones are looked at."""


class NativeSampler:
    """Sampling parameters of the slots, and the draw."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._admissions: dict[int, Admission] = {}
        self._seen: dict[int, _Seen] = {}
        """Of slots whose request has penalties."""
        self._allowed: dict[int, npt.NDArray[np.uint8]] = {}
        """Bits of the tokens that may be drawn, by slot."""

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Takes in the parameters of slots that start or restart."""
        for admission in admissions:
            self._admissions[admission.slot] = admission
            self._seen.pop(admission.slot, None)
            if admission.sampling.penalized:
                self._seen[admission.slot] = _Seen(admission, self.vocab_size)

    def set_masks(self, masks: Masks) -> None:
        """What the next draw may give, by slot; all tokens for others."""
        rows = np.frombuffer(masks.words, np.uint8).reshape(len(masks.slots), -1) if masks.slots else ()
        self._allowed = dict(zip(masks.slots, rows, strict=True))

    def sample(self, logits: Row, slots: Sequence[int], positions: Sequence[int]) -> tuple[list[int], list[bool]]:
        """The tokens of logits [R, vocab] whose rows have `slots` and `positions`, and which rows were finite."""
        token_ids, finite = greedy(logits)
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            if finite[row]:
                token_ids[row] = self._choose(logits[row], token_ids[row], slot, position)
            if slot in self._seen:
                self._seen[slot].output[token_ids[row]] += 1
        return token_ids, finite

    def _choose(self, x: Row, most_likely: int, slot: int, position: int) -> int:
        admission = self._admissions[slot]
        adjusted, allowed = self._adjusted(x, admission, position), self._allowed.get(slot)
        if allowed is not None:
            may_come = np.unpackbits(allowed, count=len(x), bitorder="little")
            if np.count_nonzero(may_come.view(np.bool_)) * _FEW < len(x):
                token_ids = np.flatnonzero(may_come.view(np.bool_))
                few = adjusted[token_ids]
                drawn = _draw(few, admission, position) if _draws(admission.sampling) else int(few.argmax())
                return int(token_ids[drawn])
            adjusted = _forbid(adjusted, may_come)
        if _draws(admission.sampling):
            return _draw(adjusted, admission, position)
        return most_likely if adjusted is x else int(adjusted.argmax())

    def _adjusted(self, x: Row, admission: Admission, position: int) -> Row:
        """The row after penalties, bias and end tokens that come too early: another one if they change it."""
        params = admission.sampling
        early = position - admission.num_prompt_tokens < params.min_tokens and bool(admission.end_token_ids)
        if not (params.penalized or params.logit_bias or early):
            return x
        x = x.copy()
        if params.penalized:
            self._seen[admission.slot].penalize(x, params)
        for token_id, bias in (params.logit_bias or {}).items():
            x[token_id] += np.float32(bias)
        if early:
            x[list(admission.end_token_ids)] = -np.inf
        return x


def _draws(params: Sampling) -> bool:
    return not params.greedy and bool(np.float32(params.temperature) > 0)


def _forbid(x: Row, may_come: npt.NDArray[np.uint8]) -> Row:
    """A row with minus infinity for the tokens that have a 0.

    In whole numbers, since NumPy goes through a mask with a jump for each token: ten times as long, for half a row.
    """
    forbidden = may_come.astype(np.int32)
    forbidden -= 1  # all bits, or none
    bits = x.view(np.int32) | forbidden
    forbidden &= _MANTISSA
    bits ^= forbidden
    return bits.view(np.float32)


class _Seen:
    """Which tokens a sequence holds."""

    def __init__(self, admission: Admission, vocab_size: int) -> None:
        self.prompt = np.zeros(vocab_size, np.bool_)
        self.output = np.zeros(vocab_size, np.int32)
        """Occurrences."""
        self.prompt[admission.token_ids[: admission.num_prompt_tokens]] = True
        np.add.at(self.output, admission.token_ids[admission.num_prompt_tokens :], 1)

    def penalize(self, x: Row, params: Sampling) -> None:
        tokens = np.flatnonzero(self.prompt | (self.output > 0))
        repetition, count = np.float32(params.repetition_penalty), self.output[tokens].astype(np.float32)
        values = x[tokens]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # of a penalty next to 0
            values = np.where(values > 0, np.minimum(values / repetition, _MAX_LOGIT), values * repetition)
        values -= np.float32(params.presence_penalty) * (count > 0)
        x[tokens] = values - np.float32(params.frequency_penalty) * count


def greedy(logits: Row) -> tuple[list[int], list[bool]]:
    """The most likely token of each row of logits [R, vocab], ties to the lowest id, and whether the row is finite."""
    num_rows, vocab_size = logits.shape
    token_ids, finite = (c_int64 * num_rows)(), (c_uint8 * num_rows)()
    library.get().ingle_sample_greedy(logits.ctypes.data, num_rows, vocab_size, token_ids, finite)
    return list(token_ids), [value != 0 for value in finite]


def _draw(x: Row, admission: Admission, position: int) -> int:
    """By temperature and filters, at a number that only seed and position decide: `reference_sampling.sample`."""
    params = admission.sampling
    with np.errstate(over="ignore"):  # of a tiny temperature: minus infinity, whose exponential is right
        probs = np.exp((x - x.max()) / np.float32(params.temperature))
    probs /= probs.sum()
    if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
        probs[probs < _least_probability(probs, params)] = 0.0
    return _invert(probs, _uniform(admission.seed, position))


def _invert(probs: Row, share: float) -> int:
    """The first token whose cumulative probability exceeds a share of the whole; its own is above 0.

    Whole runs of tokens are added up first: NumPy's cumulative sum of a vocabulary takes longer than all else here.
    """
    runs = np.add.reduceat(probs, np.arange(0, len(probs), _RUN), dtype=np.float64).cumsum()
    target = share * runs[-1]
    run = int(np.searchsorted(runs, target, side="right"))
    if run == len(runs):  # a share next to 1 was rounded to it
        run = int(np.searchsorted(runs, runs[-1], side="left"))
    part = probs[run * _RUN : (run + 1) * _RUN]
    within = part.cumsum(dtype=np.float64) + (runs[run - 1] if run else 0.0)
    index = int(np.searchsorted(within, target, side="right"))
    return run * _RUN + (index if index < len(part) else int(part.nonzero()[0][-1]))  # sums round in another order


def _least_probability(probs: Row, params: Sampling) -> float:
    """The least probability that passes top-k, then top-p of what that leaves, and min-p."""
    ordered = np.sort(probs)[::-1]
    top_k = params.top_k if 0 < params.top_k < len(probs) else len(probs)
    kth = ordered[top_k - 1]
    kept = ordered[: np.searchsorted(-ordered, -kth, side="right")]
    num_kept = _nucleus(kept, params.top_p * kept.sum())
    return float(max(kth, kept[num_kept - 1], np.float32(params.min_p) * ordered[0]))


def _nucleus(ordered: Row, mass: float) -> int:
    """How many of the likeliest have less than so much before them; at least one. Most often they are few."""
    size = _RUN
    while True:
        head = ordered[:size]
        before = head.cumsum(dtype=np.float64) - head
        num_kept = int((before < mass).sum())
        if num_kept < size or size >= len(ordered):
            return max(num_kept, 1)
        size *= 8


def _uniform(seed: int, position: int) -> float:
    """In [0, 1): `reference_sampling.uniform`."""
    x = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return ((x ^ x >> 31) >> 11) * 2.0**-53


def logprob_rows(logits: Row, token_ids: Sequence[int], num_alternatives: int) -> LogprobRows:
    """Log probabilities of `token_ids` [R] and of the most likely tokens under logits [R, vocab]."""
    count = min(num_alternatives, logits.shape[1])
    rows = LogprobRows(
        np.empty((len(logits), 1 + count), np.int32),
        np.empty((len(logits), 1 + count), np.float32),
        np.empty(len(logits), np.int32),
    )
    for row, token_id in enumerate(token_ids):
        with np.errstate(invalid="ignore"):  # of a row that is not finite, whose request fails
            shifted = logits[row] - logits[row].max()
            logprobs = shifted - np.log(np.exp(shifted).sum())
        chosen, top = logprobs[token_id], np.zeros(0, np.int64)
        if count:
            likeliest = np.argpartition(-logprobs, count - 1)[:count]
            top = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        rank = int((logprobs > chosen).sum()) + 1
        entry = TokenLogprobs.ranked(token_id, float(chosen), rank, top.tolist(), logprobs[top].tolist())
        rows.token_ids[row], rows.values[row], rows.ranks[row] = entry.token_ids, entry.logprobs, rank
    return rows
