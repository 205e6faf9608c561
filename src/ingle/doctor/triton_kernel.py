"""The smallest kernel: whether Triton compiles and runs one."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def double(numbers_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, 2 * tl.load(numbers_ptr + offsets))
