"""Which tokens may come next, for requests whose answers have to follow a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


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
