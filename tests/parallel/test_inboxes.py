"""Whether GPUs are asked for each other's memory, and what becomes of sums where it is not to be had."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from ingle.errors import EngineError
from ingle.parallel import inboxes
from ingle.parallel.group import TensorGroup
from ingle.parallel.inboxes import inboxes_of
from ingle.parallel.link import Link

NVLINK, GPU = Link("NVLink", 20.0, 200.0), torch.device("cuda", 0)


class Hosts:
    """Of two ranks: the other says what this one does, but for `differs` at some places of it."""

    place, size = 0, 2

    def __init__(self, differs: dict[int, int]) -> None:
        self.differs, self.asked = differs, 0

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        other = x.clone()
        for index, value in self.differs.items():
            other[index] = value
        return torch.stack([x, other])

    def all_well(self, well: bool) -> bool:
        self.asked += 1
        return well


def why(hosts: Hosts, link: Link = NVLINK) -> str:
    with pytest.raises(EngineError) as refusal:
        inboxes_of(hosts, GPU, link)
    assert hosts.asked, "the others know of it too"
    return str(refusal.value)


def test_who_is_not_asked_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    access = {1: False}
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: access[other])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert why(Hosts({-1: 1})) == "GPU 0 has no access to the memory of GPU 1"
    assert why(Hosts({0: 0, -1: 1})) == "the GPUs are of several machines"
    assert why(Hosts({-3: 8, -1: 1})) == why(Hosts({-2: 1, -1: 1})) == "the GPUs are of several kinds"
    slow = Link("PCIe by way of the host's memory", 40.0, 8.0)
    assert why(Hosts({-1: 1}), slow) == "the GPUs reach each other by PCIe by way of the host's memory alone"
    access[1] = True
    monkeypatch.setattr(inboxes, "_Memory", lambda device, num_bytes: (_ for _ in ()).throw(OSError("no driver")))
    assert why(Hosts({-1: 1})) == "OSError: no driver"


def test_nccl_where_it_does_not_go(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    class Alone:
        def allreduce(self, tensors: list[torch.Tensor], options: Any) -> None:
            tensors[0].mul_(2)

    group = TensorGroup(Alone(), 0, 2, "nccl")  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING, logger="ingle"):
        group.reach(GPU, Hosts({0: 0}), NVLINK)  # type: ignore[arg-type]
    assert caplog.messages == ["GPUs add up by NCCL, and not by kernels of ingle: the GPUs are of several machines"]
    assert group.peers is None
    assert torch.equal(group.all_reduce(torch.ones(4)), torch.full((4,), 2.0))
