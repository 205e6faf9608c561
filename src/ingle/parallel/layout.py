"""How many ranks there are, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """`tensor` ranks share the matrices of a layer, `pipeline` such groups the layers."""

    tensor: int = 1
    pipeline: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline

    def place(self, rank: int) -> Place:
        """Rank 0 is in the last stage, whose results are those of all."""
        return Place(self, self.pipeline - 1 - rank // self.tensor, rank % self.tensor)

    def __str__(self) -> str:
        parts = (("TP", self.tensor), ("PP", self.pipeline))
        return " x ".join(f"{kind} {size}" for kind, size in parts if size > 1) or "1 rank"


@dataclass(frozen=True)
class Place:
    """What one rank is."""

    layout: Layout
    stage: int
    """Of the pipeline: which layers it has."""
    index: int
    """In its tensor-parallel group: which part of them."""

    @property
    def rank(self) -> int:
        return (self.layout.pipeline - 1 - self.stage) * self.layout.tensor + self.index

    @property
    def is_last(self) -> bool:
        """Whether tokens are drawn here."""
        return self.stage == self.layout.pipeline - 1
