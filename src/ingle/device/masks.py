"""Masks of allowed tokens, a bit for each: what a sampler's `set_masks` takes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]


def mask_words(token_ids: Sequence[int], vocab_size: int, *, allowed: bool = True) -> Words:
    """A mask that allows these tokens alone, or (not `allowed`) all but these: int32 [ceil(vocab / 32)].

    Bit i % 32 of word i // 32 is 1 where token i is allowed. A mask of ones is none.
    """
    ids = np.array(token_ids, np.int64)
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    np.bitwise_or.at(words, ids // 32, np.left_shift(np.uint32(1), (ids % 32).astype(np.uint32)))
    return (words if allowed else ~words).view(np.int32)


def allowed_tokens(words: Words, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Which tokens a mask allows: bool [vocab]."""
    return np.unpackbits(words.astype("<i4").view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
