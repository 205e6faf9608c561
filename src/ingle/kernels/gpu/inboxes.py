"""What kernels leave in the inboxes of a group's GPUs: see `ingle.kernels.gpu.sums`."""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING_16 = tl.constexpr(-0x8000)
NOTHING_32 = tl.constexpr(-0x7FFF8000)
"""The same twice: as a float32 it is -4.6e-41, for which 0 is sent."""


@triton.jit
def half_of(state_ptr):
    """Which half of the inboxes this sum takes."""
    return tl.load(state_ptr).to(tl.int32)


@triton.jit
def sendable(x):
    """x as integers, without that which says that nothing is there."""
    WIDE: tl.constexpr = x.dtype.primitive_bitwidth == 32
    bits = x.to(tl.int32 if WIDE else tl.int16, bitcast=True)
    return tl.where(bits == (NOTHING_32 if WIDE else NOTHING_16), 0, bits).to(bits.dtype)


@triton.jit
def inbox_of(inboxes, PLACE: tl.constexpr, WIDE: tl.constexpr):
    start = inboxes[PLACE].to(tl.int64).to(tl.pointer_type(tl.int32 if WIDE else tl.int16))
    return tl.multiple_of(start, 16)  # which is not seen through an integer
