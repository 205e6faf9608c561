"""What ranks compute together: sums and gathers of tensors by NCCL between GPUs and by Gloo between CPUs, and
agreements of the hosts by Gloo.

Process groups are made by themselves, beside whatever else this process does with torch.distributed. They find each
other through a file that has no name, and listen on this machine alone; where ranks are on several, through a store of
PyTorch's that rank 0 has, and each listens where the others reach it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch._C import _distributed_c10d as c10d
from torch.autograd.profiler import record_function

from ingle.errors import EngineError, lack_of_memory
from ingle.kernels.group import Crossing, Peers
from ingle.parallel.beside import call_beside
from ingle.parallel.hosts import Meeting
from ingle.parallel.inboxes import Inboxes, inboxes_of, refuted
from ingle.parallel.interfaces import interface_of
from ingle.parallel.layout import Place
from ingle.parallel.link import Link, link_between
from ingle.parallel.messages import Backend

T = TypeVar("T")

JOIN_S = 30.0
"""For ranks to find each other, and to add up their first numbers."""
_REACH_S = 60.0
"""For the proof of kernels of their own, which are compiled where they are new to a machine."""
_STEP = timedelta(days=1)
"""For a collective of a step: who does not come is found out by the team (`ingle.parallel.team`)."""
_LOCAL = "127.0.0.1"


class _Work(Protocol):
    def wait(self) -> object: ...


class _Ranks(Protocol):
    """What PyTorch's stubs do not say of its process groups."""

    def allreduce(self, tensors: list[torch.Tensor], options: c10d.AllreduceOptions) -> _Work | None: ...

    def allgather(
        self, outs: list[list[torch.Tensor]], tensors: list[torch.Tensor], options: c10d.AllgatherOptions
    ) -> _Work | None: ...

    def _allgather_base(self, out: torch.Tensor, x: torch.Tensor, options: c10d.AllgatherOptions) -> _Work | None: ...

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> _Work: ...

    def broadcast(self, tensors: list[torch.Tensor], options: c10d.BroadcastOptions) -> _Work | None: ...

    def abort(self) -> None: ...


class TensorGroup:
    """An `ingle.kernels.group.Group` of a process group."""

    def __init__(self, ranks: _Ranks, place: int, size: int, backend: Backend) -> None:
        self.place, self.size = place, size
        self._ranks, self._backend = ranks, backend
        self._inboxes: Inboxes | None = None
        self.why_by_nccl = "kernels of their own were not asked for"
        self.connections: list[socket.socket] = []
        """With other hosts."""
        self._reduce, self._gather = c10d.AllreduceOptions(), c10d.AllgatherOptions()
        # On the current stream: what is queued behind finds the sum, and nothing else waits.
        self._hand_on = c10d.BroadcastOptions()
        self._reduce.asyncOp = self._gather.asyncOp = self._hand_on.asyncOp = False

    def reach(self, device: torch.device, hosts: TensorGroup, link: Link) -> None:
        """Takes kernels of its own for small sums, where all GPUs of the group reach each other."""
        try:
            inboxes = inboxes_of(hosts, device, link)
            self.why_by_nccl = refuted(inboxes, hosts, device, self.sum_by_backend)
        except EngineError as error:
            self.why_by_nccl = str(error)
        if not self.why_by_nccl:
            self._inboxes = inboxes
        elif self.place == 0:
            why = " ".join(self.why_by_nccl.split())
            logging.getLogger("ingle").warning("GPUs add up by NCCL, and not by kernels of ingle: %s", why)

    @property
    def peers(self) -> Peers | None:
        return None if self._inboxes is None else self._inboxes.peers

    def all_well(self, well: bool) -> bool:
        """Whether it is so on every rank."""
        return bool(self.all_gather(torch.tensor([well])).all())

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._inboxes is not None:
            from ingle.kernels.gpu import sums  # Triton comes with PyTorch's CUDA builds only

            if sums.suits(x, self._inboxes.peers):
                return sums.all_reduce(x, self._inboxes.peers)
        return self.sum_by_backend(x)

    def sum_by_backend(self, x: torch.Tensor) -> torch.Tensor:
        """`all_reduce`, by NCCL or Gloo."""
        if self._backend == "gloo" and x.is_cuda:
            return x.copy_(self.sum_by_backend(x.cpu()))
        with self._profiled("sum"):
            _finish(self._ranks.allreduce([x], self._reduce))
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if self._backend == "gloo" and x.is_cuda:
            return self.all_gather(x.cpu()).to(x.device)
        out = x.new_empty(self.size, *x.shape)
        if self._backend == "nccl":
            _finish(self._ranks._allgather_base(out, x.contiguous(), self._gather))
        else:
            with self._profiled("gather"):
                _finish(self._ranks.allgather([list(out.unbind())], [x.contiguous()], self._gather))
        return out

    def hand_on(self, x: torch.Tensor) -> None:
        """What the first of them has in x, to all."""
        _finish(self._ranks.broadcast([x], self._hand_on))

    def send(self, x: torch.Tensor, place: int) -> _Work:
        return self._ranks.send([x], place, 0)

    def recv(self, x: torch.Tensor, place: int) -> None:
        with self._profiled("wait for the stage before"):
            self._ranks.recv([x], place, 0).wait()

    def _profiled(self, what: str) -> AbstractContextManager[object]:
        """What the host does, a profiler would not see: GPUs have kernels with names."""
        by_host = self._backend == "gloo" and torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
        return record_function(f"ranks: {what}") if by_host else contextlib.nullcontext()

    @property
    def on_devices(self) -> bool:
        """Whether nothing of it is done by the host."""
        return self._backend == "nccl"

    def abort(self) -> None:
        """Ends what waits for ranks that are gone."""
        if self._inboxes is not None:
            self._inboxes.give_up()
        self._ranks.abort()
        for connection in self.connections:  # Gloo's `abort` ends nothing, and a host that is gone does not hang up
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _finish(work: _Work | None) -> None:
    """Of what is queued on the current stream there may be nothing to wait for."""
    if work is not None:
        work.wait()


