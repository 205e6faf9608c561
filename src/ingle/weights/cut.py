"""A source of which one of several ranks takes its share: the rows and columns of each tensor that are its own."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.quantized.groups import Groups
from ingle.weights.source import Region, StoredRows, WeightSource, check_size, split_name

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T", bound=np.generic)
_BLOCKS = {block.name: block for block in BLOCK_TYPES.values()}


class Range(NamedTuple):
    """[start, stop) of a dimension, and zeros behind them up to `size` numbers."""

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Cut:
    """What a rank has of a tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor: rows and columns, or rows alone."""
    rows: tuple[Range, ...]
    """One below the other."""
    columns: Range | None = None
    """None for all."""

    @property
    def num_rows(self) -> int:
        return sum(rows.size for rows in self.rows)

    @property
    def num_columns(self) -> int:
        return math.prod(self.shape[1:]) if self.columns is None else self.columns.size

    @property
    def shape_of_share(self) -> tuple[int, ...]:
        return (self.num_rows, self.num_columns)[: len(self.shape)]

    def regions(self) -> Iterator[tuple[Region, int]]:
        """What is stored of it, and the row of the share where each begins."""
        columns = slice(None) if self.columns is None else slice(self.columns.start, self.columns.stop)
        first = 0
        for rows in self.rows:
            if rows.start < rows.stop:
                yield Region(self.shape, slice(rows.start, rows.stop), columns), first
            first += rows.size

    @property
    def num_stored(self) -> int:
        """Columns of the share that are no padding."""
        return self.num_columns if self.columns is None else self.columns.stop - self.columns.start


class CutSource:
    """A `WeightSource` of a rank's share. Tensors without a cut are whole."""

    def __init__(self, source: WeightSource, cuts: Mapping[str, Cut]) -> None:
        """`cuts`, by name: of tensors that are stacked in one, by that one's."""
        self._source, self._cuts = source, cuts

    def __contains__(self, name: str) -> bool:
        return name in self._source

    @property
    def stored_types(self) -> dict[str, int]:
        """Of the whole model."""
        return self._source.stored_types

    @property
    def names(self) -> Collection[str]:
        return self._source.names

    def alike(self, name: str, other: str) -> bool:
        return self._source.alike(name, other)

    def shape(self, name: str) -> tuple[int, ...] | None:
        cut, shape = self._cut(name), self._source.shape(name)
        if cut is None or shape is None:
            return shape
        check_size(shape, name, math.prod(cut.shape))
        return cut.shape_of_share

    def check(self, name: str, num_elements: int) -> None:
        cut = self._cut(name)
        self._source.check(name, num_elements if cut is None else math.prod(cut.shape))

    def columns_unit(self, name: str) -> int:
        return self._source.columns_unit(name)

    def is_coded(self, name: str) -> bool:
        return self._source.is_coded(name)

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        cut = self._cut(name)
        if cut is None:
            return self._source.groups(name, num_rows, num_columns)
        whole = self._source.groups(name, *cut.shape)
        if cut.columns is not None:
            whole = whole.columns(cut.columns.start, cut.columns.stop).widened(cut.columns.size)
        return _rows_of(whole, cut.rows)

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        cut = self._cut(name)
        if cut is None:
            return self._source.stored_rows(name, num_rows, num_columns)
        stored = self._source.stored_rows(name, *cut.shape)
        block = _BLOCKS[stored.type]
        columns = cut.columns or Range(0, num_columns, num_columns)
        if any(each % block.elements for each in columns):
            return self._decoded(name, cut)
        places = slice(*(each // block.elements * block.nbytes for each in columns[:2]))
        out = np.zeros((cut.num_rows, columns.size // block.elements * block.nbytes), np.uint8)
        for region, first in cut.regions():
            rows: slice | npt.NDArray[np.intp] = region.rows if stored.order is None else stored.order[region.rows]
            part = stored.data[:, places][rows]
            out[first : first + len(part), : part.shape[1]] = part
        return StoredRows(stored.type, out)

    def _decoded(self, name: str, cut: Cut) -> StoredRows:
        """Blocks that the cut goes through."""
        import torch

        values = torch.empty(cut.shape_of_share)
        self.load_into(name, values)
        return StoredRows("F32", values.numpy().view(np.uint8))

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        cut = self._cut(name)
        if cut is None:
            return self._source.floats(name, size)
        whole, out = self._source.floats(name, *cut.shape), np.zeros(cut.num_rows, np.float32)
        for region, first in cut.regions():
            part = whole[region.rows]
            out[first : first + len(part)] = part
        return out

    def load_into(self, name: str, out: torch.Tensor) -> None:
        cut = self._cut(name)
        if cut is None:
            self._source.load_into(name, out)
            return
        if cut.num_stored < cut.num_columns or any(rows.stop - rows.start < rows.size for rows in cut.rows):
            out.zero_()
        for region, first in cut.regions():
            part = out[first : first + region.rows.stop - region.rows.start]
            self._source.load_region(name, region, part if out.dim() == 1 else part[:, : cut.num_stored])

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        raise AssertionError(f"{name} is a share already")

    def close(self) -> None:
        self._source.close()

    def _cut(self, name: str) -> Cut | None:
        return self._cuts.get(split_name(name)[0])


def _rows_of(groups: Groups, ranges: tuple[Range, ...]) -> Groups:
    """Rows of codes, those of padding with scales of 0."""

    def of(values: npt.NDArray[_T]) -> npt.NDArray[_T]:
        parts = []
        for rows in ranges:
            parts.append(values[rows.start : rows.stop])
            if rows.size > rows.stop - rows.start:
                parts.append(np.zeros((rows.size - rows.stop + rows.start, *values.shape[1:]), values.dtype))
        return np.concatenate(parts)

    zeros = None if groups.zeros is None else of(groups.zeros)
    return replace(groups, codes=of(groups.codes), scales=of(groups.scales), zeros=zeros)
