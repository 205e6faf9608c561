"""Look-ups, norms, rotation and activation as Triton kernels: each reads its inputs once and writes its outputs once.

The functions and their shapes are those of `ingle.kernels.reference`, against which they are tested.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.flow import Rotation
from ingle.kernels.gpu.device import await_previous, pdl
from ingle.kernels.gpu.kv_codes import encode, kind_of, scales, store, words
from ingle.kernels.gpu.scaled import Product, load_product
from ingle.kernels.options import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation

_ALPHA, _LIMIT = tl.constexpr(SWIGLU_ALPHA), tl.constexpr(SWIGLU_LIMIT)


@triton.jit
def _locate_kernel(
    slots_ptr, positions_ptr, tokens_ptr, pages_ptr, token_ids_ptr, kv_places_ptr,
    num_tokens, num_groups, tokens_stride, group_stride, pages_stride,
    PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_tokens
    slot, position = tl.load(slots_ptr + at, mask=mask, other=0), tl.load(positions_ptr + at, mask=mask, other=0)
    token = tl.load(tokens_ptr + slot * tokens_stride + position, mask=mask, other=0)
    tl.store(token_ids_ptr + at, token.to(tl.int64), mask=mask)
    page_ptr = pages_ptr + slot * pages_stride + position // PAGE_SIZE
    kv_place_ptr = kv_places_ptr + at
    for _ in range(num_groups):
        page = tl.load(page_ptr, mask=mask, other=0)
        tl.store(kv_place_ptr, page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE, mask=mask)
        page_ptr += group_stride
        kv_place_ptr += num_tokens


def locate(
    slots: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor, page_tables: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    num_groups = len(page_tables)
    token_ids, kv_places = torch.empty_like(positions), positions.new_empty(num_groups, len(positions))
    early = pdl(positions.device)
    _locate_kernel[(triton.cdiv(len(positions), 128),)](
        slots, positions, token_table, page_tables, token_ids, kv_places, len(positions), num_groups,
        token_table.stride(0), *page_tables.stride()[:2], PAGE_SIZE=page_size, BLOCK=128, PDL=early, launch_pdl=early,
    )  # fmt: skip
    return token_ids, kv_places


@triton.jit
def _keep_kernel(
    token_ids_ptr, slots_ptr, positions_ptr, tokens_ptr, num_tokens, tokens_stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_tokens
    slot, position = tl.load(slots_ptr + at, mask=mask, other=0), tl.load(positions_ptr + at, mask=mask, other=0)
    token = tl.load(token_ids_ptr + at, mask=mask, other=0)
    tl.store(tokens_ptr + slot * tokens_stride + position, token.to(tl.int32), mask=mask)


def keep(token_ids: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, token_table: torch.Tensor) -> None:
    early = pdl(token_ids.device)
    _keep_kernel[(triton.cdiv(len(token_ids), 128),)](
        token_ids, slots, positions, token_table, len(token_ids), token_table.stride(0), BLOCK=128, PDL=early,
        launch_pdl=early,
    )  # fmt: skip


@triton.jit
def normed(x, weight, eps, SIZE: tl.constexpr):
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / SIZE + eps)
    return ((wide * scale).to(weight.dtype) * weight).to(x.dtype)


@triton.jit
def _rms_norm_kernel(
    x_ptr, post_weight_ptr, residual_ptr, weight_ptr, out_ptr, x_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, POST: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if POST:
        post_weight = tl.load(post_weight_ptr + columns, mask=mask, other=0.0)
    if PDL:
        await_previous()
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0)
    if POST:
        x = normed(x, post_weight, eps, SIZE)
    if ADD:
        x = (x + tl.load(residual_ptr + row * SIZE + columns, mask=mask, other=0.0)).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + row * SIZE + columns, x, mask=mask)
    tl.store(out_ptr + row * SIZE + columns, normed(x, weight, eps, SIZE), mask=mask)


def norm_warps(block: int) -> int:
    return min(max(block // 512, 1), 16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    early = pdl(x.device)
    _rms_norm_kernel[(x.numel() // size,)](
        x, x, x, weight, out, x.stride(-2), eps,
        SIZE=size, BLOCK=block, POST=False, ADD=False, PDL=early, num_warps=norm_warps(block), launch_pdl=early,
    )  # fmt: skip
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, post_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    early = pdl(x.device)
    _rms_norm_kernel[(x.shape[0],)](
        x, x if post_weight is None else post_weight, residual, weight, out, x.stride(0), eps,
        SIZE=size, BLOCK=block, POST=post_weight is not None, ADD=True, PDL=early,
        num_warps=norm_warps(block), launch_pdl=early,
    )  # fmt: skip
    return out, residual


@triton.jit
def activate(x, GELU_TANH: tl.constexpr):
    """silu or gelu of float32 x: (1 + tanh(y)) / 2 is sigmoid(2 y)."""
    logit = x
    if GELU_TANH:
        logit = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # 2 sqrt(2 / pi)
    return x / (1 + tl.exp(-logit))


@triton.jit
def swiglu_clamped(gate, up):
    """gpt-oss' gate of float32; what is no number stays none, which a minimum would not leave so."""
    gate = tl.where(gate > _LIMIT, _LIMIT, gate)
    up = tl.where(up > _LIMIT, _LIMIT, tl.where(up < -_LIMIT, -_LIMIT, up))
    return gate / (1 + tl.exp(gate * -_ALPHA)) * (up + 1)


