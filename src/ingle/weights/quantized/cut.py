"""Slices of matrices of codes, as tensor parallelism takes them: by outputs, and by inputs.

By outputs any range will do (`Groups.rows`). By inputs a rank has columns of its own and multiplies them with its own
inputs, whatever order they are stored in: nothing of another rank's is needed but the sum of the products.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ingle.weights.quantized.groups import MIDDLE, Bytes, Groups

_Indices = npt.NDArray[np.intp]
_SIZES = (128, 64, 32, 16)
_SCALE_BYTES = 3
"""About, of a scale and what may belong to it."""


def by_columns(groups: Groups, start: int, stop: int) -> Groups:
    """Of the inputs from `start` to `stop` alone; input `start` is input 0 of the result.

    Where they begin amid a group, the result's groups are smaller. Of columns sorted by group (act-order) each group
    has some of these inputs: its columns are filled up with zeros to whole groups of one size, and the result's `order`
    says which of these inputs each column is multiplied with.
    Raises `ValueError` for codes that share a byte with others.
    """
    if not 0 <= start < stop <= groups.num_inputs:
        raise ValueError(f"inputs {start} to {stop} are no range of {groups.num_inputs}")
    if groups.order is not None:
        return _of_sorted(groups, groups.order, start, stop)
    per_byte = 2 if groups.kind == "int4" else 1
    if start % per_byte or stop % per_byte:
        raise ValueError(f"columns {start} to {stop} cut a byte of two codes")
    size = math.gcd(groups.group_size, start)
    of_group = np.arange(start, stop, size) // groups.group_size
    return replace(
        groups,
        codes=groups.codes[:, start // per_byte : stop // per_byte],
        scales=groups.scales[:, of_group],
        zeros=None if groups.zeros is None else groups.zeros[:, of_group],
        group_size=size,
    )


def _of_sorted(groups: Groups, order: npt.NDArray[np.int32], start: int, stop: int) -> Groups:
    columns = np.flatnonzero((order >= start) & (order < stop))
    if groups.padded_from is not None:  # those that fill up are left out
        columns = np.sort(columns[np.unique(order[columns], return_index=True)[1]])
    counts = np.bincount(columns // groups.group_size, minlength=groups.scales.shape[1])
    size = _best_size(counts, groups)
    repeats = -(-counts // size)  # groups of the result that each group becomes
    of_group = np.repeat(np.arange(len(counts)), repeats)
    places = _places(counts, size)
    codes = _codes_at(groups, columns, places, of_group.repeat(size))
    firsts = np.maximum.accumulate(np.where(places >= 0, places, 0))  # what fills up names an input that was named
    return replace(
        groups,
        codes=codes,
        scales=groups.scales[:, of_group],
        zeros=None if groups.zeros is None else groups.zeros[:, of_group],
        group_size=size,
        order=(order[columns] - np.int32(start))[firsts],
        padded_from=stop - start,
    )


def _best_size(counts: _Indices, groups: Groups) -> int:
    """That which takes the least memory."""
    per_column = 0.5 if groups.kind == "int4" else 1.0

    def num_bytes(size: int) -> float:
        return float((-(-counts // size)).sum()) * (size * per_column + _SCALE_BYTES)

    return min((size for size in _SIZES if size <= max(groups.group_size, _SIZES[-1])), key=num_bytes)


def _places(counts: _Indices, size: int) -> _Indices:
    """Of each column of the result: which of the chosen ones it is, -1 for one that fills up."""
    widths = -(-counts // size) * size
    places = np.full(widths.sum(), -1)
    starts = np.cumsum(widths) - widths
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    places[np.repeat(starts, counts) + within] = np.arange(counts.sum())
    return places


def _codes_at(groups: Groups, columns: _Indices, places: _Indices, of_group: _Indices) -> Bytes:
    """Those of the chosen columns at their places, and zeros' codes at the others, packed as `Groups` has them."""
    of_column = columns[np.maximum(places, 0)]
    if groups.kind == "int4":
        shifts = (of_column % 2 * 4).astype(np.uint8)
        codes = groups.codes[:, of_column // 2] >> shifts & np.uint8(15)
    else:
        codes = groups.codes[:, of_column]
    filling = np.flatnonzero(places < 0)
    codes[:, filling] = MIDDLE.get(groups.kind, 0) if groups.zeros is None else groups.zeros[:, of_group[filling]]
    return codes[:, ::2] | codes[:, 1::2] << np.uint8(4) if groups.kind == "int4" else codes
