"""Which tokens may come next, for requests whose answers have to follow a grammar, or lists of tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingle.request import EngineRequest


class TokenMask(Protocol):
    """Follows one answer, token by token. The engine asks it between the forward and the draw of a step."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Of each token of the vocabulary whether it may come next, bool [vocab_size]; None where all may.

        At least one may, the end of the answer if nothing else.
        """
        ...

    def take(self, token_id: int) -> None:
        """The next token of the answer."""
        ...


class TokenLists:
    """What a request allows by lists: some tokens alone, and sequences of tokens of which none is completed.

    Where a sequence could only be completed, it is: there is always a token left, which `check_request` has seen to.
    """

    def __init__(self, request: EngineRequest, vocab_size: int) -> None:
        sampling = request.sampling
        self._base = np.ones(vocab_size, np.bool_)
        if sampling.allowed_token_ids is not None:
            self._base[:] = False
            self._base[list(sampling.allowed_token_ids)] = True
        self._after: dict[tuple[int, ...], list[int]] = {}
        """What completes a sequence, by what stands before."""
        for *before, last in sampling.bad_token_ids:
            self._after.setdefault(tuple(before), []).append(last)
        self._base[self._after.pop((), [])] = False
        self._lengths = sorted({len(before) for before in self._after})
        self._ends = [*(() if sampling.ignore_eos else request.eos_token_ids), *sampling.stop_token_ids]
        self._num_before_end = sampling.min_tokens
        self._last: deque[int] = deque(maxlen=max(self._lengths, default=0))

    @classmethod
    def of(cls, request: EngineRequest, vocab_size: int) -> TokenLists | None:
        """None for a request without such lists."""
        wanted = request.sampling.allowed_token_ids is not None or request.sampling.bad_token_ids
        return cls(request, vocab_size) if wanted else None

    def allowed(self) -> npt.NDArray[np.bool_]:
        last = tuple(self._last)
        ends = (last[len(last) - length :] for length in self._lengths if length <= len(last))
        banned = [token_id for before in ends for token_id in self._after.get(before, ())]
        if not banned:
            return self._base
        left = self._base.copy()
        left[banned] = False
        free = left.copy()
        if self._num_before_end > 0:
            free[self._ends] = False
        return left if free.any() else self._base

    def take(self, token_id: int) -> None:
        self._last.append(token_id)
        self._num_before_end -= 1


@dataclass(frozen=True, slots=True)
class Both:
    """What two masks allow; what the first does where they share nothing."""

    first: TokenMask
    second: TokenMask

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        first, second = self.first.allowed(), self.second.allowed()
        if first is None or second is None:
            return second if first is None else first
        shared = first & second
        return shared if shared.any() else first

    def take(self, token_id: int) -> None:
        self.first.take(token_id)
        self.second.take(token_id)


@dataclass(frozen=True, slots=True)
class FailedMask:
    """In the place of one that raised an exception when it was told a token: raises it when it is asked."""

    error: Exception

    def allowed(self) -> None:
        raise self.error

    def take(self, token_id: int) -> None:
        """It follows nothing any more."""


def pack_mask(allowed: npt.NDArray[np.bool_], vocab_size: int) -> bytes:
    """As `ingle.step.Masks` has it. Raises `ValueError` for one of another length, and for one that allows nothing."""
    if allowed.shape != (vocab_size,) or not allowed.any():
        raise ValueError(f"a mask of shape {allowed.shape} allows {allowed.sum()} of {vocab_size} tokens")
    return np.packbits(np.append(allowed, np.zeros(-len(allowed) % 32, np.bool_)), bitorder="little").tobytes()
