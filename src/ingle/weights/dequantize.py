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


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Bytes `(blocks, 16)` to values 0..15 `(blocks, 32)`: the low halves are values 0..15, the high ones 16..31."""
    packed = packed.contiguous()
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1, 32)


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """Bytes `(blocks, 4)` to 0 or 16 `(blocks, 32)`: bit i of the little-endian word belongs to value i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts & 1) << 4).view(-1, 32)


def _f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16)


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.bfloat16)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_float16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])
    return values.float().sub_(16).mul_(_float16(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8])
    return values.float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_float16(blocks, 0))


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
