"""Words of codes taken apart, and codes put into order: some gigabytes a second, some outputs at a time.

What is worked on at a time fits the cache: changing the places of rows and columns would wait for memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ingle.weights.quantized.groups import Bytes, Kind

Words = npt.NDArray[np.int32]
Order = npt.NDArray[np.int32]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble of a word each of eight outputs has."""
_AT_ONCE = 1 << 20
"""Codes."""
_EVEN = np.uint32(0x0F0F0F0F)
"""The nibbles 0, 2, 4 and 6 of a word."""


def along(words: Words, bits: int) -> Bytes:
    """Codes of 2, 3, 4 or 8 bits out of words [n, m], packed along the last dimension, the lowest bits first.

    [n, m * 32 / bits], a byte each.
    """
    as_bytes = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return as_bytes
    if bits in (2, 4):
        mask = np.uint8((1 << bits) - 1)
        fields = [as_bytes >> np.uint8(shift) & mask for shift in range(0, 8, bits)]
        return np.stack(fields, -1).reshape(len(words), -1)
    return _threes(np.ascontiguousarray(words).view(np.uint32))


def _threes(words: npt.NDArray[np.uint32]) -> Bytes:
    """32 codes of 3 bits out of three words each."""
    first, second, third = (words[:, each::3] for each in range(3))
    out = np.empty((*first.shape, 32), np.uint8)
    for index in range(32):
        word, shift = divmod(3 * index, 32)
        here = (first, second, third)[word] >> np.uint32(shift)
        if shift > 29:
            here = here | (first, second, third)[word + 1] << np.uint32(32 - shift)
        out[:, :, index] = here & np.uint32(7)
    return out.reshape(len(words), -1)


def in_halves(codes: Bytes) -> Bytes:
    """Two codes of at most 4 bits to a byte: [n, m] to [n, m / 2]."""
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def by_outputs(rows: int, columns: int, kind: Kind, codes_of: Callable[[int, int], Bytes], step: int = 8) -> Bytes:
    """The codes of a matrix as `Groups` has them, of some outputs [start, stop) at a time, a multiple of `step`."""
    out = np.empty((rows, columns // 2 if kind == "int4" else columns), np.uint8)
    chunk = max(_AT_ONCE // columns // step * step, step)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        out[start:stop] = codes_of(start, stop)
    return out


def of_inputs(words: Words, bits: int, order: Order | None) -> Bytes:
    """The codes of words [inputs * bits / 32, n], packed along the inputs: of n rows, inputs in an order.

    Two to a byte where they have at most 4 bits.
    """
    if order is None:
        by_row = np.ascontiguousarray(words.T)
        return by_row.view(np.uint8) if bits in (4, 8) else in_halves(along(by_row, bits))
    return ordered(_by_input(words, bits), order, bits)


def ordered(by_input: Bytes, order: Order, bits: int) -> Bytes:
    """Codes [inputs, n], a byte each, as rows of inputs in an order, two to a byte where they have at most 4 bits."""
    if bits > 4:
        return np.take(by_input, order, axis=0).T
    both = np.take(by_input, order[1::2], axis=0)
    both <<= np.uint8(4)
    both |= np.take(by_input, order[::2], axis=0)
    return both.T


def _by_input(words: Words, bits: int) -> Bytes:
    """[inputs, n], a byte each."""
    if bits not in (4, 8):
        return np.ascontiguousarray(along(np.ascontiguousarray(words.T), bits).T)
    per_word = 32 // bits
    out = np.empty((len(words), per_word, words.shape[1]), np.uint8)
    unsigned = np.ascontiguousarray(words).view(np.uint32)
    parts = (unsigned,) if bits == 8 else (unsigned & _EVEN, unsigned >> np.uint32(4) & _EVEN)
    for at, part in enumerate(parts):
        fields = part.view(np.uint8).reshape(*words.shape, 4)
        for byte in range(4):
            out[:, byte * len(parts) + at] = fields[:, :, byte]
    return out.reshape(-1, words.shape[1])


def of_awq(words: Words) -> Bytes:
    """The codes of words [inputs, n / 8], packed along the outputs: of n rows, two to a byte."""
    by_word = np.ascontiguousarray(words.T).view(np.uint32)
    first, second = by_word[:, ::2], by_word[:, 1::2]
    four = np.uint32(4)
    even = first & _EVEN | (second & _EVEN) << four
    odd = first >> four & _EVEN | second & ~_EVEN
    parts = [each.view(np.uint8).reshape(*each.shape, 4) for each in (even, odd)]
    out = np.empty((len(by_word), 8, first.shape[1]), np.uint8)
    for output, nibble in enumerate(AWQ_ORDER):
        out[:, output] = parts[nibble % 2][:, :, nibble // 2]
    return out.reshape(-1, first.shape[1])
