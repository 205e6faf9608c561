"""By what ranks reach each other, and how fast: measured before anything is loaded."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from ingle.kernels.group import Group
from ingle.parallel.messages import Backend

_SMALL_BYTES = 8 << 10
_LARGE_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
_NVLINK_GBS = 70.0
"""More than PCIe of any present version carries in one direction."""


@dataclass(frozen=True)
class Link:
    name: str
    small_us: float
    """That a sum of 8 KiB takes."""
    large_gbs: float
    """GB/s that each rank sends in a sum of a large tensor."""

    def __str__(self) -> str:
        return f"{self.name}: 8 KiB in {self.small_us:.0f} us, {self.large_gbs:.1f} GB/s"


def link_between(group: Group, device: torch.device, backend: Backend, *, num_hosts: int = 1) -> Link:
    """Raises what the sums raise, and `ValueError` where they are wrong."""
    small = torch.ones(_SMALL_BYTES // 4, device=device)
    _seconds(group, small, 2)
    if not bool((small == group.size**2).all()):
        raise ValueError(f"{group.size} ranks of 1 each do not add up")
    small_s = _seconds(group, torch.zeros_like(small), 10)
    large = torch.zeros(_LARGE_BYTES[device.type] // 4, device=device)
    large_s = _seconds(group, large, 3)
    sent = 2 * (group.size - 1) / group.size * large.numel() * large.itemsize
    rate = sent / large_s / 1e9
    name = _name(device, backend, rate) if num_hosts == 1 else f"the network between {num_hosts} hosts"
    return Link(name, small_s * 1e6, rate)


def _seconds(group: Group, x: torch.Tensor, times: int) -> float:
    """The median."""
    taken = []
    for _ in range(times):
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        begun = time.perf_counter()
        group.all_reduce(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def _name(device: torch.device, backend: Backend, rate: float) -> str:
    if backend == "gloo":
        return "TCP on this machine"
    if rate > _NVLINK_GBS:
        return "NVLink"
    others = [index for index in range(torch.cuda.device_count()) if index != device.index]
    direct = all(torch.cuda.can_device_access_peer(device, other) for other in others)
    return "PCIe" if direct else "PCIe by way of the host's memory"
