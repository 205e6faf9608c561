"""What becomes of a decoder layer's projections at the end of the product that makes them."""

from __future__ import annotations

import triton
import triton.language as tl

from ingle.kernels.gpu.kv_codes import encode


@triton.jit
def load_rotation(rows, block, mask, cos_sin_ptr, kv_places_ptr, HALF: tl.constexpr):
    """Cosines and sines of `store_rotated`'s blocks, and where keys and values go."""
    cos, sin = _load_angles(rows, block, mask, cos_sin_ptr, HALF)
    return cos, sin, tl.load(kv_places_ptr + rows, mask=mask, other=0)


@triton.jit
def _load_angles(rows, block, mask, cos_sin_ptr, HALF: tl.constexpr):
    angle = cos_sin_ptr + rows * 2 * HALF + block
    return tl.load(angle, mask=mask, other=0.0), tl.load(angle + HALF, mask=mask, other=0.0)


@triton.jit
def store_rotated(
    first, other, head, rows, block, mask, q_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, kv_ptr, kv_places_ptr,
    eps, v_offset, page_stride, token_stride, head_stride, scales,
    HALF: tl.constexpr, QK_NORM: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, KIND: tl.constexpr, rotation=None,
):  # fmt: skip
    """What becomes of two blocks [outs, rows] of a head's halves: queries go to q, keys and values to the cache.

    `block` are their places in the half. With QK_NORM, or a cache of codes, they are the whole halves. rotation: what
    `load_rotation` gives, where that was loaded before.
    """
    if head < NUM_HEADS + NUM_KV_HEADS:
        if QK_NORM:
            norm_ptr = q_norm_ptr if head < NUM_HEADS else k_norm_ptr
            scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(other * other, 0)) / (2 * HALF) + eps)[None, :]
            first *= scale * tl.load(norm_ptr + block).to(tl.float32)
            other *= scale * tl.load(norm_ptr + HALF + block).to(tl.float32)
        if rotation is None:
            cos, sin = _load_angles(rows, block, mask, cos_sin_ptr, HALF)
        else:
            cos, sin = rotation[0], rotation[1]
        rotated = first * cos - other * sin
        other = other * cos + first * sin
        first = rotated
    dtype = q_ptr.dtype.element_ty
    if head < NUM_HEADS:
        q_out = q_ptr + (rows * NUM_HEADS + head) * 2 * HALF + block
        tl.store(q_out, first.to(dtype), mask=mask)
        tl.store(q_out + HALF, other.to(dtype), mask=mask)
    else:
        of_key = head < NUM_HEADS + NUM_KV_HEADS
        kv_head = head - NUM_HEADS - tl.where(of_key, 0, NUM_KV_HEADS)
        places = tl.load(kv_places_ptr + rows, mask=mask, other=0) if rotation is None else rotation[2]
        place = places // PAGE_SIZE * page_stride + places % PAGE_SIZE * token_stride + kv_head * head_stride
        kv_out = kv_ptr + place + tl.where(of_key, 0, v_offset) + block
        if KIND:
            words, row_scales = encode(first, other, 0, KIND)
            tl.store(kv_out, words, mask=mask)
            scales_ptr, value_scales_at, scale_page_stride, scale_head_stride = scales
            scale_place = places // PAGE_SIZE * scale_page_stride + kv_head * scale_head_stride + places % PAGE_SIZE
            scale_place += tl.where(of_key, 0, value_scales_at)
            tl.store(scales_ptr + scale_place, row_scales[None, :], mask=mask)
        else:
            tl.store(kv_out, first.to(dtype), mask=mask)
            tl.store(kv_out + HALF, other.to(dtype), mask=mask)
