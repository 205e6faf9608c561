"""Where weights come from. Model code asks for tensors by Hugging Face name and never learns how they are stored.

GGUF and safetensors are read without PyTorch for a CPU that multiplies what is stored as it is; the other sources, in
`tensor_sources`, read by it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.config import LoadFormat
from ingle.errors import ConfigError, ModelError
from ingle.weights.checkpoint_files import SAFETENSORS_FILES, TORCH_FILES
from ingle.weights.code_types import CODE_TYPES
from ingle.weights.gguf import GgufFile, GgufTensor
from ingle.weights.gguf_hf import architecture_of, config_from_gguf, gguf_tensor_name
from ingle.weights.hf_config import normalize_config

if TYPE_CHECKING:
    import torch

_IN_STACK = re.compile(r"(.+)\[(\d+)/(\d+)\]")
_COMPARED_BYTES = 1 << 20
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
READABLE_TYPES = ("F32", "F16", "BF16", *CODE_TYPES)
"""Of GGUF's."""


class StoredRows(NamedTuple):
    """A matrix as GGUF would store it."""

    type: str
    """Of its blocks, such as Q4_1 or BF16."""
    data: npt.NDArray[np.uint8]
    """(rows, bytes of a row), contiguous."""
    order: npt.NDArray[np.intp] | None = None
    """Which stored row is each row of the matrix; None where they are the same."""


class ExpertNames(NamedTuple):
    """What a source calls the matrices of one expert."""

    gate_up: tuple[str, ...]
    """Gate, then up: two matrices, or one."""
    down: str


class WeightSource(Protocol):
    """Tensors by Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`, or by that of `in_stack`."""

    def __contains__(self, name: str) -> bool: ...

    @property
    def stored_types(self) -> dict[str, int]:
        """Numbers stored in each type, such as Q4_K or BF16, the most first; empty for made-up weights."""
        ...

    @property
    def names(self) -> Collection[str]:
        """Of all stored tensors, where they may differ from those that a family expects: not in a GGUF file."""
        ...

    def alike(self, name: str, other: str) -> bool:
        """Whether two stored tensors are of the same type, shape and bytes. Ends at the first difference."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the named tensor as it is stored; None where it has any.

        Raises `ModelError` when there is no such tensor.
        """
        ...

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        """The named matrix for a CPU's kernels. Raises `ModelError` when there is none, or its shape is another."""
        ...

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """The named vector in host memory. Raises `ModelError` as `load_into` does."""
        ...

    def load_into(self, name: str, out: torch.Tensor) -> None:
        """Fill `out`, of any float dtype, on any device, maybe a slice of a fused parameter, with the named tensor.

        Raises `ModelError` when there is no such tensor, its shape is not `out`'s, or it cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Let go of the files. The source is not used after this."""
        ...


def check_sizes(source: WeightSource, names: Sequence[str], num_elements: Sequence[int]) -> None:
    """Before memory is taken for tensors that a configuration describes.

    Raises `ModelError` unless each has as many numbers as wanted.
    """
    for name, wanted in zip(names, num_elements, strict=True):
        check_size(source.shape(name), name, wanted)


def check_size(shape: tuple[int, ...] | None, name: str, num_elements: int) -> None:
    """`check_sizes` of one tensor, whose shape may be any."""
    if shape is not None and math.prod(shape) != num_elements:
        raise ModelError(f"tensor {name} has shape {shape}, and the configuration asks for {num_elements} numbers")


class Place(NamedTuple):
    at: int
    of: int


def in_stack(name: str, index: int, count: int) -> str:
    """The name under which a source loads one of `count` tensors that are stacked in the tensor `name`."""
    return f"{name}[{index}/{count}]"


def split_name(name: str) -> tuple[str, Place | None]:
    """A stored tensor's name, and the place of the wanted one in it."""
    match = _IN_STACK.fullmatch(name)
    return (match[1], Place(int(match[2]), int(match[3]))) if match else (name, None)


def open_source(path: Path, load_format: LoadFormat, seed: int, *, gguf: GgufFile | None = None) -> WeightSource:
    """The weights of the model at `path`, a Hugging Face folder or a GGUF file.

    `seed` is that of the random weights of `load_format` "dummy". `gguf` is the file at `path`, where somebody has read
    it already.
    Raises `ConfigError` when `load_format` does not fit what is there, `ModelError` when that cannot be read.
    """
    if load_format == "dummy":
        from ingle.weights.tensor_sources import DummySource

        return DummySource(seed)
    found = _found_format(path)
    if load_format not in ("auto", found):
        raise ConfigError(f"--load-format {load_format}: {path} is {found}; leave the flag out or give {found}")
    if found == "gguf":
        return GgufSource(gguf or GgufFile(path))
    if found == "safetensors":
        from ingle.weights.safetensors_source import SafetensorsSource

        return SafetensorsSource(path)
    from ingle.weights.tensor_sources import TorchSource

    return TorchSource(path)


def _found_format(path: Path) -> LoadFormat:
    """A folder that has both kinds of files is read as safetensors."""
    if not path.is_dir():
        return "gguf"
    return "pt" if TORCH_FILES.are_in(path) and not SAFETENSORS_FILES.are_in(path) else "safetensors"


FLOATS: dict[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {
    "F32": lambda stored: stored.view("<f4").astype(np.float32),
    "F16": lambda stored: stored.view("<f2").astype(np.float32),
    "BF16": lambda stored: (stored.view("<u2").astype(np.uint32) << 16).view(np.float32),
    "F64": lambda stored: stored.view("<f8").astype(np.float32),
}
"""Stored bytes to the numbers that they are, by the name of their type."""


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
        return (one.type, one.shape) == (two.type, two.shape) and bool(one.nbytes) and same_bytes(one.data, two.data)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        tensor = self._tensor(name)
        check_shape(tensor.path, tensor.name, tensor.shape, (num_rows, num_columns))
        if tensor.type not in READABLE_TYPES:
            raise ModelError(
                f"{tensor.path}: tensor {tensor.name} is stored as {tensor.type}; ingle reads "
                f"{', '.join(READABLE_TYPES)}"
            )
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


def same_bytes(one: npt.NDArray[np.uint8], two: npt.NDArray[np.uint8]) -> bool:
    """Whether two arrays of bytes are equal, read no further than they are."""
    return len(one) == len(two) and all(
        np.array_equal(one[start : start + _COMPARED_BYTES], two[start : start + _COMPARED_BYTES])
        for start in range(0, len(one), _COMPARED_BYTES)
    )


def check_stack(file: Path, name: str, shape: tuple[int, ...], place: Place) -> None:
    """Raises `ModelError` unless as many tensors are stacked in this one as the configuration says."""
    if not shape or shape[0] != place.of:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {place.of} of them")


def check_shape(file: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises `ModelError` when a tensor has another shape than wanted."""
    if shape != wanted:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {wanted}")
