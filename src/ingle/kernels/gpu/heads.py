"""What the kernels of attention share: blocks of heads and of their dimensions, and scores in powers of 2."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ingle.kernels.options import AttentionOptions

MIN_DOT = 16
"""Rows and columns that the tensor cores need at least."""
_LOG2_E = tl.constexpr(1.4426950408889634)


class DecodeTiling(NamedTuple):
    """How decoding sequences go through their keys."""

    keys: int
    """That one iteration reads."""
    warps: int
    stages: int
    """Iterations whose keys are on their way, and one."""
    programs: int
    """That an SM runs at once: one more would start when the others have ended."""
    registers: int | None
    """That a thread may have at most."""


def head_rows(num_heads: int, num_kv_heads: int) -> int:
    """Rows of a tile of the query heads that share a key head."""
    return max(int(triton.next_power_of_2(num_heads // num_kv_heads)), MIN_DOT)


def dim_block(head_dim: int) -> int:
    return max(int(triton.next_power_of_2(head_dim)), MIN_DOT)


def precision(q: torch.Tensor) -> str:
    """float32 is multiplied as such, not rounded to tf32: it is what parity is measured in."""
    return "ieee" if q.dtype == torch.float32 else "tf32"


def scale_and_cap(options: AttentionOptions) -> tuple[float, float]:
    """Factor on the products, and the cap, such that scores are exponents of 2; see `capped`."""
    if options.softcap is None:
        return options.scale * _LOG2_E.value, 0.0
    return 2 * options.scale / options.softcap * _LOG2_E.value, options.softcap * _LOG2_E.value


@triton.jit
def exp2(x, COMPILED: tl.constexpr):
    """As `tl.exp2`, but for results below 2 ** -126, which are 0: to have those takes as long as all else of it."""
    if COMPILED:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def capped(scores, cap, COMPILED: tl.constexpr):
    """cap * tanh(x), given log2(e) * 2 x: in powers of 2, as everything here."""
    return cap - 2 * cap / (exp2(scores, COMPILED) + 1)


@triton.jit
def load_sinks(ptr, mask):
    """Attention sinks, as exponents of 2."""
    return tl.load(ptr, mask=mask, other=0.0) * _LOG2_E


@triton.jit
def with_sinks(total, best, sinks, COMPILED: tl.constexpr):
    """Sums of exponentials, of which the largest has exponent `best`, with those of sinks.

    Where a sink is so much larger that it is infinite, nothing remains of the others, as is right.
    """
    return total + exp2(sinks - best, COMPILED)