class Neighbours(NamedTuple):
    """On GPUs, a group of two for each border: of this stage and the one before, and of it and the one behind.

    What crosses is a broadcast within two, on the stream of the steps, as their sums are. Sends of NCCL's, which have
    streams of their own and connect two ranks when these first need it, were seen to hang.
    """

    before: TensorGroup | None
    behind: TensorGroup | None

    def meet(self, device: torch.device) -> None:
        """NCCL makes ready for what two ranks exchange when they first do: better before steps depend on it."""
        x = torch.zeros(1, device=device)
        for group in self:
            if group is not None:
                group.hand_on(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class StageBorder:
    """An `ingle.kernels.group.Border`, among ranks of which each is a stage."""

    def __init__(
        self,
        ranks: TensorGroup,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`neighbours`: where nothing goes by way of the host."""
        self._ranks, self._hidden_size, self._dtype, self._device = ranks, hidden_size, dtype, device
        self._neighbours = neighbours
        self._sent: tuple[_Work, torch.Tensor] | None = None
        """Which may still be on its way."""
        self._is_held = False
        self._landing: torch.Tensor | None = None
        self._leaving: torch.Tensor | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    def captured(self) -> Crossing:
        crossing, self._landing, self._leaving = Crossing(self._landing, self._leaving), None, None
        return crossing

    def receive(self, num_rows: int) -> torch.Tensor:
        through = torch.device("cpu") if self._neighbours is None else self._device
        x = torch.empty(num_rows, self._hidden_size, dtype=self._dtype, device=through)
        if not self._is_held:
            self.receive_into(x)
        elif not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # whose zeros would be in the graph
            x.zero_()
        self._landing = x if self._is_held else None
        return x.to(self._device)

    def receive_into(self, x: torch.Tensor) -> None:
        if self._neighbours is None:
            self._ranks.recv(x, self._ranks.place - 1)
        else:
            assert self._neighbours.before is not None, "the first stage receives nothing"
            self._neighbours.before.hand_on(x)

    def send(self, x: torch.Tensor) -> None:
        assert x.dtype == self._dtype, "the stage behind takes it for what it is not"
        if self._is_held:
            self._leaving = x
        elif self._neighbours is not None:
            assert self._neighbours.behind is not None, "the last stage sends nothing"
            self._neighbours.behind.hand_on(x.contiguous())
        else:
            if self._sent is not None:
                self._sent[0].wait()
            x = x.cpu().contiguous()
            self._sent = self._ranks.send(x, self._ranks.place + 1), x


@dataclass(frozen=True)
class Member:
    """What this process is among the ranks, and what it computes with them."""

    place: Place
    device: torch.device
    group: TensorGroup | None
    """Those that share its layers; None where it has them alone."""
    hosts: TensorGroup
    """All of them, for numbers on the host."""
    link: Link
    stages: TensorGroup | None = None
    """Those that have the same part of other layers; None where there is one stage."""
    stage_hosts: TensorGroup | None = None
    """Those of `group`, as `hosts`; None where they are all."""
    neighbours: Neighbours | None = None
    """Of `stages`, on GPUs."""
    num_here: int | None = None
    """Ranks on this machine, where others are elsewhere."""
    capability: tuple[int, int] | None = None
    """Of the oldest GPU among all of them: all compute in types, and by kernels, that it has too."""

    @property
    def num_beside(self) -> int:
        """Ranks that share this machine, this one among them."""
        return self.place.layout.num_ranks if self.num_here is None else self.num_here

    def least(self, *numbers: int) -> tuple[int, ...]:
        """Of each number the least that any rank has."""
        least = self.hosts.all_gather(torch.tensor(numbers, dtype=torch.int64)).amin(0)
        return tuple(map(int, least.tolist()))

    def all_agree(self, well: bool, *, in_stage: bool) -> bool:
        """Whether it went well on every rank, or on those of this stage, where others do no such thing."""
        hosts: TensorGroup | None = self.hosts
        if in_stage and self.stages is not None:
            hosts = self.stage_hosts
        return well if hosts is None else hosts.all_well(well)

    def border(self, hidden_size: int, dtype: torch.dtype) -> StageBorder | None:
        """To the stages before and behind this one, for hidden states of that size and type."""
        if self.stages is None:
            return None
        return StageBorder(self.stages, hidden_size, dtype, self.device, self.neighbours)

    def abort(self) -> None:
        """Those of GPUs at once, where there are several: NCCL frees one's memory when the GPU is idle, which another's
        waiting may keep it from."""
        every = dict.fromkeys((self.group, self.hosts, self.stages, self.stage_hosts, *(self.neighbours or ())))
        groups = [group for group in every if group is not None]
        beside = [group for group in groups if group.on_devices]
        if len(beside) > 1:
            call_beside(group.abort for group in beside)
        for group in groups:
            if len(beside) < 2 or not group.on_devices:
                group.abort()


def join(
    place: Place,
    device: torch.device,
    backend: Backend,
    meeting: Meeting,
    *,
    own_kernels: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Member:
    """Waits until all ranks are there, each of which has the same of `meeting`, and does something else `meanwhile`.
    `own_kernels`: add up what is small, where GPUs reach each other.

    Raises `EngineError` where they do not find each other, or cannot compute together.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    size = place.layout.num_ranks
    address = meeting.hosts[place.rank] if meeting.hosts else _LOCAL
    if meeting.hosts and backend == "nccl" and (interface := interface_of(address)) is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")

    def meet() -> Member:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which is a thread's own
        layout, store = place.layout, _store(meeting, size)

        def among(name: str, rank: int, count: int, by: Backend) -> TensorGroup | None:
            if count == 1:
                return None
            before = _sockets() if meeting.hosts else set()
            ranks = _nccl(store, name, rank, count) if by == "nccl" else _gloo(store, name, rank, count, address)
            group = TensorGroup(ranks, rank, count, by)
            if meeting.hosts and by == "gloo":
                group.connections = list(_with_peers(_sockets() - before))
            return group

        hosts = among("hosts", place.rank, size, "gloo")
        group = among(f"stage {place.stage}", place.index, layout.tensor, backend)
        stages = among(f"part {place.index}", place.stage, layout.pipeline, backend)
        stage_hosts = None
        if stages is not None:
            stage_hosts = among(f"hosts of stage {place.stage}", place.index, layout.tensor, "gloo")
        assert hosts is not None, "there are several ranks"
        link = link_between(group or stages or hosts, device, backend, num_hosts=max(len(set(meeting.hosts)), 1))
        neighbours = None
        if stages is not None and stages.on_devices:

            def at(border: int) -> TensorGroup | None:
                if not 0 <= border < layout.pipeline - 1:
                    return None
                if layout.pipeline == 2:
                    return stages
                return among(f"part {place.index}, border {border}", place.stage - border, 2, backend)

            neighbours = Neighbours(at(place.stage - 1), at(place.stage))
            neighbours.meet(device)
        num_here = meeting.hosts.count(address) or None
        member = Member(place, device, group, hosts, link, stages, stage_hosts, neighbours, num_here)
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            (oldest,) = member.least(100 * major + minor)
            member = replace(member, capability=divmod(oldest, 100))
        return member

    member = _within(JOIN_S, meet, backend, between_hosts=bool(meeting.hosts), meanwhile=meanwhile)
    if own_kernels and member.group is not None and member.group.on_devices:
        reach = partial(_reach, member.group, device, member.stage_hosts or member.hosts, member.link)
        _within(_REACH_S, reach, backend)
    return member


def _reach(group: TensorGroup, device: torch.device, hosts: TensorGroup, link: Link) -> None:
    torch.cuda.set_device(device)  # which is a thread's own
    group.reach(device, hosts, link)


def _sockets() -> set[int]:
    """Descriptors of this process that are sockets."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself is gone
            if str(entry.readlink()).startswith("socket:"):
                found.add(int(entry.name))
    return found


def _with_peers(descriptors: set[int]) -> Iterator[socket.socket]:
    """Of each that is a connection, another descriptor."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            connection = socket.socket(fileno=os.dup(descriptor))
            connection.getpeername()
            yield connection


def _store(meeting: Meeting, size: int) -> c10d.Store:
    store: c10d.Store
    if not meeting.hosts:
        # A descriptor that is never closed: the store opens the file by it again when it ends, whenever that is.
        store = c10d.FileStore(f"/proc/self/fd/{os.dup(meeting.file)}", size)
    else:  # which knows no secret: what listens does so at this one address
        store = c10d.TCPStore(
            meeting.hosts[0],
            meeting.port,
            is_master=meeting.listener >= 0,
            timeout=timedelta(seconds=JOIN_S),
            wait_for_workers=False,
            master_listen_fd=meeting.listener if meeting.listener >= 0 else None,
        )
    store.set_timeout(timedelta(seconds=JOIN_S))
    return store


def _gloo(store: c10d.Store, name: str, rank: int, size: int, address: str = _LOCAL) -> _Ranks:
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0] if address != _LOCAL else ""
    where = {"interface": interface} if interface else {"hostname": address}
    options._devices = [c10d.ProcessGroupGloo.create_device(**where)]
    options._timeout, options._threads = _STEP, 1
    return c10d.ProcessGroupGloo(c10d.PrefixStore(name, store), rank, size, options)  # type: ignore[return-value]


def _nccl(store: c10d.Store, name: str, rank: int, size: int) -> _Ranks:
    options = c10d.ProcessGroupNCCL.Options()
    options._timeout = _STEP
    return c10d.ProcessGroupNCCL(c10d.PrefixStore(name, store), rank, size, options)  # type: ignore[return-value]


def _within(
    seconds: float,
    do: Callable[[], T],
    backend: Backend,
    *,
    between_hosts: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> T:
    """What is done in a thread, for it may never end."""
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(do())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="joining ranks", daemon=True)
    thread.start()
    until_s = time.monotonic() + seconds
    meanwhile()
    thread.join(max(until_s - time.monotonic(), 0))
    if done:
        return done[0]
    lack = lack_of_memory(failed[0]) if failed else None
    if lack is not None:
        raise lack
    what = f"{type(failed[0]).__name__}: {failed[0]}" if failed else f"no answer within {seconds:.0f} s"
    advice = ""
    if backend == "nccl":
        advice = (
            "; NCCL_DEBUG=INFO says more, and NCCL_P2P_DISABLE=1 goes without direct copies between GPUs, which the "
            "settings of some boards (IOMMU, ACS) break"
        )
    if between_hosts:
        advice += (
            "; the hosts have to reach each other at every port above 1023, and GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME name the interface of each by which they do"
        )
    raise EngineError(f"the ranks cannot compute together by {backend}: {' '.join(what.split())}{advice}")
