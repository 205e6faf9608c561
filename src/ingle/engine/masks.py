"""Which tokens may come next, for requests whose answers have to follow something."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ingle.request import EngineRequest
from ingle.step import Masks

Words = npt.NDArray[np.int32]
"""Bits of tokens, as `ingle.step.Masks` has them."""


class TokenMask(Protocol):
    """Follows one answer, token by token. The engine asks it between the forward and the draw of a step."""

    @property
    def ended(self) -> bool:
        """Whether nothing but the end can follow."""
        ...

    def allowed(self) -> Words | None:
        """Which tokens may come next; None where all may. At least one may, the end of the answer if nothing else."""
        ...

    def forced(self) -> Sequence[int]:
        """Tokens that have to come next, one after the other, as far as that is known; they are not taken yet."""
        ...

    def take(self, token_ids: Sequence[int]) -> None:
        """The next tokens of the answer."""
        ...


class TokenLists:
    """What a request allows by lists: some tokens alone, and sequences of tokens of which none is completed.

    Where a sequence could only be completed, it is: there is always a token left, which `check_request` has seen to.
    """

    def __init__(self, request: EngineRequest, vocab_size: int) -> None:
        sampling = request.sampling
        allowed = np.ones(vocab_size, np.bool_)
        if sampling.allowed_token_ids is not None:
            allowed[:] = False
            allowed[list(sampling.allowed_token_ids)] = True
        self._after: dict[tuple[int, ...], list[int]] = {}
        """What completes a sequence, by what stands before."""
        for *before, last in sampling.bad_token_ids:
            self._after.setdefault(tuple(before), []).append(last)
        allowed[self._after.pop((), [])] = False
        self._base = pack_mask(allowed)
        self._lengths = sorted({len(before) for before in self._after})
        self._ends = [*(() if sampling.ignore_eos else request.eos_token_ids), *sampling.stop_token_ids]
        self._num_before_end = sampling.min_tokens
        self._last: deque[int] = deque(maxlen=max(self._lengths, default=0))

    @classmethod
    def of(cls, request: EngineRequest, vocab_size: int) -> TokenLists | None:
        """None for a request without such lists."""
        wanted = request.sampling.allowed_token_ids is not None or request.sampling.bad_token_ids
        return cls(request, vocab_size) if wanted else None

    def allowed(self) -> Words:
        """Which tokens may come next."""
        last = tuple(self._last)
        ends = (last[len(last) - length :] for length in self._lengths if length <= len(last))
        banned = [token_id for before in ends for token_id in self._after.get(before, ())]
        if not banned:
            return self._base
        left = _without(self._base, banned)
        free = _without(left, self._ends) if self._num_before_end > 0 else left
        return left if free.any() else self._base

    def take(self, token_ids: Sequence[int]) -> None:
        """The next tokens of the answer."""
        self._last.extend(token_ids)
        self._num_before_end -= len(token_ids)


def _without(words: Words, token_ids: Sequence[int]) -> Words:
    left, ids = words.copy(), np.array(token_ids, np.uint32)
    np.bitwise_and.at(left.view(np.uint32), ids >> 5, ~(np.uint32(1) << (ids & 31)))
    return left


FillRows = Callable[[Sequence[tuple[TokenMask, int]], Words], Sequence[tuple[TokenMask, int]]]
"""Fills the rows of those masks that it knows how to fill at once, and returns the others."""


@dataclass(frozen=True)
class Filled:
    """The masks of one step."""

    masks: Masks
    failed: dict[str, Exception]
    """By request, what went wrong where its row could not be filled: there any token is drawn."""


class MaskTable:
    """The masks of unfinished requests. A mask that fails is its own request's affair, and costs no step."""

    def __init__(self, vocab_size: int, fill_rows: FillRows = lambda rows, words: rows) -> None:
        self._masks: dict[str, TokenMask] = {}
        self._lists: dict[str, TokenLists] = {}
        self._num_words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._fill_rows = fill_rows
        self._thread = ThreadPoolExecutor(1, "masks")  # starts with the first step that has masks

    def add(self, request_id: str, mask: TokenMask | None, lists: TokenLists | None = None) -> None:
        """Where mask and lists share no token, the mask alone counts."""
        if mask is not None:
            self._masks[request_id] = mask
        if lists is not None:
            self._lists[request_id] = lists

    def drop(self, request_id: str) -> None:
        self._masks.pop(request_id, None)
        self._lists.pop(request_id, None)

    def __bool__(self) -> bool:
        return bool(self._masks or self._lists)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._masks or request_id in self._lists

    def take_all(self, drawn: Sequence[tuple[str, int]]) -> dict[str, bool | Exception]:
        """The next token of each of these answers. Which of them have ended with it, and what their masks raise."""
        ended: dict[str, bool | Exception] = {}
        for request_id, token_id in drawn:
            try:
                ended[request_id] = self.take(request_id, (token_id,))
            except Exception as error:  # whatever it is, it is this request's
                ended[request_id] = error
        return ended

    def take(self, request_id: str, token_ids: Sequence[int]) -> bool:
        """The next tokens of an answer. Whether it has ended with them; raises what its mask does."""
        if (lists := self._lists.get(request_id)) is not None:
            lists.take(token_ids)
        mask = self._masks.get(request_id)
        if mask is None:
            return False
        mask.take(token_ids)
        return mask.ended

    def forced(self, request_id: str) -> Sequence[int]:
        """Tokens that have to follow; none where lists of tokens have a say."""
        mask = self._masks.get(request_id)
        return () if mask is None or request_id in self._lists else mask.forced()

    def fill(self, drawing: Sequence[tuple[int, str]]) -> Future[Filled]:
        """The masks for slots and the requests in them, made in a thread while the device computes the step.

        Returns when that thread is at work: else it would wait for the interpreter's lock until this one waits for it.
        """
        bound = [(slot, id, self._masks.get(id)) for slot, id in drawing if id in self._masks or id in self._lists]
        started = threading.Event()
        future = self._thread.submit(self._fill, bound, started)
        started.wait()
        return future

    def _fill(self, bound: Sequence[tuple[int, str, TokenMask | None]], started: threading.Event) -> Filled:
        started.set()
        words = np.empty((len(bound), self._num_words), np.int32)
        ids = [id for _, id, _ in bound]
        failed: dict[str, Exception] = {}
        words[[row for row, (_, _, mask) in enumerate(bound) if mask is None]] = -1
        masked = [(mask, row) for row, (_, _, mask) in enumerate(bound) if mask is not None]
        for mask, row in self._fill_rows(masked, words):
            try:
                allowed = mask.allowed()
                words[row] = -1 if allowed is None else self._checked(allowed)
            except Exception as error:  # whatever it is, it is this request's
                words[row] = -1
                failed[ids[row]] = error
        for row, id in enumerate(ids):
            lists = self._lists.get(id)
            if lists is not None and (shared := words[row] & lists.allowed()).any():
                words[row] = shared
        return Filled(Masks([slot for slot, _, _ in bound], words.reshape(-1).view(np.uint8).data), failed)

    def _checked(self, allowed: Words) -> Words:
        if allowed.shape != (self._num_words,) or not allowed.any():
            raise ValueError(f"a mask of {allowed.size} words allows {'some' if allowed.any() else 'no'} token")
        return allowed


def pack_mask(allowed: npt.NDArray[np.bool_]) -> Words:
    """Bits of a bool for each token."""
    padded = np.append(allowed, np.zeros(-len(allowed) % 32, np.bool_))
    return np.packbits(padded, bitorder="little").view("<i4")
