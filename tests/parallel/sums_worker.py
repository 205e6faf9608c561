"""A rank that checks sums or measures them: python -m tests.parallel.sums_worker SIZE check|time [RANK FD]

Without a rank it starts all of them, and ends with the first failure.
"""

from __future__ import annotations

import ctypes
import faulthandler
import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from ingle.kernels import reference
from ingle.kernels.gpu import elementwise, sums, vector
from ingle.kernels.group import Peers
from ingle.model.layers import RMSNorm
from ingle.parallel import inboxes
from ingle.parallel.group import Member, TensorGroup, join
from ingle.parallel.hosts import Meeting
from ingle.parallel.layout import Layout

HIDDEN = 3584
LIMIT_S = float(os.environ.get("SUMS_LIMIT_S", "100"))
"""After which every rank says where it stands, and ends."""
TIMED_BYTES = [*(size << 10 for size in (8, 32, 128, 256, 512)), *(size << 20 for size in (1, 2, 4, 8, 16, 56))]
REPEATS = 40
ONE_SHOT, TWO_SHOT = 1 << 40, 0
KINDS = [
    (torch.bfloat16, HIDDEN, "norm"),
    (torch.bfloat16, HIDDEN, "plain"),
    (torch.bfloat16, 8192, "norm"),
    (torch.float16, 2048, "post"),
    (torch.float32, 256, "norm"),
]


def main() -> int:
    size, what = int(sys.argv[1]), sys.argv[2]
    if len(sys.argv) == 3:
        return start(size)
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    rank, rendezvous = int(sys.argv[3]), int(sys.argv[4])
    place, device = Layout(size).place(rank), torch.device("cuda", rank)
    member = join(place, device, "nccl", Meeting(rendezvous), own_kernels=True)
    group = member.group
    assert group is not None
    say(rank, f"{size} ranks, {member.link}: {group.why_by_nccl or 'own kernels'}")
    if group.peers is None:
        return 1
    threading.Thread(target=watch, args=(rank, group.peers), daemon=True).start()
    (check if what == "check" else measure)(member, group, group.peers)
    torch.cuda.synchronize()
    sys.stdout.flush()
    os._exit(0)


def start(size: int) -> int:
    rendezvous = os.memfd_create("rendezvous")
    command = [sys.executable, "-m", "tests.parallel.sums_worker", *sys.argv[1:3]]
    ranks = [subprocess.Popen([*command, str(rank), str(rendezvous)], pass_fds=[rendezvous]) for rank in range(size)]
    until, code = time.monotonic() + LIMIT_S + 20, 0
    while any(rank.poll() is None for rank in ranks) and not code and time.monotonic() < until:
        code = next((rank.returncode for rank in ranks if rank.returncode), 0)
        time.sleep(0.05)
    if code:
        time.sleep(5)  # for the others to say what they have to
    left = [index for index, rank in enumerate(ranks) if rank.poll() is None]
    for rank in ranks:
        rank.kill()
        rank.wait()
    if left:
        print(f"ranks {left} did not end", flush=True)
    return code or bool(left)


