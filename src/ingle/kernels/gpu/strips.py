"""Finding the large logits of a row without reading all of it again.

A first pass over the logits leaves the largest of each strip of some tens of tokens. The k-th largest of those is a
lower bound of the row's k-th largest logit, and only the few strips that reach it are read again. What is drawn or
reported is as exact as if the whole row had been sorted.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Tokens that a program of a first pass looks at."""
_MAX_STRIPS = 4096
_STRIPS_AT_ONCE = tl.constexpr(32)


def strip_size(vocab_size: int) -> int:
    """Tokens in a strip, so that a program can hold the largest of every strip in its registers."""
    return min(BLOCK, max(16, 1 << (-(-vocab_size // _MAX_STRIPS) - 1).bit_length()))


@triton.jit
def ordered(x):
    """Maps float32 to uint32 in the order of the floats, both zeros to the same."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def kth_largest(keys, k, slack, low, high):
    """A key that at least `k`, and if there is one no more than k + `slack`, of the keys reach.

    Halves [low, high): whatever reaches `low` is enough, or all there is; nothing reaches `high`.
    """
    num_low = tl.full([], 1 << 30, tl.int32)
    while (high - low > 1) & (num_low > k + slack):
        middle = low + (high - low) // 2
        count = tl.sum((keys >= middle).to(tl.int32), 0)
        enough = count >= k
        num_low = tl.where(enough, count, num_low)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def strips_above(strips, passes, list_ptr, STRIPS: tl.constexpr):
    """Writes the numbers of the strips that pass, in order, and returns how many they are."""
    tl.debug_barrier()  # a list that is still being read
    order = tl.cumsum(passes.to(tl.int32), 0)
    tl.store(list_ptr + order - 1, tl.arange(0, STRIPS), mask=passes)
    tl.debug_barrier()
    return tl.sum(passes.to(tl.int32), 0)


@triton.jit
def load_strips(row_ptr, list_ptr, start, num_listed, VOCAB: tl.constexpr, STRIP: tl.constexpr):
    """The token ids and logits of listed strips [start, start + _STRIPS_AT_ONCE), flat, in order; -inf for none."""
    places = start + tl.arange(0, _STRIPS_AT_ONCE)
    numbers = tl.load(list_ptr + places, mask=places < num_listed, other=0)
    ids = tl.reshape(numbers[:, None] * STRIP + tl.arange(0, STRIP)[None, :], [_STRIPS_AT_ONCE * STRIP])
    real = tl.reshape((places < num_listed)[:, None] & (tl.arange(0, STRIP)[None, :] >= 0), [_STRIPS_AT_ONCE * STRIP])
    logits = tl.load(row_ptr + ids, mask=real & (ids < VOCAB), other=float("-inf")).to(tl.float32)
    return ids, logits
