"""The smallest kernel: whether Triton compiles and runs one."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


def _double(numbers: Any, out: Any, BLOCK: tl.constexpr) -> None:
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, 2 * tl.load(numbers + offsets))


double = triton.jit(_double)
