"""Sums by ranks that are processes, in Triton's interpreter: python -m tests.kernels.sums_ranks CASE…

In a process of its own, which has no threads yet when it is forked.
"""

from __future__ import annotations

import io
import mmap
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch

from ingle.kernels import reference
from ingle.kernels.gpu import sums, vector
from ingle.kernels.group import Peers
from ingle.model.layers import RMSNorm

HALF_BYTES = 1 << 14
SIZE = 200
WAIT_S = 300.0


class Inboxes:
    """Of ranks that are forked."""

    def __init__(self, num_ranks: int) -> None:
        self.shared = [mmap.mmap(-1, 2 * HALF_BYTES) for _ in range(num_ranks)]
        self.tensors = [torch.frombuffer(memory, dtype=torch.int32) for memory in self.shared]
        for tensor in self.tensors:
            tensor.fill_(Peers.NOTHING)

    def peers(self, place: int, *, one_shot_bytes: int) -> Peers:
        addresses = tuple(tensor.data_ptr() for tensor in self.tensors)
        state = torch.zeros(4, dtype=torch.int64)
        return Peers(place, addresses, HALF_BYTES, state, 1 << 20, one_shot_bytes, self)

    @property
    def empty(self) -> bool:
        return all(bool((tensor == Peers.NOTHING).all()) for tensor in self.tensors)


def by_all(num_ranks: int, do: Callable[[int], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What `do` gives in each of so many processes."""
    fork = multiprocessing.get_context("fork")
    ends = [fork.Pipe(duplex=False) for _ in range(num_ranks)]

    def run(place: int) -> None:
        torch.set_num_threads(1)
        file = io.BytesIO()
        try:
            torch.save(do(place), file)
        except BaseException:
            ends[place][1].send_bytes(traceback.format_exc().encode())
            raise
        ends[place][1].send_bytes(file.getvalue())

    processes = [fork.Process(target=run, args=(place,), daemon=True) for place in range(num_ranks)]
    for process in processes:
        process.start()
    try:
        given = []
        for place in range(num_ranks):
            assert ends[place][0].poll(WAIT_S), f"rank {place} of {num_ranks} says nothing"
            answer = ends[place][0].recv_bytes()
            assert not answer.startswith(b"Traceback"), answer.decode()
            given.append(torch.load(io.BytesIO(answer), weights_only=True))
        return given
    finally:
        for process in processes:
            process.kill()
            process.join()


def norm_of(dtype: torch.dtype) -> RMSNorm:
    return RMSNorm((torch.rand(SIZE) + 0.5).to(dtype), 1e-6)


def check_sums(num_ranks: int, one_shot_bytes: int, num_rows: int, dtype: torch.dtype) -> None:
    """Of other numbers, in other forms, one behind the other, as the layers of a model have them."""
    torch.manual_seed(num_rows)
    inboxes = Inboxes(num_ranks)
    given = torch.randn(4, num_ranks, num_rows, SIZE).to(dtype)
    given[:, :, 0, ::3] = -0.0
    given[0, 0, -1, 8] = float("nan")
    residual = torch.randn(num_rows, SIZE).to(dtype)
    norm, post_norm = norm_of(dtype), norm_of(dtype)

    def do(place: int) -> list[torch.Tensor]:
        peers = inboxes.peers(place, one_shot_bytes=one_shot_bytes)
        x = given[:, place].clone()
        assert sums.suits(x[0], peers) and sums.suits_rows(x[1], peers)
        plain = sums.all_reduce(x[0], peers)
        normed, residual_1 = sums.add_rms_norm(x[1], residual.clone(), norm, None, peers)
        twice, residual_2 = sums.add_rms_norm(x[2], residual_1.clone(), norm, post_norm, peers)
        short = sums.all_reduce(x[3, 0, :8].clone(), peers)
        assert not peers.state[1:].any()
        return [plain, normed, residual_1, twice, residual_2, short]

    first, *others = by_all(num_ranks, do)
    for other in others:
        assert all(same_bits(ours, theirs) for ours, theirs in zip(first, other, strict=True))
    assert inboxes.empty
    exact = [each.double().sum(0).to(dtype) for each in given]
    plain, normed, residual_1, twice, residual_2, short = first
    close(plain, exact[0])
    close(short, exact[3][0, :8])
    if dtype == torch.bfloat16:
        return  # what stands behind the sums is in this type, in which the interpreter does not compute
    values, summed = reference.add_rms_norm(exact[1], residual.clone(), norm.weight, norm.eps)
    close(residual_1, summed)
    close(normed, values)
    values, summed = reference.add_rms_norm(exact[2], residual_1.clone(), norm.weight, norm.eps, post_norm.weight)
    close(residual_2, summed)
    close(twice, values)


def check_products() -> None:
    """Which send what they compute."""
    torch.manual_seed(0)
    inboxes, dtype = Inboxes(2), torch.float16
    given, weights = torch.randn(2, 2, 64).to(dtype), (torch.randn(2, SIZE, 64) / 8).to(dtype)
    residual, norm, post_norm = torch.randn(2, SIZE).to(dtype), norm_of(dtype), norm_of(dtype)

    def do(place: int) -> list[torch.Tensor]:
        peers, x, weight = inboxes.peers(place, one_shot_bytes=0), given[place], weights[place]
        bias = residual[0] if place == 0 else None
        assert sums.sends(x, weight, residual, peers)
        done = []
        for post in (None, post_norm):
            done += sums.add_rms_norm(vector.add(x, weight, bias, None), residual.clone(), norm, post, peers)
            done += sums.multiply_add_rms_norm(x, weight, bias, residual.clone(), norm, post, peers)
        assert not peers.state[1:].any()
        return done

    first, second = by_all(2, do)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(first, second, strict=True))
    assert same_bits(torch.stack(first[0:2]), torch.stack(first[2:4]))
    assert same_bits(torch.stack(first[4:6]), torch.stack(first[6:8]))
    assert inboxes.empty


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def close(ours: torch.Tensor, exact: torch.Tensor) -> None:
    """But for a rounding: the interpreter truncates to bfloat16."""
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(ours, exact, rtol=4 * step, atol=4 * step, equal_nan=True)


CASES: dict[str, Callable[[], None]] = {
    "one shot": lambda: check_sums(3, 1 << 20, 1, torch.bfloat16),
    "two shots": lambda: check_sums(3, 0, 4, torch.float16),
    "products": check_products,
    "rows ahead of others": lambda: check_sums(2, 0, 7, torch.float16),
    "float32": lambda: check_sums(3, 1 << 20, 6, torch.float32),
    "ranks without a row": lambda: check_sums(4, 0, 2, torch.float16),
    "more than the inboxes hold": lambda: check_sums(4, 0, 21, torch.float32),
}


def main() -> None:
    torch.set_num_threads(1)
    sums._PIECE, sums.num_sms = 256, lambda device: 1
    vector.tiling = vector.sent_tiling = lambda *size_in, **paired: vector.Tiling(16, 64)
    for name in sys.argv[1:]:
        CASES[name]()
        print(name, flush=True)


if __name__ == "__main__":
    main()
