"""Weights of a GGUF file, by Hugging Face name."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.gguf import BLOCK_TYPES, GgufFile, GgufTensor
from ingle.weights.gguf_hf import architecture_of, config_from_gguf, gguf_tensor_name
from ingle.weights.hf_config import normalize_config
from ingle.weights.quantized.groups import Groups
from ingle.weights.source import (
    FLOATS,
    Region,
    StoredRows,
    check_shape,
    check_size,
    check_stack,
    compared,
    same_bytes,
    split_name,
)

if TYPE_CHECKING:
    import torch

_BLOCK_ELEMENTS = {block.name: block.elements for block in BLOCK_TYPES.values()}
READABLE_TYPES = ("F32", "F16", "BF16", *CODE_TYPES)


class GgufSource:
    """A GGUF file of an architecture in `gguf_hf.ARCHITECTURES`. Quantized weights are decoded as they are loaded."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._architecture = architecture_of(self._file)
        self._heads: dict[str, int] = {}
        if self._architecture.permutes_qk:
            config = normalize_config(file.path, config_from_gguf(file))
            self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def __contains__(self, name: str) -> bool:
        return gguf_tensor_name(name, self._architecture) in self._file.tensors

    @property
    def stored_types(self) -> dict[str, int]:
        return self._file.parameters_by_type

    @property
    def names(self) -> Collection[str]:
        return ()

    def alike(self, name: str, other: str) -> bool:
        one, two = self._tensor(name), self._tensor(other)
        if (one.type, one.shape) != (two.type, two.shape) or not one.nbytes:
            return False
        part = compared(one.path, two.path)
        return same_bytes(one.data[part], two.data[part])

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def check(self, name: str, num_elements: int) -> None:
        tensor = self._tensor(name)
        if tensor.num_elements != num_elements:
            check_size(tensor.shape, name, num_elements)
        _check_type(tensor)

    def is_coded(self, name: str) -> bool:
        return False

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        raise AssertionError(f"{name} is not stored as codes with scales")

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        tensor = self._tensor(name)
        check_shape(tensor.path, tensor.name, tensor.shape, (num_rows, num_columns))
        _check_type(tensor)
        return StoredRows(tensor.type, tensor.data.reshape(num_rows, -1), self._row_order(tensor))

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        tensor = self._tensor(name)
        check_shape(tensor.path, tensor.name, tensor.shape, (size,))
        if tensor.type not in FLOATS:
            raise ModelError(f"{tensor.path}: tensor {tensor.name} is stored as {tensor.type}, and a vector never is")
        values = FLOATS[tensor.type](tensor.data)
        if self._architecture.one_plus_norms and name.endswith("norm.weight"):
            values -= 1
        order = self._row_order(tensor)
        return values if order is None else values[order]

    def _tensor(self, name: str) -> GgufTensor:
        name, place = split_name(name)
        gguf_name = gguf_tensor_name(name, self._architecture)
        tensor = self._file.tensors.get(gguf_name or "")
        if tensor is None:
            raise ModelError(f"{self._file.path}: has no tensor {gguf_name or name}, which the model needs")
        if place is None:
            return tensor
        check_stack(tensor.path, tensor.name, tensor.shape, place)
        return tensor[place.at]

    def load_into(self, name: str, out: torch.Tensor) -> None:
        tensor = self._tensor(name)
        if len(tensor.shape) < out.dim() and out.shape[0] == 1:
            out = out[0]  # the converter drops dimensions of 1
        if out.dim() == 1:
            import torch

            out.copy_(torch.from_numpy(self.floats(name, len(out))))
            return
        from ingle.weights.dequantize import dequantize_into

        check_shape(tensor.path, tensor.name, tensor.shape, tuple(out.shape))
        dequantize_into(tensor, out, self._row_order(tensor))

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        if len(region.shape) == 1:
            import torch

            out.copy_(torch.from_numpy(self.floats(name, *region.shape)[region.rows]))
            return
        from ingle.weights.dequantize import dequantize_into

        tensor = self._tensor(name)
        check_shape(tensor.path, tensor.name, tensor.shape, region.shape)
        order = self._row_order(tensor)
        rows = np.arange(tensor.shape[0])[region.rows] if order is None else order[region.rows]
        dequantize_into(tensor, out, rows, region.columns)

    def columns_unit(self, name: str) -> int:
        return _BLOCK_ELEMENTS[self._tensor(name).type]

    def _row_order(self, tensor: GgufTensor) -> npt.NDArray[np.intp] | None:
        """Which stored row is each row of a query or key projection; None where the order is kept.

        llama.cpp rotates adjacent pairs of values, Hugging Face the two halves of a head. So its converter stores row
        (head, half, i) as (head, i, half): `LlamaModel.permute` in convert_hf_to_gguf.py.
        """
        heads = self._heads.get(tensor.name.split(".")[-2])
        if heads is None:
            return None
        rows = tensor.shape[0]
        if rows % (2 * heads):
            raise ModelError(f"{tensor.path}: tensor {tensor.name} has {rows} rows, no multiple of 2 x {heads} heads")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def close(self) -> None:
        del self._file


def _check_type(tensor: GgufTensor) -> None:
    if tensor.type not in READABLE_TYPES:
        raise ModelError(
            f"{tensor.path}: tensor {tensor.name} is stored as {tensor.type}; ingle reads {', '.join(READABLE_TYPES)}",
            alternative="take a file of this model in one of these, such as Q4_K_M or Q8_0",
        )
