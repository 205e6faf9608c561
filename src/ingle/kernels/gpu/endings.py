"""How products of a few rows with codes end in a decoder layer: by addition, a norm's begin, rotation, activation."""

from __future__ import annotations

import triton
import triton.language as tl

from ingle.kernels.gpu.elementwise import activate
from ingle.kernels.gpu.rotation import store_rotated

ADD, ROTATE, SILU, GELU, PLAIN = 0, 1, 2, 3, 4
"""What becomes of a product. All but ADD and PLAIN take two blocks of rows of weights: from both halves of a head, or
from gate and up."""


@triton.jit
def row_scales(squares_ptr, row, piece, num_rows, num_squares, eps, IN: tl.constexpr):
    """One over the root mean square of each of `row` [ROWS, 1] that comes in, whose squares' sums come in pieces, here
    [1, PIECES]."""
    mask = (row < num_rows) & (piece < num_squares)
    total = tl.sum(tl.load(squares_ptr + row * num_squares + piece, mask=mask, other=0.0), 1)
    return tl.rsqrt(total / IN + eps)


@triton.jit
def finish(
    first, other, first_out, other_out, tile, num_tiles, block, rows, num_rows, bias_ptr, residual_ptr, norm_ptr,
    out_ptr, values_ptr, squares_ptr, cos_sin_ptr, kv_ptr, kv_places_ptr,
    v_offset, page_stride, token_stride, head_stride,
    OUT: tl.constexpr, OUTS: tl.constexpr, EPILOGUE: tl.constexpr, BIAS: tl.constexpr, SQUARED: tl.constexpr,
    HALF: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """What becomes of the products of the weights `block` [OUTS, 1] from `first_out` and `other_out` on with `rows`
    [1, ROWS], of a tile's blocks.

    SQUARED: of a sum also the residual times the norm's weight is stored, and the sum of squares.
    """
    ROTATED: tl.constexpr = EPILOGUE == 1
    SINGLE: tl.constexpr = EPILOGUE == 0 or EPILOGUE == 4
    LIMIT: tl.constexpr = OUT if SINGLE or ROTATED else OUT // 2
    mask = (first_out + block < LIMIT) & (rows < num_rows)
    if BIAS:
        first += tl.load(bias_ptr + first_out + block, mask=first_out + block < LIMIT, other=0.0).to(tl.float32)
        if not SINGLE:
            other += tl.load(bias_ptr + other_out + block, mask=other_out + block < OUT, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    place = rows * OUT + first_out + block
    if ROTATED:
        store_rotated(
            first, other, tile * OUTS // HALF, rows, tile * OUTS % HALF + block, rows < num_rows,
            out_ptr, cos_sin_ptr, norm_ptr, norm_ptr, kv_ptr, kv_places_ptr,
            0.0, v_offset, page_stride, token_stride, head_stride, 0,
            HALF, False, NUM_HEADS, NUM_KV_HEADS, PAGE_SIZE, 0,
        )  # fmt: skip
    elif EPILOGUE == 4:
        tl.store(out_ptr + place, first.to(dtype), mask=mask)
    elif EPILOGUE == 0:
        # Rounded as it is stored: the norm is that of what the next layers read.
        total = (first + tl.load(residual_ptr + place, mask=mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(out_ptr + place, total, mask=mask)
        if SQUARED:
            wide = tl.where(mask, total.to(tl.float32), 0.0)
            weight = tl.load(norm_ptr + first_out + block, mask=first_out + block < OUT, other=0.0).to(tl.float32)
            tl.store(values_ptr + place, (wide * weight).to(dtype), mask=mask)
            squares = tl.sum(wide * wide, 0, keep_dims=True)
            tl.store(squares_ptr + rows * num_tiles + tile, squares, mask=(rows < num_rows) & (tile < num_tiles))
    else:
        out = activate(first, EPILOGUE == 3) * other
        tl.store(out_ptr + rows * LIMIT + first_out + block, out.to(dtype), mask=mask)
