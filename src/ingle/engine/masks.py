"""Which tokens may come next, for requests whose answers have to follow something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

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


FillRows = Callable[[Sequence[tuple[TokenMask, int]], Words], Sequence[tuple[TokenMask, int]]]
"""Fills the rows of those masks that it knows how to fill at once, and returns the others."""


@dataclass(frozen=True)
class Filled:
    """The masks of one step."""

    masks: Masks
    failed: dict[str, str]
    """By request, what went wrong where its row could not be filled: there any token is drawn."""


class MaskTable:
    """The masks of unfinished requests. A mask that fails is its own request's affair, and costs no step."""

    def __init__(self, vocab_size: int, fill_rows: FillRows = lambda rows, words: rows) -> None:
        self._masks: dict[str, TokenMask] = {}
        self._num_words = -(-vocab_size // 32)
        self._vocab_size = vocab_size
        self._fill_rows = fill_rows
        self._thread = ThreadPoolExecutor(1, "masks")  # starts with the first step that has masks

    def add(self, request_id: str, mask: TokenMask) -> None:
        self._masks[request_id] = mask

    def drop(self, request_id: str) -> None:
        self._masks.pop(request_id, None)

    def __bool__(self) -> bool:
        return bool(self._masks)

    def get(self, request_id: str) -> TokenMask | None:
        return self._masks.get(request_id)

    def fill(self, drawing: Sequence[tuple[int, str]]) -> Future[Filled]:
        """The masks for slots and the requests in them, made in a thread while the device computes the step."""
        bound = [(slot, id, mask) for slot, id in drawing if (mask := self._masks.get(id)) is not None]
        return self._thread.submit(self._fill, bound)

    def _fill(self, bound: Sequence[tuple[int, str, TokenMask]]) -> Filled:
        buffer = bytearray(len(bound) * self._num_words * 4)
        words = np.frombuffer(buffer, np.int32).reshape(len(bound), self._num_words)
        ids = [id for _, id, _ in bound]
        failed: dict[str, str] = {}
        for mask, row in self._fill_rows([(mask, row) for row, (_, _, mask) in enumerate(bound)], words):
            try:
                allowed = mask.allowed()
                words[row] = -1 if allowed is None else self._checked(allowed)
            except Exception as error:  # whatever it is, it is this request's
                words[row] = -1
                failed[ids[row]] = str(error)
        return Filled(Masks([slot for slot, _, _ in bound], buffer), failed)

    def _checked(self, allowed: Words) -> Words:
        if allowed.shape != (self._num_words,) or not allowed.any():
            raise ValueError(f"a mask of {allowed.size} words allows {'some' if allowed.any() else 'no'} token")
        return allowed


def pack_mask(allowed: npt.NDArray[np.bool_]) -> Words:
    """Bits of a bool for each token."""
    padded = np.append(allowed, np.zeros(-len(allowed) % 32, np.bool_))
    return np.packbits(padded, bitorder="little").view("<i4")
