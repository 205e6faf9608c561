"""Experts of a layer that lie in one tensor as gpt-oss has them, each by a name of its own.

Gate and up projection take turns: row 2 i of a matrix, and number 2 i of a bias, is the gate's. Matrices of floats are
stored the other way round, [experts, inputs, outputs]. MXFP4 is in two tensors: `_blocks` of two codes a byte, the
lower first, [experts, outputs, groups, 16], and `_scales` [experts, outputs, groups].
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingle.errors import ModelError
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.module import Numbers, StoredTensor
from ingle.weights.source import FLOAT_TYPES, FLOATS, Files, Region, StoredRows, check_shape, check_size

if TYPE_CHECKING:
    import torch

_STACK = re.compile(r"(.+\.experts)\.(gate_up|down)_proj(|_bias|_blocks|_scales)")
_SINGLE = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias|weight_packed|weight_scale)")
_SUFFIXES = {"": "weight", "_bias": "bias", "_blocks": "weight_packed", "_scales": "weight_scale"}
_STACKS = {suffix: stack for stack, suffix in _SUFFIXES.items()}
_MAX_EXPERTS = 1024
"""Of which each gets names: far more than models have."""
_DIMS = {"": 3, "_bias": 2, "_blocks": 4, "_scales": 3}


def lie_so(files: Files) -> bool:
    """Of the families that ingle knows, gpt-oss alone has biases of experts in one tensor."""
    return any(name.endswith(".experts.gate_up_proj_bias") for name in files.names)


class SingleExperts:
    """`files` with a tensor for each matrix and each bias of each expert; all else is as it is there."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @property
    def paths(self) -> list[Path]:
        return self._files.paths

    def __contains__(self, name: str) -> bool:
        return name in self._own or (_STACK.fullmatch(name) is None and name in self._files)

    @property
    def names(self) -> Collection[str]:
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(name for name in self._files.names if _STACK.fullmatch(name) is None) | self._own

    @cached_property
    def _own(self) -> frozenset[str]:
        """Those of single experts."""
        own: list[str] = []
        for name in self._files.names:
            match = _STACK.fullmatch(name)
            if match is None:
                continue
            experts, projection, stack = match.groups()
            shape = self._files.stored(name).shape
            misshapen = len(shape) != _DIMS[stack] or 0 in shape or shape[0] > _MAX_EXPERTS
            if misshapen or (projection == "gate_up" and shape[2 if stack == "" else 1] % 2):
                raise ModelError(f"{self._files.where(name)}: tensor {name} has shape {shape}: not one of all experts")
            parts = ("gate", "up") if projection == "gate_up" else ("down",)
            own += [f"{experts}.{i}.{part}_proj.{_SUFFIXES[stack]}" for i in range(shape[0]) for part in parts]
        return frozenset(own)

    def stored(self, name: str) -> StoredTensor:
        if name not in self._own:
            return self._files.stored(name)
        whole, index, rows = self._place(name)
        suffix = name.rpartition(".")[2]
        size = whole.shape[2 if suffix == "weight" else 1]
        num_rows = len(range(size)[rows])
        shapes = {"weight": (num_rows, whole.shape[1]), "bias": (num_rows,)}
        shape = shapes.get(suffix) or (num_rows, math.prod(whole.shape[2:]))

        def read() -> Numbers:
            values = whole.read()[index]
            values = values.T[rows] if suffix == "weight" else values[rows]
            return np.array(values, order="C").reshape(shape)

        return StoredTensor(whole.type, shape, read)

    def _place(self, name: str) -> tuple[StoredTensor, int, slice]:
        """The tensor that has an expert's, its place there, and which of its outputs they are."""
        match = _SINGLE.fullmatch(name)
        assert match is not None, f"{name} is none of an expert's"
        _, index, part, _ = match.groups()
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[part]
        return self._files.stored(self._stack(name)), int(index), rows

    def _stack(self, name: str) -> str:
        match = _SINGLE.fullmatch(name)
        if match is None or name not in self._own:
            return name
        experts, _, part, suffix = match.groups()
        return f"{experts}.{'down' if part == 'down' else 'gate_up'}_proj{_STACKS[suffix]}"

    def where(self, name: str) -> str:
        return self._files.where(self._stack(name))

    @property
    def stored_types(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name in self._files.names:
            stored = self._files.stored(name)
            counts[stored.type] += math.prod(stored.shape)
        return dict(counts.most_common())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored(name).shape if name in self._own else self._files.stored(name).shape

    def check(self, name: str, num_elements: int) -> None:
        if name not in self._own:
            self._files.check(name, num_elements)
            return
        check_size(self.shape(name), name, num_elements)
        self._floats_of(name)

    def alike(self, name: str, other: str) -> bool:
        return name not in self._own and other not in self._own and self._files.alike(name, other)

    def is_coded(self, name: str) -> bool:
        return False

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        raise AssertionError(f"{name} is not stored as codes with scales")

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        if name not in self._own:
            return self._files.stored_rows(name, num_rows, num_columns)
        stored = self._floats_of(name)
        check_shape(Path(self.where(name)), name, stored.shape, (num_rows, num_columns))
        values = stored.read()
        if stored.type == "F64":  # which the kernels do not read
            return StoredRows("F32", values.astype("<f4").view(np.uint8))
        return StoredRows(stored.type, values.view(np.uint8))

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        if name not in self._own:
            return self._files.floats(name, size)
        stored = self._floats_of(name)
        check_shape(Path(self.where(name)), name, stored.shape, (size,))
        return FLOATS[stored.type](stored.read().view(np.uint8))

    def load_into(self, name: str, out: torch.Tensor) -> None:
        if name not in self._own:
            self._files.load_into(name, out)
            return
        check_shape(Path(self.where(name)), name, self.shape(name), tuple(out.shape))
        out.copy_(self._tensor(name))

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        if name not in self._own:
            self._files.load_region(name, region, out)
            return
        check_shape(Path(self.where(name)), name, self.shape(name), region.shape)
        rows = self._tensor(name)[region.rows]
        out.copy_(rows if rows.dim() == 1 else rows[:, region.columns])

    def _floats_of(self, name: str) -> StoredTensor:
        stored = self.stored(name)
        if stored.type not in FLOAT_TYPES:
            raise ModelError(f"{self.where(name)}: tensor {self._stack(name)} is {stored.type}, and no float")
        return stored

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        stored = self._floats_of(name)
        values = torch.from_numpy(stored.read())
        return values.view(torch.bfloat16) if stored.type == "BF16" else values

    def columns_unit(self, name: str) -> int:
        return 1

    def close(self) -> None:
        self._files.close()
