"""How matrices of weights come from what a source stores: which format each of them is held in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch

from ingle.kernels.coded import Coded
from ingle.weights import coded_experts, gguf_coded
from ingle.weights.coded_part import CodedPart, kind_of
from ingle.weights.experts import Experts, StackedExperts
from ingle.weights.matrix import Part, Weight
from ingle.weights.source import ExpertNames, WeightSource, check_sizes


class WeightFormat(Protocol):
    """Says of each matrix of a model in what format its parts are held: one instance loads them all."""

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        """The tensors `names`, of `num_rows` rows each, one below the other in a single matrix.

        Raises `ModelError` for tensors that are missing or misshapen.
        """
        ...

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> Experts:
        """The experts of a layer, in order. Raises as `load` does."""
        ...


@dataclass(frozen=True)
class PlainFormat:
    """Holds codes with scales as they are stored, and decodes whatever else the source stores to `dtype`."""

    dtype: torch.dtype
    device: torch.device
    keeps_blocks: bool = False
    """Holds GGUF's blocks as they are stored, too: of a source of such a file."""

    def load(self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int) -> Weight:
        check_sizes(source, names, [rows * in_features for rows in num_rows])
        if any(source.is_coded(name) for name in names):
            return self._load_coded(source, names, num_rows, in_features)
        if self.keeps_blocks:
            return self._load_blocks(source, names, num_rows, in_features)
        return self._load_plain(source, names, num_rows, in_features)

    def _load_plain(
        self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int
    ) -> Weight:
        out = torch.empty(sum(num_rows), in_features, dtype=self.dtype, device=self.device)
        for name, part in zip(names, out.split_with_sizes(list(num_rows)), strict=True):
            source.load_into(name, part)
        return Weight.of(out)

    def load_experts(
        self, source: WeightSource, names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int
    ) -> Experts:
        sizes = hidden_size, intermediate_size, self.dtype, self.device
        if any(source.is_coded(name) for expert in names for name in (*expert.gate_up, expert.down)):
            return coded_experts.load_groups(source, names, *sizes)
        if self.keeps_blocks:
            coded = coded_experts.load_blocks(source, names, *sizes)
            if coded is not None:
                return coded
        return StackedExperts.load(source, names, *sizes)

    def _load_coded(
        self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int
    ) -> Weight:
        """A part for each run of layers that are stored alike."""
        parts: list[Part] = []
        stored = {
            name: source.groups(name, rows, in_features)
            for name, rows in zip(names, num_rows, strict=True)
            if source.is_coded(name)
        }
        kinds = {name: kind_of(groups) for name, groups in stored.items()}
        for _, run in groupby(zip(names, num_rows, strict=True), lambda each: kinds.get(each[0])):
            alike = dict(run)
            if alike.keys() <= stored.keys():
                parts.append(CodedPart.of([stored[name] for name in alike], self.dtype, self.device))
            else:
                parts += self._load_plain(source, list(alike), list(alike.values()), in_features).parts
        return Weight(tuple(parts))

    def _load_blocks(
        self, source: WeightSource, names: Sequence[str], num_rows: Sequence[int], in_features: int
    ) -> Weight:
        """A part for each run of matrices that are stored in one type."""
        parts: list[Part] = []
        stored = [source.stored_rows(name, rows, in_features) for name, rows in zip(names, num_rows, strict=True)]
        for kind, run in groupby(range(len(names)), lambda index: stored[index].type):
            alike = list(run)
            if kind in gguf_coded.TYPES:
                coded = [gguf_coded.coded_of(stored[index], self.device) for index in alike]
                parts.append(CodedPart(Coded.joined(coded), self.dtype))
                continue
            of_floats = [names[index] for index in alike], [num_rows[index] for index in alike]
            parts += self._load_plain(source, *of_floats, in_features).parts
        return Weight(tuple(parts))