def watch(rank: int, peers: Peers) -> None:
    """Says what stands in memory while a kernel waits for it, which ends then."""
    time.sleep(LIMIT_S - 5)
    beside = torch.cuda.Stream(peers.state.device)
    with torch.cuda.device(peers.state.device), torch.cuda.stream(beside):
        state = torch.empty(4, dtype=torch.int64, pin_memory=True).copy_(peers.state, non_blocking=True)
        beside.synchronize()
        half, begun, _, lost = state.tolist()
        print(f"rank {rank} after {LIMIT_S - 5:.0f} s: half {half}, {begun} programs have begun, {lost=}", flush=True)
        held, words = torch.empty(peers.half_bytes // 2, dtype=torch.int32, pin_memory=True), peers.half_bytes // 4
        address = ctypes.c_uint64(peers.inboxes[rank])
        inboxes._driver("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(held.data_ptr()), address,
                        ctypes.c_size_t(4 * held.numel()), ctypes.c_void_p(beside.cuda_stream))  # fmt: skip
        beside.synchronize()
        for index in range(2):
            there = (held[index * words : (index + 1) * words] != Peers.NOTHING).nonzero().flatten()
            ends = f", words {int(there[0])} to {int(there[-1])}" if len(there) else ""
            print(f"rank {rank}: half {index} of its inbox holds {len(there)}{ends}", flush=True)


def say(rank: int, what: str) -> None:
    if rank == 0:
        print(what, flush=True)


# ---- whether they are right


def check(member: Member, group: TensorGroup, peers: Peers) -> None:
    device, place, size = member.device, group.place, group.size
    lots = random.Random(7)
    for round_ in range(60):
        dtype, hidden, kind = lots.choice(KINDS)
        num_rows = lots.choice([1, 1, 2, 5, 16, 36, 100, 256, 700, 5000])
        way = replace(peers, one_shot_bytes=lots.choice([ONE_SHOT, TWO_SHOT]))
        what = f"{round_}: {kind} {num_rows} x {hidden} {dtype}, {'one' if way.one_shot_bytes else 'two'}-shot or more"
        if lots.randrange(size) == place:
            torch.cuda._sleep(200_000)  # one of them is late
        torch.manual_seed(1000 * round_ + place)
        x = torch.randn(num_rows, hidden, device=device).to(dtype)
        torch.manual_seed(round_)
        residual = torch.randn(num_rows, hidden, device=device).to(dtype)
        norms = [RMSNorm((torch.rand(hidden, device=device) + 0.5).to(dtype), 1e-6) for _ in range(2)]
        exact = group.sum_by_backend(x.float().clone()).to(dtype)
        if kind == "plain":
            ours, expected = [sums.all_reduce(x.clone(), way)], [exact]
        else:
            post = norms[1] if kind == "post" else None
            ours = list(sums.add_rms_norm(x, residual.clone(), norms[0], post, way))
            weight = None if post is None else post.weight
            expected = list(reference.add_rms_norm(exact, residual.clone(), norms[0].weight, 1e-6, weight))
        torch.cuda.synchronize()
        digest = hashlib.sha256(b"".join(each.cpu().view(torch.uint8).numpy().tobytes() for each in ours)).digest()
        every = member.hosts.all_gather(torch.tensor(list(digest), dtype=torch.uint8))
        assert bool((every == every[0]).all()), f"{what}: ranks have other bits"
        for mine, wanted in zip(ours, expected, strict=True):
            error = (mine.double() - wanted.double()).norm() / wanted.double().norm()
            assert error < 2 * torch.finfo(dtype).eps, f"rank {place}, {what}: off by {error:.1e}"
    assert peers.state[1:].tolist() == [0, 0, 0], peers.state.tolist()
    held = (ctypes.c_int32 * (peers.half_bytes // 2))()
    inboxes._driver(
        "cuMemcpyDtoH_v2", held, ctypes.c_uint64(peers.inboxes[place]), ctypes.c_size_t(ctypes.sizeof(held))
    )
    assert bool((torch.frombuffer(held, dtype=torch.int32) == Peers.NOTHING).all()), "something is left in an inbox"
    say(place, "60 sums are right, the same on all ranks, and leave nothing behind")
    check_graphs(member, peers)


def check_graphs(member: Member, peers: Peers) -> None:
    """57 sums a step, odd as they are in a model, replayed while a rank is late."""
    device, place = member.device, peers.place
    torch.manual_seed(place)
    given = torch.randn(36, HIDDEN, device=device).bfloat16()
    norm = RMSNorm(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16), 1e-6)
    residual = torch.zeros_like(given)

    def step() -> torch.Tensor:
        residual.zero_()
        x = sums.all_reduce(given.clone(), peers)
        for _ in range(56):
            x, _ = sums.add_rms_norm(x, residual, norm, None, peers)
        return x

    eager = step().clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for index in range(50):
        if index % len(peers.inboxes) == place:
            torch.cuda._sleep(1_000_000)
        graph.replay()
        if index % 10 == 0:
            assert torch.equal(captured, eager), f"rank {place}, replay {index} has other bits"
    torch.cuda.synchronize()
    assert torch.equal(captured, eager)
    say(place, "50 replays of 57 sums are right")
    check_products(member, peers)


def check_products(member: Member, peers: Peers) -> None:
    """Products of one and two rows that send what they compute, in layers, against those whose results are sent."""
    place = peers.place
    for num_rows in (1, 2):
        layer = Layer(member, num_rows, peers)
        with mock.patch.object(vector, "tiling", as_sent):
            expected = layer.run(layer.add, 28).clone()
        ours = layer.run(layer.send, 28).clone()
        torch.cuda.synchronize()
        assert torch.equal(ours, expected), f"rank {place}: products of {num_rows} rows that send have other bits"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer.run(layer.send, 28)
        for index in range(50):
            if index % len(peers.inboxes) == place:
                torch.cuda._sleep(300_000)
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected), f"rank {place}: replayed products of {num_rows} rows have other bits"
    say(place, "products that send what they compute are right, in graphs too")


def as_sent(size_in: int, *, paired: bool, own: Callable[..., vector.Tiling] = vector.tiling) -> vector.Tiling:
    """Other tilings have other bits."""
    return own(size_in, paired=paired) if paired else vector.sent_tiling(size_in)


class Layer:
    """Qwen2-7B's, but for attention: one rank's share, with the same weights again and again."""

    def __init__(self, member: Member, num_rows: int, peers: Peers) -> None:
        torch.manual_seed(peers.place)
        size, device, dtype = len(peers.inboxes), member.device, torch.bfloat16
        assert member.group is not None
        self.peers, self.nccl = replace(peers, one_shot_bytes=ONE_SHOT), member.group.sum_by_backend

        def matrix(num_out: int, num_in: int) -> torch.Tensor:
            return (torch.randn(num_out, num_in, device=device) / num_in**0.5).to(dtype)

        self.qkv, self.out = matrix(4608 // size, HIDDEN), matrix(HIDDEN, 3584 // size)
        self.gate_up, self.down = matrix(2 * 18944 // size, HIDDEN), matrix(HIDDEN, 18944 // size)
        torch.manual_seed(7)
        self.x = torch.randn(num_rows, HIDDEN, device=device).to(dtype)
        self.residual = torch.empty_like(self.x)
        self.norm = RMSNorm((torch.rand(HIDDEN, device=device) + 0.5).to(dtype), 1e-6)

    def run(self, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_layers: int) -> torch.Tensor:
        x = self.x
        self.residual.copy_(x)
        for _ in range(num_layers):
            q = vector.add(x, self.qkv, None, None)[:, : self.out.shape[1]].contiguous()
            x = add(q, self.out)
            x = add(vector.gated(x, None, self.gate_up, None, "silu"), self.down)
        return x

    def by_nccl(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = self.nccl(vector.add(x, weight, None, None))
        return elementwise.add_rms_norm(out, self.residual, self.norm.weight, self.norm.eps)[0]

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sums.add_rms_norm(vector.add(x, weight, None, None), self.residual, self.norm, None, self.peers)[0]

    def send(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sums.multiply_add_rms_norm(x, weight, None, self.residual, self.norm, None, self.peers)[0]

    def alone(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Without any sum."""
        out = vector.add(x, weight, None, None)
        return elementwise.add_rms_norm(out, self.residual, self.norm.weight, self.norm.eps)[0]


# ---- how long they take


def measure(member: Member, group: TensorGroup, peers: Peers) -> None:
    device, place = member.device, group.place
    one, two = replace(peers, one_shot_bytes=ONE_SHOT), replace(peers, one_shot_bytes=TWO_SHOT)
    norm = RMSNorm(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16), 1e-6)

    def nccl_and_norm(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return elementwise.add_rms_norm(group.sum_by_backend(x), residual, norm.weight, norm.eps)[0]

    fused: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "nccl+norm": nccl_and_norm,
        "1shot+norm": lambda x, residual: sums.add_rms_norm(x, residual, norm, None, one),
        "2shot+norm": lambda x, residual: sums.add_rms_norm(x, residual, norm, None, two),
    }
    if group.size == 2:
        del fused["2shot+norm"]  # which is one shot there
    plain: dict[str, Callable[[torch.Tensor], object]] = {
        "nccl": group.sum_by_backend,
        "1shot": lambda x: sums.all_reduce(x, one),
        "2shot": lambda x: sums.all_reduce(x, two),
    }
    if group.size == 2:
        del plain["2shot"]
    say(place, "us in a graph " + "".join(f"{name:>12}" for name in [*plain, *fused]))
    for num_bytes in TIMED_BYTES:
        num_rows = max(num_bytes // (2 * HIDDEN), 1)
        x = torch.randn(num_bytes // 2, device=device).bfloat16()
        rows = torch.randn(num_rows, HIDDEN, device=device).bfloat16()
        residual = torch.zeros_like(rows)
        taken = [in_graph(partial(way, x)) for way in plain.values()]
        taken += [in_graph(partial(way, rows, residual)) for way in fused.values()]
        say(place, f"{num_bytes >> 10:9} KiB " + "".join(f"{us:12.1f}" for us in taken))

    layer = Layer(member, 1, peers)
    ways = {"no sum": layer.alone, "nccl": layer.by_nccl, "1shot": layer.add, "sent by the product": layer.send}
    taken = {name: in_graph(partial(layer.run, way, 7)) / 7 for name, way in ways.items()}
    say(place, "us of a layer of one row: " + ", ".join(f"{name} {us:.1f}" for name, us in taken.items()))


def in_graph(do: Callable[[], object]) -> float:
    """Microseconds."""
    do()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            do()
    taken = []
    for _ in range(5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(begun.elapsed_time(ended) * 1e3 / REPEATS)
    graph.reset()
    return min(taken)


if __name__ == "__main__":
    sys.exit(main())
