"""Keys and values in codes on a GPU: how they are made, and how tiles of them are multiplied.

A head's numbers i and i + D / 2 are the halves of one word of 16 bits (`ingle.kernels.batch.KvCache`). So a tile of
words goes the way of a tile of 16-bit floats, by the same copies and into the same registers, and only there becomes
two tiles of columns: nothing changes places. Its numbers are float16, which has all of them exactly, whatever the type
of activations; where that is float32, so are they.

A key's scale multiplies its products with queries. A value's scale multiplies the weights that it gets, which are
counted from the largest of weights times scales on: so they have the range of float16, whatever the scales are, and
as the online softmax keeps a largest score in any case, that costs an addition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ingle.kernels.gpu.device import await_previous, multiplies_fp8, pdl

INT8, E4M3, E5M2, E4M3_BY_BITS = 1, 2, 3, 4
"""Kinds of codes; 0 are floats. The last is for GPUs that do not convert fp8_e4m3: their numbers come out divided by
256, as the bits of a float16 whose exponents count from elsewhere."""
KINDS = {torch.int8: INT8, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}
UNPACK_INT8 = tl.constexpr("""{
    .reg .b32 codes, less, wide; mov.b32 less, 0xE480E480; xor.b32 codes, $2, 0x80808080;
    prmt.b32 wide, codes, 0x64646464, 0x4240; add.f16x2 $0, wide, less;
    prmt.b32 wide, codes, 0x64646464, 0x4341; add.f16x2 $1, wide, less;
}""")
"""Into the low bits of 1024: 1152 and the code."""
UNPACK_E4M3 = tl.constexpr("""{
    .reg .b32 codes; .reg .b16 first, other; prmt.b32 codes, $2, 0, 0x3120; mov.b32 {first, other}, codes;
    cvt.rn.f16x2.e4m3x2 $0, first; cvt.rn.f16x2.e4m3x2 $1, other;
}""")
_UNPACK_E4M3_BITS = tl.constexpr("""{
    .reg .b32 shifted, bits;
    shl.b32 bits, $2, 7; and.b32 bits, bits, 0x3F803F80; shl.b32 shifted, $2, 8;
    lop3.b32 $0, shifted, 0x80008000, bits, 0xEA;
    shr.b32 bits, $2, 1; and.b32 bits, bits, 0x3F803F80; lop3.b32 $1, $2, 0x80008000, bits, 0xEA;
}""")
UNPACK_E5M2 = tl.constexpr("""{
    .reg .b32 shifted; shl.b32 shifted, $2, 8;
    and.b32 $0, shifted, 0xFF00FF00; and.b32 $1, $2, 0xFF00FF00;
}""")
LEAST_SCALE, SPARE_BITS = tl.constexpr(8.271806125530277e-25), tl.constexpr(12.0)
"""2 ** -80: a smaller scale counts as this one where largest ones are sought. And what the largest weight is of, in
bits: float16 then has weights that are 2 ** 36 times smaller."""


def kind_of(kv_cache: torch.Tensor, kv_scales: torch.Tensor | None) -> int:
    if kv_scales is None:
        return 0
    kind = KINDS[kv_cache.dtype]
    return E4M3_BY_BITS if kind == E4M3 and not multiplies_fp8(kv_cache.device) else kind


def words(kv_cache: torch.Tensor, kv_scales: torch.Tensor | None) -> torch.Tensor:
    """The cache as kernels read and write it: floats as they are, codes two by two."""
    return kv_cache if kv_scales is None else kv_cache.view(torch.int16)


def scales(kv_scales: torch.Tensor | None, other: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """What kernels are given of scales: where they are, and the strides from keys to values, of pages and heads."""
    if kv_scales is None:
        return other, 0, 0, 0
    values, page, head, _ = kv_scales.stride()
    return kv_scales, values, page, head


@triton.jit
def unpack(codes, KIND: tl.constexpr, dtype: tl.constexpr, COMPILED: tl.constexpr):
    """The numbers in the lower and the upper half of int16 words, in float16 or float32."""
    if COMPILED and dtype == tl.float16:
        asm: tl.constexpr = (
            UNPACK_INT8 if KIND == 1 else UNPACK_E4M3 if KIND == 2 else UNPACK_E5M2 if KIND == 3
            else _UNPACK_E4M3_BITS
        )  # fmt: skip
        first, other = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        wide = codes.to(tl.int32)
        first, other = _number(wide & 0xFF, KIND).to(dtype), _number((wide >> 8) & 0xFF, KIND).to(dtype)
    return first, other


@triton.jit
def _number(code, KIND: tl.constexpr):
    """Of a code in an int32."""
    if KIND == 1:
        number = ((code ^ 0x80) - 128).to(tl.float32)
    elif KIND == 3:
        number = (code << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        bits = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
        number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (256.0 if KIND == 2 else 1.0)
    return number


@triton.jit
def _as_wide(x):
    return x.to(tl.float32) if x.dtype == tl.float32 else x.to(tl.float16)


@triton.jit
def load_halves(ptr, mask, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Rows of queries as `products` takes them: all columns of a mask, or those of each half of a head."""
    if KIND:
        rows = (
            _as_wide(tl.load(ptr, mask=mask, other=0.0)),
            _as_wide(tl.load(ptr + WIDTH, mask=mask, other=0.0)),
        )
    else:
        rows = (tl.load(ptr, mask=mask, other=0.0),)
    return rows


