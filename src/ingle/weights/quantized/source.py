"""A checkpoint of which some matrices are stored as codes: a source that gives those as `Groups`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized import layouts
from ingle.weights.quantized.bitsandbytes import STATE
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import Module
from ingle.weights.quantized.scheme import MARKERS, Quantization
from ingle.weights.quantized.tables import TABLES
from ingle.weights.source import FLOAT_TYPES, Files, Region, StoredRows, check_size

if TYPE_CHECKING:
    import torch

_CHUNK_ROWS = 1024
_CODES = ("qweight", "weight_packed", "weight")
"""What tensors of codes are called."""
_OF_THE_CACHE = ("k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point", "q_scale")
"""What follows a module's name in tensors that are about keys and values, and no weights."""
CODED_BYTES = {
    "int4": 0.5 + 1 / 16,
    "int8": 1 + 1 / 16,
    "fp8": 1 + 1 / 32,
    "nf4": 0.5 + 1 / 16,
    "fp4": 0.5 + 1 / 16,
    "mxfp4": 0.5 + 1 / 16,
    "nvfp4": 0.5 + 1 / 4,
}
"""That a number of these kinds takes with its share of scales, at most as usual checkpoints have them."""


class QuantizedSource:
    """What a module is stored as its tensors say; what they mean, the configuration.

    A module with a `weight` of a float type is not quantized, whatever is excepted or not.
    """

    def __init__(self, files: Files, quantization: Quantization) -> None:
        self._files, self._quantization = files, quantization

    def __contains__(self, name: str) -> bool:
        return name in self._files or self._module(name) is not None

    @property
    def names(self) -> Collection[str]:
        return frozenset(self._files.names) | {f"{module}.weight" for module in self._coded}

    @property
    def stored_types(self) -> dict[str, int]:
        """Of codes the kind, such as int4; scales and what else belongs to codes are not counted."""
        counts: Counter[str] = Counter()
        coded = self._coded
        for name in self._files.names:
            module, _, suffix = name.rpartition(".")
            if module in coded:
                if suffix == coded[module] and (found := self._module(f"{module}.weight")) is not None:
                    counts[found.scheme.stored_type] += math.prod(layouts.shape_of(found))
                continue
            if module.removesuffix(".weight") in coded or suffix in _OF_THE_CACHE:
                continue
            stored = self._files.stored(name)
            counts[stored.type] += math.prod(stored.shape)
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        module = self._module(name)
        return self._files.stored(name).shape if module is None else layouts.shape_of(module)

    def check(self, name: str, num_elements: int) -> None:
        module = self._module(name)
        if module is None:
            self._files.check(name, num_elements)
            return
        shape = layouts.shape_of(module)
        check_size(shape, name, num_elements)
        layouts.check(module, *shape)

    def is_coded(self, name: str) -> bool:
        return self._module(name) is not None

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        module = self._module(name)
        assert module is not None, f"{name} is not stored as codes with scales"
        shape = layouts.shape_of(module)
        if shape != (num_rows, num_columns):
            check_size(shape, name, num_rows * num_columns)
            raise ModelError(
                f"tensor {name} has shape {shape}, and the configuration asks for {(num_rows, num_columns)}"
            )
        return layouts.read(module, num_rows, num_columns)

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        return self._files.stored_rows(name, num_rows, num_columns)

    def alike(self, name: str, other: str) -> bool:
        coded = self._module(name) is not None or self._module(other) is not None
        return not coded and self._files.alike(name, other)

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        return self._files.floats(name, size)

    def load_into(self, name: str, out: torch.Tensor) -> None:
        module = self._module(name)
        if module is None:
            self._files.load_into(name, out)
            return
        import torch

        rows = out.view(-1, out.shape[-1])
        groups = layouts.read(module, *rows.shape)
        for start in range(0, len(rows), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(rows))
            rows[start:stop].copy_(torch.from_numpy(groups.rows(start, stop).decoded()))

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        module = self._module(name)
        if module is None:
            self._files.load_region(name, region, out)
            return
        import torch

        rows, columns = region.shape
        groups = layouts.read(module, rows, columns)
        for start in range(0, len(out), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(out))
            decoded = groups.rows(region.rows.start + start, region.rows.start + stop).decoded()
            out[start:stop].copy_(torch.from_numpy(decoded[:, region.columns]))

    def columns_unit(self, name: str) -> int:
        module = self._module(name)
        return 1 if module is None else layouts.columns_unit(module)

    def close(self) -> None:
        self._files.close()

    @cached_property
    def _coded(self) -> dict[str, str]:
        """The modules that are stored as codes, and the tensor that has them. Raises `ModelError` for several."""
        coded: dict[str, str] = {}
        for name in self._files.names:
            module, _, suffix = name.rpartition(".")
            if suffix not in _CODES:
                continue
            if suffix == "weight" and self._holds_numbers(name):
                if f"{module}.qweight" in self._files or f"{module}.weight_packed" in self._files:
                    raise self._mixed(module)
                continue
            if module in coded:
                raise self._mixed(module)
            coded[module] = suffix
        return coded

    def _holds_numbers(self, name: str) -> bool:
        """Whether a tensor of this name is what it seems: bitsandbytes stores codes in any type."""
        is_float = self._files.stored(name).type in FLOAT_TYPES
        return is_float and not any(f"{name.removesuffix('weight')}{STATE}{table}" in self._files for table in TABLES)

    def _mixed(self, module: str) -> ModelError:
        found = sorted(name for name in _CODES if f"{module}.{name}" in self._files)
        file = self._files.where(f"{module}.{found[0]}")
        return ModelError(
            f"{file}: {module} is stored in several ways ({', '.join(found)})",
            alternative="take the files of one quantization, into a folder of their own",
        )

    def _module(self, name: str) -> Module | None:
        """The module whose codes are the named weight."""
        module, _, suffix = name.rpartition(".")
        if suffix != "weight" or module not in self._coded:
            return None
        scheme, marker = self._quantization.scheme_stored(module), self._coded[module]
        if marker not in MARKERS[scheme.layout]:
            file = self._files.where(f"{module}.{marker}")
            raise ModelError(
                f"{file}: has a tensor {module}.{marker}, and the configuration says {self._quantization.name}, which "
                f"has {MARKERS[scheme.layout][0]} there",
                alternative="take the configuration that belongs to these files",
            )
        return Module(module, scheme, self._files)
