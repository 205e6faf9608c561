"""GGUF's stored bytes to PyTorch tensors. The block layouts are those of ggml-common.h (`block_q4_0` and so on)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ingle.errors import ModelError
from ingle.weights.gguf import BLOCK_TYPES, GgufTensor

# 4 MiB of float32: small enough to stay in cache between the passes over it, large enough to hide the cost of a call.
_CHUNK_ELEMENTS = 1 << 20

_BLOCK_BYTES = {block.name: block.nbytes for block in BLOCK_TYPES.values()}

_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize_into(tensor: GgufTensor, out: torch.Tensor, row_order: npt.NDArray[np.intp] | None = None) -> None:
    """Decode `tensor` into `out`: same shape, any float dtype, any device; a slice of a larger tensor will do.

    Stored bytes go to `out`'s device a chunk of rows at a time and are decoded there, so the extra memory is a few
    chunks. Values are computed in float32, exactly as ggml's reference does, and rounded once to `out.dtype`.
    `row_order`, for a tensor of two dimensions, reads stored row `row_order[i]` into row `i` of `out`.
    Raises `ModelError` for a type that cannot be decoded.
    """
    decode = _DECODERS.get(tensor.type)
    if decode is None:
        raise ModelError(
            f"{tensor.path}: tensor {tensor.name} is stored as {tensor.type}; ingle reads {', '.join(_DECODERS)}"
        )
    out_rows = out.view(-1, out.shape[-1])
    num_rows, num_columns = out_rows.shape
    stored_rows = tensor.data.reshape(num_rows, -1)
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, chunk):
        rows = slice(start, start + chunk)
        # A copy, because PyTorch has no read-only tensors and the file is mapped read-only.
        stored = stored_rows[rows].copy() if row_order is None else stored_rows[row_order[rows]]
        blocks = torch.from_numpy(stored).to(out.device).view(-1, _BLOCK_BYTES[tensor.type])
        out_rows[rows].copy_(decode(blocks).view(-1, num_columns))


def _float16(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The scale or minimum at byte `start` of each block: float32 `(blocks, 1)`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _int8(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.int8)


def _fields(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Unsigned values of `bits` bits out of bytes `(blocks, n)`: uint8 `(blocks, n * 8 / bits)`.

    Each run of `width` bytes gives its lowest bits as a run of `width` values, then the next bits as the next run.
    """
    runs, mask, last = packed.contiguous().view(len(packed), -1, width), (1 << bits) - 1, 8 - bits
    between = [runs >> shift & mask for shift in range(bits, last, bits)]
    return torch.stack([runs & mask, *between, runs >> last], 2).view(len(packed), -1)


def _scaled(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 `(blocks, scales, values of a scale)`: values `(blocks, n)` times their scales `(blocks, scales)`."""
    return values.view(*scales.shape, -1).float().mul_(scales.unsqueeze(-1))


def _looked_up(codes: torch.Tensor, codebook: tuple[int, ...]) -> torch.Tensor:
    """float32 of the shape of `codes`: the codebook's entry for each code."""
    table = torch.tensor(codebook, dtype=torch.float32, device=codes.device)
    return table.index_select(0, codes.view(-1).int()).view(codes.shape)


def _f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16)


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.bfloat16)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 2:], 4, 16).float().sub_(8).mul_(_float16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, 4:], 4, 16).float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _fields(blocks[:, 6:], 4, 16) | _fields(blocks[:, 2:6], 1, 1) << 4
    return values.float().sub_(16).mul_(_float16(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _fields(blocks[:, 8:], 4, 16) | _fields(blocks[:, 4:8], 1, 1) << 4
    return values.float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _int8(blocks[:, 2:]).float().mul_(_float16(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = (blocks[:, :16] & 15).float().mul_(_float16(blocks, 80))
    minima = (blocks[:, :16] >> 4).float().mul_(_float16(blocks, 82))
    return _scaled(_fields(blocks[:, 16:80], 2, 32), scales).sub_(minima.unsqueeze(-1))


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    scales = _fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4
    values = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    return _scaled(_int8(values) - 4, (_int8(scales) - 32).float().mul_(_float16(blocks, 108)))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bit_scales(blocks)
    return _scaled(_fields(blocks[:, 16:], 4, 32), scales).sub_(minima.unsqueeze(-1))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bit_scales(blocks)
    values = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return _scaled(values, scales).sub_(minima.unsqueeze(-1))


def _six_bit_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K, float32 `(blocks, 8)` each: 6 bits each, in the bytes 4 to 16 of a block."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), 1)
    return scales.float().mul_(_float16(blocks, 0)), minima.float().mul_(_float16(blocks, 2))


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    values = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    return _scaled(_int8(values) - 32, _int8(blocks[:, 192:208]).float().mul_(_float16(blocks, 208)))


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _looked_up(_fields(blocks[:, 2:], 4, 16), _IQ4_VALUES).mul_(_float16(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    scales = _fields(blocks[:, 4:8], 4, 1) | _fields(blocks[:, 2:4], 2, 1) << 4
    values = _looked_up(_fields(blocks[:, 8:], 4, 16), _IQ4_VALUES)
    return _scaled(values, (_int8(scales) - 32).float().mul_(_float16(blocks, 0)))


def _tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """Five ternary digits to a byte, as a fraction of 256: the n-th is the carry of `byte * 3**n mod 256` times 3."""
    runs = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    digits = torch.cat([run * 3**power for run, count in runs for power in range(count)], 1)
    return (digits.short() * 3 >> 8).sub_(1).float().mul_(_float16(blocks, 52))


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    return _fields(blocks[:, :64], 2, 32).float().sub_(1).mul_(_float16(blocks, 64))


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """OCP Microscaling: FP4 E2M1 under a power of two. The codebook holds doubled values, so the scale is halved."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return _looked_up(_fields(blocks[:, 1:], 4, 16), _E2M1_DOUBLED).mul_(bits.view(torch.float32))


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
}