@triton.jit
def no_sums(ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr, KIND: tl.constexpr):
    """For `add_values` to begin with."""
    if KIND:
        sums = (tl.zeros([ROWS, DIM_BLOCK], tl.float32), tl.zeros([ROWS, DIM_BLOCK], tl.float32))
    else:
        sums = (tl.zeros([ROWS, DIM_BLOCK], tl.float32),)
    return sums


@triton.jit
def products(q, k, KIND: tl.constexpr, PRECISION: tl.constexpr, COMPILED: tl.constexpr):
    """Of queries and a tile of keys [KEYS, columns], [rows, KEYS]; of codes, before their scales."""
    if KIND:
        first, other = unpack(k, KIND, q[0].dtype, COMPILED)
        scores = tl.dot(q[0], tl.trans(first), input_precision=PRECISION)
        scores = tl.dot(q[1], tl.trans(other), scores, input_precision=PRECISION)
    else:
        scores = tl.dot(q[0], tl.trans(k), input_precision=PRECISION)
    return scores


@triton.jit
def load_scales(ptr, value_scales_at, mask, scale, KIND: tl.constexpr):
    """Of a tile's keys, for their products, times `scale`; of its values; and what those add to scores where the
    largest weight is sought."""
    key_scales = tl.load(ptr, mask=mask, other=0.0) * (scale * 256.0 if KIND == 4 else scale)
    value_scales = tl.load(ptr + value_scales_at, mask=mask, other=0.0)
    return key_scales, value_scales, tl.log2(tl.maximum(value_scales, LEAST_SCALE)) - SPARE_BITS


@triton.jit
def add_values(
    sums, shrink, weights, v, value_scales, dtype: tl.constexpr,
    KIND: tl.constexpr, PRECISION: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """sums * shrink and the values of a tile [KEYS, columns] times their weights [rows, KEYS].

    A tile's sum is complete before it is added, so that numbers of few keys meet each other first, and those of
    thousands then. `dtype`: that of `q` in `products`.
    """
    if KIND:
        weighted = (weights * value_scales[None, :]).to(dtype)
        first, other = unpack(v, KIND, dtype, COMPILED)
        more = (
            sums[0] * shrink[:, None] + tl.dot(weighted, first, input_precision=PRECISION),
            sums[1] * shrink[:, None] + tl.dot(weighted, other, input_precision=PRECISION),
        )
    else:
        more = (sums[0] * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION),)
    return more


@triton.jit
def over(sums, total, KIND: tl.constexpr):
    """Sums of weighted values over the sums of weights."""
    factor = (256.0 if KIND == 4 else 1.0) / total[:, None]
    if KIND:  # noqa: SIM108 (tuples of two sizes)
        means = (sums[0] * factor, sums[1] * factor)
    else:
        means = (sums[0] / total[:, None],)
    return means


