"""Where weights come from. Model code asks for tensors by Hugging Face name and never learns how they are stored."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ingle.config import LoadFormat
from ingle.errors import ConfigError, ModelError
from ingle.weights.codes import CODED_BLOCKS, CodedMatrix
from ingle.weights.dequantize import blocks_of_rows, dequantize_into
from ingle.weights.gguf import GgufFile, GgufTensor
from ingle.weights.gguf_hf import architecture_of, config_from_gguf, gguf_tensor_name
from ingle.weights.hf_config import normalize_config, read_json_object
from ingle.weights.torch_bin import TorchFile

MAX_INDEX_BYTES = 64 << 20

_SHARD_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_IN_STACK = re.compile(r"(.+)\[(\d+)/(\d+)\]")
FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
_DUMMY_STD = 0.02


class WeightSource(Protocol):
    """Tensors by Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`, or by that of `in_stack`."""

    def __contains__(self, name: str) -> bool: ...

    @property
    def stored_types(self) -> dict[str, int]:
        """Numbers stored in each type, such as Q4_K or BF16, the most first; empty for made-up weights."""
        ...

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the named tensor as it is stored; None where it has any.

        Raises `ModelError` when there is no such tensor.
        """
        ...

    def coded(self, name: str, num_rows: int, num_columns: int) -> CodedMatrix | None:
        """The named matrix as the codes it is stored in; None for one that is not.

        Raises `ModelError` when its shape is another.
        """
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
        shape = source.shape(name)
        if shape is not None and math.prod(shape) != wanted:
            raise ModelError(f"tensor {name} has shape {shape}, and the configuration asks for {wanted} numbers")


class _Place(NamedTuple):
    at: int
    of: int


def in_stack(name: str, index: int, count: int) -> str:
    """The name under which a source loads one of `count` tensors that are stacked in the tensor `name`."""
    return f"{name}[{index}/{count}]"


def _split(name: str) -> tuple[str, _Place | None]:
    """A stored tensor's name, and the place of the wanted one in it."""
    match = _IN_STACK.fullmatch(name)
    return (match[1], _Place(int(match[2]), int(match[3]))) if match else (name, None)


def open_source(path: Path, load_format: LoadFormat, seed: int, *, tied: bool) -> WeightSource:
    """The weights of the model at `path`, a Hugging Face folder or a GGUF file.

    `tied` and `seed` shape the random weights of `load_format` "dummy": without `lm_head` when tied.
    Raises `ConfigError` when `load_format` does not fit what is there, `ModelError` when that cannot be read.
    """
    if load_format == "dummy":
        return DummySource(seed, tied=tied)
    found = _found_format(path)
    if load_format not in ("auto", found):
        raise ConfigError(f"--load-format {load_format}: {path} is {found}; leave the flag out or give {found}")
    if found == "gguf":
        return GgufSource(path)
    return TorchSource(path) if found == "pt" else SafetensorsSource(path)


def _found_format(path: Path) -> LoadFormat:
    """A folder that has both kinds of files is read as safetensors."""
    if not path.is_dir():
        return "gguf"
    return "pt" if _TORCH_FILES.are_in(path) and not _SAFETENSORS_FILES.are_in(path) else "safetensors"


@dataclass(frozen=True)
class _Files:
    """How a folder's checkpoint files of one kind are called."""

    single: str
    suffix: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def are_in(self, folder: Path) -> bool:
        return (folder / self.single).is_file() or (folder / self.index).is_file()

    def of_tensors(self, folder: Path) -> dict[str, Path] | None:
        """The file of each tensor, by the index; None for a checkpoint in a single file.

        Raises `ModelError` when there is neither, when the index does not name files in this folder, or they are
        missing.
        """
        index = folder / self.index
        if not index.is_file():
            if not (folder / self.single).is_file():
                raise ModelError(f"{folder}: holds neither {self.single} nor {self.index}")
            return None
        weight_map = read_json_object(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ModelError(f"{index}: weight_map does not map tensor names to file names")
        for shard in sorted(set(weight_map.values())):
            if not shard.endswith(self.suffix) or not _SHARD_STEM.fullmatch(shard.removesuffix(self.suffix)):
                raise ModelError(f"{index}: {shard[:100]!r} is not the name of a {self.suffix} file in this folder")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder}: {shard} is missing, which {self.index} lists; download it again")
        return {name: folder / shard for name, shard in weight_map.items()}


_SAFETENSORS_FILES = _Files("model.safetensors", ".safetensors")
_TORCH_FILES = _Files("pytorch_model.bin", ".bin")


class GgufSource:
    """A GGUF file of an architecture in `gguf_hf.ARCHITECTURES`. Quantized weights are decoded as they are loaded."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self._architecture = architecture_of(self._file)
        self._heads: dict[str, int] = {}
        if self._architecture.permutes_qk:
            config = normalize_config(path, config_from_gguf(self._file))
            self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    def __contains__(self, name: str) -> bool:
        return gguf_tensor_name(name, self._architecture) in self._file.tensors

    @property
    def stored_types(self) -> dict[str, int]:
        return self._file.parameters_by_type

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def coded(self, name: str, num_rows: int, num_columns: int) -> CodedMatrix | None:
        tensor = self._tensor(name)
        _check_shape(tensor.path, tensor.name, tensor.shape, (num_rows, num_columns))
        blocks = CODED_BLOCKS.get(tensor.type)
        if blocks is None:
            return None
        rows = blocks_of_rows(tensor, num_rows, num_columns, self._row_order(tensor))
        parts = ((part, blocks.split(stored)) for part, stored in rows)
        return CodedMatrix(blocks.type, ((part, coded.by_rows(part)) for part, coded in parts))

    def _tensor(self, name: str) -> GgufTensor:
        name, place = _split(name)
        gguf_name = gguf_tensor_name(name, self._architecture)
        tensor = self._file.tensors.get(gguf_name or "")
        if tensor is None:
            raise ModelError(f"{self._file.path}: has no tensor {gguf_name or name}, which the model needs")
        if place is None:
            return tensor
        _check_stack(tensor.path, tensor.name, tensor.shape, place)
        return tensor[place.at]

    def load_into(self, name: str, out: torch.Tensor) -> None:
        tensor = self._tensor(name)
        if len(tensor.shape) < out.dim() and out.shape[0] == 1:
            out = out[0]  # the converter drops dimensions of 1
        _check_shape(tensor.path, tensor.name, tensor.shape, tuple(out.shape))
        order = self._row_order(tensor)
        if out.dim() == 2:
            dequantize_into(tensor, out, order)
            return
        values = torch.empty(tensor.shape, dtype=torch.float32)
        dequantize_into(tensor, values)
        if self._architecture.one_plus_norms and name.endswith("norm.weight"):
            values -= 1
        out.copy_(values if order is None else values[torch.from_numpy(order)])

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


class SafetensorsSource:
    """A folder with model.safetensors, or with shards and their index. Files are mapped when first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handles: dict[Path, Any] = {}
        files = _SAFETENSORS_FILES.of_tensors(folder)
        self._files = self._read_single(folder / _SAFETENSORS_FILES.single) if files is None else files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, file in self._files.items():
            with _reading(file):
                stored = self._handle(file).get_slice(name)
                counts[stored.get_dtype()] += math.prod(stored.get_shape())
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        name, place = _split(name)
        file = self._file_of(name)
        with _reading(file):
            shape = tuple(self._handle(file).get_slice(name).get_shape())
        return shape if place is None else shape[1:]

    def coded(self, name: str, num_rows: int, num_columns: int) -> CodedMatrix | None:
        return None

    def load_into(self, name: str, out: torch.Tensor) -> None:
        name, place = _split(name)
        file = self._file_of(name)
        with _reading(file):
            stored = self._handle(file).get_slice(name)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if dtype not in FLOAT_TYPES:
            raise ModelError(f"{file}: tensor {name} is {dtype}: quantized checkpoints are not supported yet")
        if place is not None:
            _check_stack(file, name, shape, place)
        _check_shape(file, name, shape if place is None else shape[1:], tuple(out.shape))
        with _reading(file):
            out.copy_(self._handle(file).get_tensor(name) if place is None else stored[place.at])

    def close(self) -> None:
        self._handles.clear()

    def _file_of(self, name: str) -> Path:
        file = self._files.get(name)
        if file is None:
            if name.removesuffix("weight") + "qweight" in self._files:
                raise ModelError(f"{self._folder}: {name} is quantized (GPTQ or AWQ), which is not supported yet")
            raise ModelError(f"{self._folder}: has no tensor {name}, which the model needs")
        return file

    def _handle(self, file: Path) -> Any:
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]

    def _read_single(self, file: Path) -> dict[str, Path]:
        with _reading(file):
            return dict.fromkeys(self._handle(file).keys(), file)


class TorchSource:
    """A folder with pytorch_model.bin, or with shards and their index. Nothing in them is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = lru_cache(maxsize=None)(TorchFile)
        files = _TORCH_FILES.of_tensors(folder)
        single = folder / _TORCH_FILES.single
        self._files = dict.fromkeys(self._open(single).tensors, single) if files is None else files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for file in sorted(set(self._files.values())):
            counts += self._open(file).stored_types()
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        name, place = _split(name)
        shape = self._opened(name).tensors[name].shape
        return shape if place is None else shape[1:]

    def coded(self, name: str, num_rows: int, num_columns: int) -> CodedMatrix | None:
        return None

    def load_into(self, name: str, out: torch.Tensor) -> None:
        name, place = _split(name)
        opened = self._opened(name)
        shape = opened.tensors[name].shape
        if place is not None:
            _check_stack(opened.path, name, shape, place)
        _check_shape(opened.path, name, shape if place is None else shape[1:], tuple(out.shape))
        out.copy_(opened.tensor(name) if place is None else opened.tensor(name)[place.at])

    def close(self) -> None:
        self._open.cache_clear()

    def _opened(self, name: str) -> TorchFile:
        """The file that has the tensor."""
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"{self._folder}: has no tensor {name}, which the model needs")
        opened = self._open(file)
        if name not in opened.tensors:
            raise ModelError(f"{file}: has no tensor {name}, which {_TORCH_FILES.index} promises")
        return opened


class DummySource:
    """Random weights of any shape, for speed without a checkpoint: the same for the same seed and device type."""

    def __init__(self, seed: int, *, tied: bool) -> None:
        self._seed = seed
        self._tied = tied

    def __contains__(self, name: str) -> bool:
        return not (self._tied and name == "lm_head.weight")

    @property
    def stored_types(self) -> dict[str, int]:
        return {}

    def shape(self, name: str) -> None:
        return None

    def coded(self, name: str, num_rows: int, num_columns: int) -> CodedMatrix | None:
        return None

    def load_into(self, name: str, out: torch.Tensor) -> None:
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=7).digest()
        generator = torch.Generator(out.device).manual_seed(int.from_bytes(digest, "little"))
        out.normal_(1.0 if name.endswith("norm.weight") else 0.0, _DUMMY_STD, generator=generator)

    def close(self) -> None:
        pass


def _check_stack(file: Path, name: str, shape: tuple[int, ...], place: _Place) -> None:
    if not shape or shape[0] != place.of:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {place.of} of them")


def _check_shape(file: Path, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ModelError(f"{file}: tensor {name} has shape {shape}, and the configuration asks for {wanted}")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: damaged or truncated safetensors file: {' '.join(str(error).split())}") from error
