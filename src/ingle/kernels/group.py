"""What ranks that share a layer do together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

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

    def held(self) -> AbstractContextManager[None]:
        """Within, nothing crosses: what is received is empty memory, zeros where it is read at once; what is sent is
        kept. So each rank captures CUDA graphs by itself."""
        ...

    def captured(self) -> Crossing:
        """What was `held` last: whoever replays that graph does `receive_into` before and `send` behind."""
        ...

    def receive_into(self, x: torch.Tensor) -> None:
        """`receive`, into memory that is there."""
        ...


@dataclass(frozen=True)
class Peers:
    """Memory on the GPUs of a group that the kernels of all of them write to: see `ingle.kernels.gpu.sums`."""

    place: int
    inboxes: tuple[int, ...]
    """By place, where each rank's begins, as this process sees it: `2 * half_bytes`, all of them `NOTHING`."""
    half_bytes: int
    state: torch.Tensor
    """int64 [4] of this rank: the half that the next sum takes; programs of this one that know it; whether to wait for
    nobody any more; whether somebody did not come."""
    most_bytes: int
    """Of a tensor that they add up; what is larger NCCL does."""
    one_shot_bytes: int
    """That a rank sends in one shot."""
    memory: object
    """Which holds it all."""

    NOTHING = -0x7FFF8000
    """int32"""

    def takes(self, num_bytes: int) -> bool:
        return 0 < num_bytes <= self.most_bytes

    def in_one_shot(self, num_bytes: int) -> bool:
        """Between two, two shots would send as much."""
        return len(self.inboxes) == 2 or num_bytes * (len(self.inboxes) - 1) <= self.one_shot_bytes


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

    @property
    def peers(self) -> Peers | None:
        """Where the ranks' own kernels add up what is small enough for that to pay, with what stands behind a sum."""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, the same on each to the bit. x, contiguous, may be overwritten by it."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Those of all ranks, which are of one shape, in the order of places: [size, *x.shape]."""
        ...


@dataclass(frozen=True)
class LogitsShare:
    """The logits of a rank's part of the vocabulary: parts are of one width, and behind the last there is padding."""

    logits: torch.Tensor
    """[R, width]"""
    group: Group
    vocab_size: int
    """Of all parts."""

    def own(self) -> torch.Tensor:
        """Those that stand for tokens, contiguous."""
        width = self.logits.shape[1]
        return self.logits[:, : max(min(width, self.vocab_size - self.group.place * width), 0)].contiguous()

    def whole(self) -> torch.Tensor:
        """[R, vocab_size] of all ranks."""
        gathered = self.group.all_gather(self.logits).transpose(0, 1).reshape(len(self.logits), -1)
        return gathered[:, : self.vocab_size].contiguous()
