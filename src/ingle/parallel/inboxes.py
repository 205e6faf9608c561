"""Memory on each GPU of a group that the kernels of all of them write to, where GPUs reach each other.

It is had by CUDA's handles of memory (`cuIpcGetMemHandle`). Before it is used, sums by way of it are compared with
NCCL's.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ingle.errors import EngineError
from ingle.kernels.group import Peers
from ingle.parallel.link import Link

HALF_BYTES = 16 << 20
_PROOF_S = 10.0
"""For a sum of the proof, whose kernels other ranks may have to compile."""
_HANDLE_BYTES = 64


class Crossover(NamedTuple):
    most_bytes: int
    """Of a tensor; with more, NCCL is as fast."""
    one_shot_bytes: int
    """That a rank sends; with more, two shots are faster."""


_CROSSOVERS = {"NVLink": Crossover(16 << 20, 1 << 20), "PCIe": Crossover(1 << 20, 192 << 10)}
"""By the link's name; by others GPUs do not reach each other. Computed, for four: one shot takes
`latency + sent / rate`, two take twice the latency and half the bytes; by NVLink 2.2 us and 250 GB/s, as measured
between two, by PCIe 4 us and 25 GB/s."""
_MOST_OF_TWO = 1 << 40
"""Between two H200s by NVLink sums with a norm are faster than NCCL's at any size: up to 16 MiB by themselves, and
those of prompts, of 57 MiB, in a run of 256 requests."""


class Hosts(Protocol):
    """The ranks' processes: an `ingle.parallel.group.TensorGroup` of CPUs."""

    @property
    def place(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_well(self, well: bool) -> bool: ...


@dataclass(frozen=True)
class Inboxes:
    """Of a group's ranks, as one of them has them."""

    peers: Peers
    _gone: torch.Tensor
    _beside: torch.cuda.Stream

    def give_up(self) -> None:
        """Ends all waiting for other ranks, now and later. Needs nothing of the GPU that a kernel could hold."""
        with torch.cuda.stream(self._beside):
            self.peers.state[2:3].copy_(self._gone, non_blocking=True)


def inboxes_of(hosts: Hosts, device: torch.device, link: Link) -> Inboxes:
    """Memory that is not proven yet. All ranks of a group do so together; raises `EngineError` on all or none, with
    the reason where that is this rank's."""
    why, memory = _unreachable(hosts, device, link), None
    if not _all_well(hosts, why):
        raise EngineError(why or _ELSEWHERE)
    try:
        memory = _Memory(device, 2 * HALF_BYTES)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    if not _all_well(hosts, why) or memory is None:
        raise EngineError(why or _ELSEWHERE)
    try:
        addresses = memory.meet(hosts)
    except Exception as error:
        addresses, why = (), f"{type(error).__name__}: {error}"
    if not _all_well(hosts, why):
        raise EngineError(why or _ELSEWHERE)
    crossover, state = _CROSSOVERS[link.name], torch.zeros(4, dtype=torch.int64, device=device)
    if link.name == "NVLink" and hosts.size == 2:
        crossover = crossover._replace(most_bytes=_MOST_OF_TWO)
    peers = Peers(hosts.place, addresses, HALF_BYTES, state, *crossover, memory)
    gone = torch.ones(1, dtype=torch.int64, pin_memory=True)
    return Inboxes(peers, gone, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


_ELSEWHERE = "it does not go on another GPU of the group"


def _all_well(hosts: Hosts, why: str) -> bool:
    return hosts.all_well(not why)


def _unreachable(hosts: Hosts, device: torch.device, link: Link) -> str:
    """Why GPUs cannot reach each other; nothing where they may."""
    machine = Path("/proc/sys/kernel/random/boot_id").read_bytes()[:36]
    kind = torch.cuda.get_device_capability(device)
    every = hosts.all_gather(torch.tensor([*machine, *kind, device.index], dtype=torch.uint8))
    if not bool((every[:, :-3] == every[0, :-3]).all()):
        return "the GPUs are of several machines"
    if not bool((every[:, -3:-1] == every[0, -3:-1]).all()):
        # Which product a GPU has for few rows of a matrix goes by its kind, and so does whether that product sends.
        return "the GPUs are of several kinds"
    if link.name not in _CROSSOVERS:
        return f"the GPUs reach each other by {link.name} alone"
    for other in every[:, -1].tolist():
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            return f"GPU {device.index} has no access to the memory of GPU {other}"
    return ""


# ---- the memory


def _driver(name: str, *arguments: object) -> None:
    result = getattr(ctypes.CDLL("libcuda.so.1"), name)(*arguments)
    if result:
        raise OSError(f"{name} fails with CUDA's error {result}")


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("bytes", ctypes.c_ubyte * _HANDLE_BYTES)]


class _Memory:
    """Not of PyTorch's allocator, whose way of sharing leaves files in /dev/shm when a process is killed."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        torch.zeros(1, device=device)  # the context is made, and this thread's
        self._own, self._handle = ctypes.c_uint64(), _Handle()
        _driver("cuMemAlloc_v2", ctypes.byref(self._own), ctypes.c_size_t(num_bytes))
        self._opened: list[ctypes.c_uint64] = []
        weakref.finalize(self, _close, device, self._own, self._opened).atexit = False
        _driver("cuMemsetD32_v2", self._own, ctypes.c_uint(Peers.NOTHING & 0xFFFFFFFF), ctypes.c_size_t(num_bytes // 4))
        torch.cuda.synchronize(device)
        _driver("cuIpcGetMemHandle", ctypes.byref(self._handle), self._own)

    def meet(self, hosts: Hosts) -> tuple[int, ...]:
        """Addresses of the memory of all ranks, by place."""
        handles = hosts.all_gather(torch.tensor(list(self._handle.bytes), dtype=torch.uint8)).tolist()
        addresses = []
        for place, handle in enumerate(handles):
            address = self._own
            if place != hosts.place:
                address = ctypes.c_uint64()
                there = _Handle((ctypes.c_ubyte * _HANDLE_BYTES)(*handle))
                _driver("cuIpcOpenMemHandle_v2", ctypes.byref(address), there, ctypes.c_uint(1))  # with peer access
                self._opened.append(address)
            addresses.append(address.value)
        return tuple(addresses)


def _close(device: torch.device, own: ctypes.c_uint64, opened: Sequence[ctypes.c_uint64]) -> None:
    torch.cuda.synchronize(device)  # and its context is this thread's
    for address in opened:
        _driver("cuIpcCloseMemHandle", address)
    _driver("cuMemFree_v2", own)


# ---- whether it works


def refuted(
    inboxes: Inboxes, hosts: Hosts, device: torch.device, by_nccl: Callable[[torch.Tensor], torch.Tensor]
) -> str:
    """Why they are not to be used: of sums in one shot and in two, all ranks get what NCCL computes. Nothing where
    they do, on every rank."""
    from ingle.kernels.gpu import sums  # Triton comes with PyTorch's CUDA builds only

    generator = torch.Generator().manual_seed(hosts.place)
    for one_shot_bytes, numel in ((1 << 30, 4096), (1 << 30, 1 << 20), (0, 4096), (0, 1 << 20)):
        peers = replace(inboxes.peers, one_shot_bytes=one_shot_bytes)
        why = ""
        try:
            x = torch.randint(-3, 4, (3, numel), generator=generator).to(device, torch.bfloat16)
            expected = by_nccl(x.clone())
            for each in x:  # by either half, and the first again
                sums.all_reduce(each, peers)
            if not _ends(device):
                inboxes.give_up()
                why = f"a sum of {2 * numel:,} bytes did not end within {_PROOF_S:.0f} s"
            elif not torch.equal(x, expected):
                why = f"a sum of {2 * numel:,} bytes was wrong"
        except Exception as error:
            inboxes.give_up()
            why = f"{type(error).__name__}: {error}"
        if not _all_well(hosts, why):
            return why or _ELSEWHERE
    return ""


def _ends(device: torch.device) -> bool:
    """What is queued, in time."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    until = time.monotonic() + _PROOF_S
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > until:
            return False
        time.sleep(1e-3)
    return True
