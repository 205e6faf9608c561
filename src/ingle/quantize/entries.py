"""The tensors of a quantized folder, in compressed-tensors' layout, each made when it is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ingle.version import __version__
from ingle.weights.quantized.groups import MIDDLE, Groups
from ingle.weights.quantized.rounding_source import RoundingPlan, RoundingSource
from ingle.weights.source import Files

_ITEMSIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1,
              "BOOL": 1}  # fmt: skip
Stored = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Tensor:
    name: str
    type: str
    """By safetensors' name."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEMSIZES[self.type]


@dataclass(frozen=True)
class Entry:
    """Tensors that are made together and lie behind each other."""

    tensors: tuple[Tensor, ...]
    make: Callable[[], tuple[Stored, ...]]
    """Their bytes, in order."""

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)


def entries(files: Files, source: RoundingSource, left_out: Collection[str] = ()) -> Iterator[Entry]:
    """Of a folder's tensors, in the order of their names. Raises `ModelError` for tensors that cannot be copied."""
    for name in sorted(set(files.names).difference(left_out)):
        if name in source.plan.shapes:
            yield _rounded(name, source)
            continue
        stored = files.stored(name)
        yield Entry((Tensor(name, stored.type, stored.shape),), lambda read=stored.read: (read(),))  # type: ignore[misc]


def _rounded(name: str, source: RoundingSource) -> Entry:
    plan, (rows, columns) = source.plan, source.plan.shapes[name]
    scheme, module = plan.scheme, name.removesuffix(".weight")
    groups = 1 if scheme.group_size is None else columns // scheme.group_size
    scale = Tensor(f"{module}.weight_scale", plan.scale_type, (rows, groups))
    if scheme.is_float:
        tensors = [Tensor(name, "F8_E4M3", (rows, columns)), scale]
    else:
        tensors = [Tensor(f"{module}.weight_packed", "I32", (rows, columns * scheme.bits // 32)), scale]
        if scheme.has_zeros:
            words = -(-rows * scheme.bits // 32)
            tensors.append(Tensor(f"{module}.weight_zero_point", "I32", (words, groups)))
        tensors.append(Tensor(f"{module}.weight_shape", "I64", (2,)))

    def make() -> tuple[Stored, ...]:
        held = source.groups(name, rows, columns)
        made: list[Stored] = [held.codes, _scales(held, plan)]
        if scheme.has_zeros:
            made.append(_zeros(held, scheme.bits))
        return (*made, np.array((rows, columns), "<i8")) if not scheme.is_float else tuple(made)

    return Entry(tuple(tensors), make)


def _scales(groups: Groups, plan: RoundingPlan) -> Stored:
    if plan.scale_type == "BF16":
        return (np.ascontiguousarray(groups.scales).view(np.uint32) >> 16).astype("<u2")
    return groups.scales.astype("<f2")


def _zeros(groups: Groups, bits: int) -> Stored:
    """Packed along the outputs, as codes are along the inputs: [rows * bits / 32, groups]."""
    rows, per_word = groups.num_rows, 32 // bits
    zeros = groups.zeros
    if zeros is None:
        zeros = np.full(groups.scales.shape, MIDDLE[groups.kind], np.uint8)
    padded = np.zeros((-(-rows // per_word) * per_word, zeros.shape[1]), np.uint32)
    padded[:rows] = zeros
    shifts = (np.arange(per_word, dtype=np.uint32) * bits)[None, :, None]
    words: npt.NDArray[np.uint32] = np.bitwise_or.reduce(padded.reshape(-1, per_word, zeros.shape[1]) << shifts, axis=1)
    return words.astype("<u4")


def quantization_config(plan: RoundingPlan, kept: list[str]) -> dict[str, Any]:
    """What config.json says of it; `kept` are the modules that stay as they are."""
    scheme = plan.scheme
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.is_float else "int",
        "symmetric": not scheme.has_zeros,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "observer": "mse",
    }
    inputs = None
    if scheme.quantizes_inputs:  # as they come, with a scale for each token
        inputs = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "float-quantized" if scheme.is_float else "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ingle_version": __version__,
    }
