"""A checkpoint of floats whose matrices are rounded as they are asked for: a source that gives those as `Groups`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ingle.kernels.cpu import library
from ingle.weights.quantized.groups import Groups
from ingle.weights.quantized.rounding import Loss, Rounded, RoundRows, ScaleType, round_matrix, round_natively
from ingle.weights.quantized.scheme import Scheme
from ingle.weights.source import FLOATS, Region, StoredRows, WeightSource, check_size

if TYPE_CHECKING:
    import torch

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class RoundingPlan:
    """What of a model is rounded, and to what."""

    scheme: Scheme
    scale_type: ScaleType
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    """Rows and columns of each matrix that is, by its name."""
    notices: tuple[str, ...] = ()

    @property
    def num_rounded(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())


class RoundingSource:
    """`source`, but for the matrices of a plan, one at a time: nothing of them is kept."""

    def __init__(self, source: WeightSource, plan: RoundingPlan, device: torch.device | None = None) -> None:
        """`device`: PyTorch rounds there; None has the CPU's kernels do it, or PyTorch where they are not started."""
        self.source, self.plan, self._device = source, plan, device
        self.loss = Loss()
        """Of all matrices so far, each time that it was asked for."""
        self.watch: Callable[[str, Loss], None] = lambda name, loss: None
        """Is told of each matrix."""
        self._adding = Lock()

    def on(self, device: torch.device) -> RoundingSource:
        """The same, rounded there."""
        return RoundingSource(self.source, self.plan, device)

    def __contains__(self, name: str) -> bool:
        return name in self.source

    @property
    def names(self) -> Collection[str]:
        return self.source.names

    @property
    def stored_types(self) -> dict[str, int]:
        """As it is given. Of made-up weights no more is known than what is rounded."""
        left = self.plan.num_rounded
        counts: Counter[str] = Counter({self.plan.scheme.kind: left})
        for kind, count in self.source.stored_types.items():
            counts[kind] += max(count - left, 0)
            left = max(left - count, 0)
        return {kind: count for kind, count in counts.most_common() if count}

    def alike(self, name: str, other: str) -> bool:
        return not (self.is_coded(name) or self.is_coded(other)) and self.source.alike(name, other)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self.source.shape(name)

    def check(self, name: str, num_elements: int) -> None:
        self.source.check(name, num_elements)

    def is_coded(self, name: str) -> bool:
        return name in self.plan.shapes

    def groups(self, name: str, num_rows: int, num_columns: int) -> Groups:
        check_size(self.source.shape(name), name, num_rows * num_columns)
        by_torch = self._device is not None or not library.started()
        round_rows = (self._by_torch if by_torch else self._natively)(name, num_rows, num_columns)
        plan = self.plan
        groups, loss = round_matrix(name, num_rows, num_columns, plan.scheme, plan.scale_type, round_rows)
        with self._adding:
            self.loss += loss
            self.watch(name, loss)
        return groups

    def _natively(self, name: str, num_rows: int, num_columns: int) -> RoundRows:
        stored = self.source.stored_rows(name, num_rows, num_columns)

        def rounded(start: int, stop: int) -> Rounded:
            rows = stored.data[start:stop] if stored.order is None else stored.data[stored.order[start:stop]]
            return round_natively(FLOATS[stored.type](rows), self.plan.scheme, self.plan.scale_type)

        return rounded

    def _by_torch(self, name: str, num_rows: int, num_columns: int) -> RoundRows:
        import torch

        from ingle.weights.quantized.rounding_torch import round_by_torch

        device = self._device or torch.device("cpu")
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}[self._type()]
        values = torch.empty(num_rows, num_columns, dtype=dtype, device=device)
        self.source.load_into(name, values)

        def rounded(start: int, stop: int) -> Rounded:
            return round_by_torch(values[start:stop], self.plan.scheme, self.plan.scale_type)

        return rounded

    def _type(self) -> str:
        """That holds what is stored without loss."""
        kinds = self.source.stored_types or {"BF16": 1}
        return next(iter(kinds)) if len(kinds) == 1 and next(iter(kinds)) in ("F16", "BF16") else "F32"

    def stored_rows(self, name: str, num_rows: int, num_columns: int) -> StoredRows:
        return self.source.stored_rows(name, num_rows, num_columns)

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        return self.source.floats(name, size)

    def load_region(self, name: str, region: Region, out: torch.Tensor) -> None:
        if not self.is_coded(name):
            self.source.load_region(name, region, out)
            return
        import torch

        groups = self.groups(name, *region.shape).rows(region.rows.start, region.rows.stop)
        out.copy_(torch.from_numpy(groups.decoded()[:, region.columns]))

    def columns_unit(self, name: str) -> int:
        return self.plan.scheme.group_size or 2 if self.is_coded(name) else self.source.columns_unit(name)

    def load_into(self, name: str, out: torch.Tensor) -> None:
        if not self.is_coded(name):
            self.source.load_into(name, out)
            return
        import torch

        rows = out.view(-1, out.shape[-1])
        groups = self.groups(name, *rows.shape)
        for start in range(0, len(rows), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(rows))
            rows[start:stop].copy_(torch.from_numpy(groups.rows(start, stop).decoded()))

    def close(self) -> None:
        self.source.close()
