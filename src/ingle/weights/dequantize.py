"""GGUF's stored bytes to PyTorch tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from ingle.errors import ModelError
from ingle.weights.codes import CODED_BLOCKS
from ingle.weights.gguf import BLOCK_TYPES, GgufTensor

# 4 MiB of float32: small enough to stay in cache between the passes over it, large enough to hide the cost of a call.
_CHUNK_ELEMENTS = 1 << 20

_BLOCKS = {block.name: block for block in BLOCK_TYPES.values()}


def dequantize_into(
    tensor: GgufTensor,
    out: torch.Tensor,
    row_order: npt.NDArray[np.intp] | None = None,
    columns: slice = slice(None),
) -> None:
    """Decode `tensor` into `out`: same shape, any float dtype, any device; a slice of a larger tensor will do.

    Stored bytes go to `out`'s device a chunk of rows at a time and are decoded there, so the extra memory is a few
    chunks. Values are computed in float32, exactly as ggml's reference does, and rounded once to `out.dtype`.
    `row_order`, for a tensor of two dimensions, reads stored row `row_order[i]` into row `i` of `out`, and `columns`
    reads these alone; then `out` has so many.
    Raises `ModelError` for a type that cannot be decoded.
    """
    decode = _DECODERS.get(tensor.type)
    if decode is None:
        raise ModelError(
            f"{tensor.path}: tensor {tensor.name} is stored as {tensor.type}; ingle reads {', '.join(_DECODERS)}"
        )
    block = _BLOCKS[tensor.type]
    out_rows = out.view(-1, out.shape[-1]) if out.is_contiguous() else out
    stored_rows = tensor.data.reshape(-1, tensor.shape[-1] // block.elements * block.nbytes)
    first, last, _ = columns.indices(tensor.shape[-1])
    blocks = range(first // block.elements, -(-last // block.elements))  # those that have the columns
    stored_rows = stored_rows[:, blocks.start * block.nbytes : blocks.stop * block.nbytes]
    wanted = slice(first - blocks.start * block.elements, last - blocks.start * block.elements)
    num_rows, num_columns = len(out_rows), len(blocks) * block.elements
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        # A copy, because PyTorch has no read-only tensors and the file is mapped read-only.
        stored = stored_rows[rows].copy() if row_order is None else stored_rows[row_order[rows]]
        in_blocks = torch.from_numpy(stored).view(-1, block.nbytes)
        out_rows[rows].copy_(decode(in_blocks.to(out.device)).view(-1, num_columns)[:, wanted])


def _f32(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float32)


def _f16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.float16)


def _bf16(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.view(torch.bfloat16)


_DECODERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    **{name: blocks.decode for name, blocks in CODED_BLOCKS.items()},
}