@triton.jit
def _gated_kernel(
    gate_up_ptr, out_ptr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU_TANH: tl.constexpr, CLAMPED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(gate_up_ptr + row * 2 * SIZE + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * SIZE + SIZE + columns, mask=mask, other=0.0)
    if CLAMPED:
        clamped = swiglu_clamped(gate.to(tl.float32), up.to(tl.float32))
        tl.store(out_ptr + row * SIZE + columns, clamped.to(gate.dtype), mask=mask)
    else:
        activated = activate(gate.to(tl.float32), GELU_TANH).to(gate.dtype)
        tl.store(out_ptr + row * SIZE + columns, activated * up, mask=mask)


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(size), 1024)
    early = pdl(gate_up.device)
    _gated_kernel[(num_rows, triton.cdiv(size, block))](
        gate_up, out,
        SIZE=size, BLOCK=block, GELU_TANH=activation == "gelu_tanh", CLAMPED=activation == "swiglu_clamped", PDL=early,
        num_warps=4, launch_pdl=early,
    )  # fmt: skip
    return out


@triton.jit
def _soft_cap_kernel(x_ptr, out_ptr, cap, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        await_previous()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    capped = cap - 2 * cap / (tl.exp(2 * x / cap) + 1)  # tanh(y) is 1 - 2 / (exp(2 y) + 1)
    tl.store(out_ptr + at, capped, mask=at < size)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    out = torch.empty_like(x)
    early = pdl(x.device)
    _soft_cap_kernel[(triton.cdiv(x.numel(), 4096),)](x, out, cap, x.numel(), BLOCK=4096, PDL=early, launch_pdl=early)
    return out


@triton.jit
def _head_weight(q_norm_ptr, k_norm_ptr, columns, of_q, of_k):
    """The norm weight of each head's columns: of_q and of_k [heads, columns] exclude each other."""
    return tl.load(q_norm_ptr + columns, mask=of_q, other=0.0) + tl.load(k_norm_ptr + columns, mask=of_k, other=0.0)


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr, rows_ptr, outs_ptr, bias_ptr, cos_sin_ptr, q_norm_ptr, k_norm_ptr, q_ptr, kv_ptr, kv_places_ptr,
    v_offset, page_stride, token_stride, head_stride, scales, eps,
    PAGE_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr, HEAD_BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    NORM: tl.constexpr, KIND: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    is_q = heads < NUM_HEADS
    is_k = (heads >= NUM_HEADS) & (heads < NUM_HEADS + NUM_KV_HEADS)
    rotates = heads < NUM_HEADS + NUM_KV_HEADS
    half = tl.arange(0, HALF_BLOCK)[None, :]
    in_half = half < HALF
    row = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + heads * HEAD_DIM
    if SCALED or BIAS:
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        row = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
        scale = tl.load(rows_ptr + token) if SCALED else 1.0
        at = heads * HEAD_DIM + half
        first = load_product(row, outs_ptr, bias_ptr, scale, at, is_head & in_half, SCALED, BIAS).to(dtype)
        second = load_product(row, outs_ptr, bias_ptr, scale, at + HALF, is_head & in_half, SCALED, BIAS).to(dtype)
    else:
        first = tl.load(row + half, mask=is_head & in_half, other=0.0)
        second = tl.load(row + HALF + half, mask=is_head & in_half, other=0.0)
    # A key goes to its place in the cache, a value to the same place of the second half, a query to the output.
    place = tl.load(kv_places_ptr + token)
    kv_head = tl.where(is_k, heads - NUM_HEADS, heads - NUM_HEADS - NUM_KV_HEADS)
    kv_row = kv_ptr + place // PAGE_SIZE * page_stride + place % PAGE_SIZE * token_stride
    kv_row += kv_head * head_stride + tl.where(is_k, 0, v_offset)
    q_row = q_ptr + (token * NUM_HEADS + heads) * HEAD_DIM
    if REST_BLOCK > 0:
        rest_at = 2 * HALF + tl.arange(0, REST_BLOCK)[None, :]
        in_rest = rest_at < HEAD_DIM
        if SCALED or BIAS:
            at = heads * HEAD_DIM + rest_at
            rest = load_product(row, outs_ptr, bias_ptr, scale, at, is_head & in_rest, SCALED, BIAS).to(dtype)
        else:
            rest = tl.load(row + rest_at, mask=is_head & in_rest, other=0.0)
    if NORM:
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        square = tl.sum(wide_first * wide_first, 1) + tl.sum(wide_second * wide_second, 1)
        if REST_BLOCK > 0:
            wide_rest = rest.to(tl.float32)
            square += tl.sum(wide_rest * wide_rest, 1)
        scale = tl.rsqrt(square / HEAD_DIM + eps)[:, None]
        first_weight = _head_weight(q_norm_ptr, k_norm_ptr, half, is_q & in_half, is_k & in_half)
        second_weight = _head_weight(q_norm_ptr, k_norm_ptr, HALF + half, is_q & in_half, is_k & in_half)
        first = tl.where(rotates, ((wide_first * scale).to(first_weight.dtype) * first_weight).to(first.dtype), first)
        second = tl.where(
            rotates, ((wide_second * scale).to(second_weight.dtype) * second_weight).to(second.dtype), second
        )
        if REST_BLOCK > 0:
            rest_weight = _head_weight(q_norm_ptr, k_norm_ptr, rest_at, is_q & in_rest, is_k & in_rest)
            rest = tl.where(rotates, ((wide_rest * scale).to(rest_weight.dtype) * rest_weight).to(rest.dtype), rest)
    cos = tl.load(cos_sin_ptr + token * 2 * HALF + half, mask=in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + token * 2 * HALF + HALF + half, mask=in_half, other=0.0)
    rotated_first = tl.where(rotates, (first * cos - second * sin).to(first.dtype), first)
    rotated_second = tl.where(rotates, (second * cos + first * sin).to(second.dtype), second)
    tl.store(q_row + half, rotated_first, mask=is_q & in_half)
    tl.store(q_row + HALF + half, rotated_second, mask=is_q & in_half)
    is_kv = is_head & (heads >= NUM_HEADS)
    if KIND:  # without a rest
        words, row_scales = encode(rotated_first, rotated_second, 1, KIND)
        tl.store(kv_row + half, words, mask=is_kv & in_half)
        scales_ptr, value_scales_at, scale_page_stride, scale_head_stride = scales
        scale_place = place // PAGE_SIZE * scale_page_stride + kv_head * scale_head_stride + place % PAGE_SIZE
        scale_place += tl.where(is_k, 0, value_scales_at)
        tl.store(scales_ptr + scale_place, row_scales[:, None], mask=is_kv)
    else:
        tl.store(kv_row + half, rotated_first, mask=is_kv & in_half)
        tl.store(kv_row + HALF + half, rotated_second, mask=is_kv & in_half)
    if REST_BLOCK > 0:
        tl.store(q_row + rest_at, rest, mask=is_q & in_rest)
        tl.store(kv_row + rest_at, rest, mask=is_kv & in_rest)


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_cache: torch.Tensor,
    kv_places: torch.Tensor,
    kv_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    rotation = Rotation(num_heads, cos_sin, q_norm, k_norm, eps, kv_cache, kv_places, kv_scales)
    return rotate_product(Product(qkv), qkv.dtype, rotation)


def rotate_product(product: Product, dtype: torch.dtype, rotation: Rotation) -> torch.Tensor:
    """`rotate_and_store` of a product, in the type of activations."""
    num_heads, cos_sin, q_norm, k_norm, eps, kv_cache, kv_places, kv_scales = rotation
    qkv = product.sums
    num_tokens, half = qkv.shape[0], cos_sin.shape[-1] // 2
    num_kv_heads, head_dim = kv_cache.shape[-2:]
    if kv_scales is not None and 2 * half < head_dim:  # the halves that rotate are not those of a word
        kv = torch.empty(2, num_tokens, 1, num_kv_heads, head_dim, dtype=dtype, device=qkv.device)
        places = torch.arange(num_tokens, device=qkv.device)
        q = rotate_product(product, dtype, rotation._replace(kv_cache=kv, kv_places=places, kv_scales=None))
        store(kv[:, :, 0], kv_cache, kv_scales, kv_places)
        return q
    held = words(kv_cache, kv_scales)
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=dtype, device=qkv.device)
    total = num_heads + 2 * num_kv_heads
    head_block = 2 if num_tokens < 64 else 8  # few tokens: more programs; many: fewer, larger ones
    rest = head_dim - 2 * half
    early = pdl(qkv.device)
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(total, head_block))](
        *product.pointers, cos_sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, q, held,
        kv_places, *held.stride()[:4], scales(kv_scales, qkv), eps,
        PAGE_SIZE=kv_cache.shape[2], NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        HALF=half, HEAD_BLOCK=head_block, HALF_BLOCK=triton.next_power_of_2(half),
        REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
        NORM=q_norm is not None, KIND=kind_of(kv_cache, kv_scales), SCALED=product.rows is not None,
        BIAS=product.bias is not None, PDL=early,
        num_warps=1 if num_tokens < 64 else 4, launch_pdl=early,
    )  # fmt: skip
    return q
