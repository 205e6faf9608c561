"""Sums by kernels that read the other GPUs' memory, where GPUs reach each other: PyTorch's symmetric memory.

A small sum takes about as long as its two meetings. Multicast is never asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._C import _distributed_c10d as c10d

ENABLED = False
"""Not before it is known why the GPUs on which this was tried did not come to it."""
_BUFFER_BYTES = 8 << 20
_ALIGNED = 16
_TYPES = (torch.bfloat16, torch.float32)
_TRIED_BYTES = (8 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
_REPEATS = 20
os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")

Sum = Callable[[torch.Tensor], torch.Tensor]
"""As `ingle.kernels.group.Group.all_reduce`."""


_met = False


def met_before() -> bool:
    """Whether this process has met others so already. Then it does not again."""
    return _met


class SymmetricMemory:
    """A buffer on each GPU that the kernels of all of them read."""

    def __init__(self, store: c10d.Store, place: int, size: int, device: torch.device) -> None:
        """Raises what PyTorch raises where it cannot be had. All ranks of a group do so together, and each for the
        first time: PyTorch counts meetings by process."""
        global _met
        _met, self._name = True, "ingle"
        c10d._SymmetricMemory.set_group_info(self._name, place, size, store)
        self._buffer = c10d._SymmetricMemory.empty_strided_p2p((_BUFFER_BYTES,), (1,), torch.uint8, device)
        c10d._SymmetricMemory.rendezvous(self._buffer, self._name)

    def takes(self, x: torch.Tensor) -> bool:
        num_bytes, offset = x.numel() * x.itemsize, x.storage_offset() * x.itemsize
        aligned = num_bytes % _ALIGNED == 0 and offset % _ALIGNED == 0
        return x.dtype in _TYPES and 0 < num_bytes <= _BUFFER_BYTES and aligned and x.is_contiguous()

    def one_shot(self, x: torch.Tensor) -> torch.Tensor:
        """Each GPU reads all of every other's."""
        sums: torch.Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(self._like(x), x, "sum", self._name)
        return sums

    def two_shot(self, x: torch.Tensor) -> torch.Tensor:
        """Each GPU adds up its share and reads the others' sums. In groups of 2, 4 or 8."""
        held = self._like(x)
        held.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_out(held, "sum", self._name, x)
        return x

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        return self._buffer[: x.numel() * x.itemsize].view(x.dtype).view(x.shape)


@dataclass(frozen=True)
class Choice:
    """Up to how many bytes which kernel sums; what is larger NCCL does."""

    one_shot_bytes: int = 0
    two_shot_bytes: int = 0
    microseconds: tuple[tuple[int, float, float, float], ...] = ()
    """As measured: bytes, and what one shot, two shots and NCCL take."""
    why_not: str = ""
    """Where nothing was measured."""


def measure(memory: SymmetricMemory, by_nccl: Sum, size: int, device: torch.device) -> Choice:
    """Within CUDA graphs, as steps are computed. All ranks of a group do so together, and each finds something else."""
    rows: list[tuple[int, float, float, float]] = []
    for num_bytes in _TRIED_BYTES:
        x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device=device)
        ways = [memory.one_shot, memory.two_shot if size in (2, 4, 8) else memory.one_shot, by_nccl]
        one, two, nccl = (_in_graph(way, x) for way in ways)
        rows.append((num_bytes, one, two, nccl))
    one_shot = max((row[0] for row in rows if row[1] <= min(row[2:])), default=0)
    two_shot = max((row[0] for row in rows if row[2] < row[3]), default=0)
    return Choice(one_shot, max(one_shot, two_shot), tuple(rows))


def _in_graph(way: Sum, x: torch.Tensor) -> float:
    """Microseconds of one sum."""
    way(x)
    torch.cuda.synchronize(x.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_REPEATS):
            way(x)
    taken = []
    for _ in range(4):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(float(begun.elapsed_time(ended)) * 1e3 / _REPEATS)
    graph.reset()
    return min(taken)