@triton.jit
def store_halves(ptr, values, mask, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Rows as `load_halves` has them, in the type that they are stored in."""
    dtype = ptr.dtype.element_ty
    tl.store(ptr, values[0].to(dtype), mask=mask)
    if KIND:
        tl.store(ptr + WIDTH, values[1].to(dtype), mask=mask)


@triton.jit
def encode(first, other, AXIS: tl.constexpr, KIND: tl.constexpr):
    """Words for the halves of heads, which lie along an axis, and the heads' scales.

    As `ingle.kernels.reference_kv.encode`.
    """
    LARGEST: tl.constexpr = 127.0 if KIND == 1 else 57344.0 if KIND == 3 else 448.0
    first, other = first.to(tl.float32), other.to(tl.float32)
    most = tl.maximum(tl.max(_magnitude(first), AXIS), tl.max(_magnitude(other), AXIS))
    factor = tl.where((most > 0.0) & (most < float("inf")), LARGEST / most, 0.0)
    factor = tl.expand_dims(factor, AXIS)
    low, high = _code(first * factor, LARGEST, KIND), _code(other * factor, LARGEST, KIND)
    return (low | (high << 8)).to(tl.int16), most / LARGEST


@triton.jit
def _magnitude(x):
    """Infinite where x is no number: so is then the scale, and all that it is multiplied with."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _code(x, LARGEST: tl.constexpr, KIND: tl.constexpr):
    """Of numbers up to the largest, to nearest, ties to even: a byte in an int32."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -LARGEST), LARGEST), 0.0)
    if KIND == 1:
        code = _to_nearest(x) & 0xFF
    else:
        SHIFT: tl.constexpr = 21 if KIND == 3 else 20  # bits of float32's fraction that it lacks
        BIAS: tl.constexpr = 15 if KIND == 3 else 7
        LEAST: tl.constexpr = 6.103515625e-05 if KIND == 3 else 0.015625  # from which on numbers are normal
        UNITS: tl.constexpr = 65536.0 if KIND == 3 else 512.0  # of those below it, in 1
        magnitude = tl.abs(x)
        bits = magnitude.to(tl.int32, bitcast=True)
        rounded = (bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT
        normal = rounded - ((127 - BIAS) << (23 - SHIFT))
        code = tl.where(magnitude < LEAST, _to_nearest(magnitude * UNITS) & 0xFF, normal)
        code = code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return code


@triton.jit
def _to_nearest(x):
    """The low bits of whole numbers, for x of up to 2 ** 22: the last ones of 2 ** 23 * 1.5 and x."""
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _encode_kernel(
    kv_ptr, words_ptr, kv_places_ptr, num_tokens, v_offset, page_stride, token_stride, head_stride, scales,
    NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        await_previous()
    token, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, half = tl.arange(0, HEAD_BLOCK), tl.arange(0, HALF_BLOCK)
    mask = (heads < NUM_KV_HEADS)[:, None] & (half < HALF)[None, :]
    row = kv_ptr + ((side * num_tokens + token) * NUM_KV_HEADS + heads[:, None]) * 2 * HALF + half[None, :]
    codes, row_scales = encode(
        tl.load(row, mask=mask, other=0.0), tl.load(row + HALF, mask=mask, other=0.0), 1, KIND
    )  # fmt: skip
    place = tl.load(kv_places_ptr + token)
    page, offset = place // PAGE_SIZE, place % PAGE_SIZE
    out = words_ptr + side * v_offset + page * page_stride + offset * token_stride
    tl.store(out + (heads * head_stride)[:, None] + half[None, :], codes, mask=mask)
    scales_ptr, value_scales_at, scale_page_stride, scale_head_stride = scales
    scale_place = side * value_scales_at + page * scale_page_stride + offset
    tl.store(scales_ptr + scale_place + heads * scale_head_stride, row_scales, mask=heads < NUM_KV_HEADS)


def store(kv: torch.Tensor, kv_cache: torch.Tensor, kv_scales: torch.Tensor, kv_places: torch.Tensor) -> None:
    """Encodes keys and values [2, T, Hkv, D], contiguous, to their places."""
    _, num_tokens, num_kv_heads, head_dim = kv.shape
    held, early = words(kv_cache, kv_scales), pdl(kv.device)
    _encode_kernel[(num_tokens, 2)](
        kv, held, kv_places, num_tokens, *held.stride()[:4], scales(kv_scales, kv),
        NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2, HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        HEAD_BLOCK=triton.next_power_of_2(num_kv_heads), PAGE_SIZE=kv_cache.shape[2],
        KIND=kind_of(kv_cache, kv_scales), PDL=early, num_warps=1, launch_pdl=early,
    )  # fmt: skip
