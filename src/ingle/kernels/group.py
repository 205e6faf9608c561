"""What ranks that share a layer do together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch


class Crossing(NamedTuple):
    """Where what crosses a border lies in a CUDA graph, which does not hold the crossing itself."""

    landing: torch.Tensor | None
    leaving: torch.Tensor | None


class Border(Protocol):
    """Where a stage of a pipeline ends and the next begins: hidden states cross it, a step after the other."""

    def receive(self, num_rows: int) -> torch.Tensor:
        """[num_rows, E] of the stage before."""
        ...

    def send(self, x: torch.Tensor) -> None:
        """To the stage behind. x is not changed before it is there."""
        ...

    def captured(self) -> Crossing:
        """Of the CUDA graph that was captured last: whoever replays it does `receive_into` before and `send` behind."""
        ...

    def receive_into(self, x: torch.Tensor) -> None:
        """`receive`, into memory that is there."""
        ...


class Group(Protocol):
    """Ranks that hold the shares of the same matrices. All of them call the same, in the same order."""

    @property
    def size(self) -> int:
        """2 or more."""
        ...

    @property
    def place(self) -> int:
        """Of this rank, in [0, size)."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same on each to the bit. x, contiguous, may be overwritten by it."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Those of all ranks, which are of one shape, in the order of places: [size, *x.shape]."""
        ...
