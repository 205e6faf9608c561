"""The least time a workload can take on a device: the yardstick beside every measured figure.

Every step reads the weights once, of experts those that some token chooses, and once the keys and values that each
running sequence sees, in layers with a window the last ones, and does its matrix work; nothing else costs, nothing
overlaps with attention. What a step reads at the memory's
bandwidth or computes at the tensor cores' rate, whichever takes longer, is its least time.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch

from ingle.bench.workloads import Workload
from ingle.model.sizes import Mixture, ModelConfig
from ingle.step import Limits


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, measured."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Stored:
    """What a step reads and multiplies by. The embedding, of which it looks up a few rows, is not among it."""

    body_bytes: int
    body_parameters: int
    head_bytes: int
    head_parameters: int
    kv_bytes_per_token: int
    mixture: Mixture | None = None
    """The experts, which are not in the body."""

    def step_bytes(self, num_tokens: int) -> float:
        """Of the body and of the experts that a step of so many tokens reads, were all experts chosen alike."""
        if self.mixture is None:
            return self.body_bytes
        share = self.mixture.top_k / self.mixture.num_experts
        return self.body_bytes + self.mixture.num_bytes * (1 - (1 - share) ** num_tokens)

    def token_parameters(self) -> float:
        """That a token is multiplied by, but for the head."""
        if self.mixture is None:
            return self.body_parameters
        return self.body_parameters + self.mixture.num_parameters * self.mixture.top_k / self.mixture.num_experts


@dataclass(frozen=True)
class Least:
    """Time and traffic of a workload at the limit."""

    seconds: float
    num_steps: int
    num_bytes: int


@dataclass
class _Running:
    num_tokens: int
    num_left: int


def least(workload: Workload, model: ModelConfig, stored: Stored, limits: Limits, top: Ceilings) -> Least:
    """The limit under these step limits, KV memory unbounded."""
    windows = Counter(model.windows or (None,) * model.num_layers)
    kv_layer_bytes = stored.kv_bytes_per_token / model.num_layers
    waiting = [[num_in, num_out, 0] for num_in, num_out in workload.lengths]
    running: list[_Running] = []
    seconds, num_steps, num_bytes = 0.0, 0, 0
    while waiting or running:
        kv_read = sum(_keys_seen(windows, seq.num_tokens) for seq in running) * kv_layer_bytes
        for seq in running:
            seq.num_tokens += 1
            seq.num_left -= 1
        budget, flops, rows = limits.max_num_batched_tokens - len(running), 0.0, len(running)
        started: list[_Running] = []
        while waiting and budget > 0 and len(running) + len(started) < limits.max_num_seqs:
            num_in, num_out, done = waiting[0]
            count = min(budget, num_in - done)
            flops += 4 * model.q_size * (_pairs_seen(windows, done + count) - _pairs_seen(windows, done))
            budget -= count
            waiting[0][2] += count
            if done + count == num_in:
                waiting.pop(0)
                started.append(_Running(num_in + 1, num_out - 1))
                rows += 1
        num_tokens = limits.max_num_batched_tokens - budget
        head_bytes = stored.head_bytes if rows else 0
        body_bytes = stored.step_bytes(num_tokens)
        seconds += (
            max(body_bytes / top.bytes_per_s, 2 * stored.token_parameters() * num_tokens / top.flops_per_s)
            + max(head_bytes / top.bytes_per_s, 2 * stored.head_parameters * rows / top.flops_per_s)
            + kv_read / top.bytes_per_s
            + flops / top.flops_per_s
        )
        num_steps += 1
        num_bytes += int(body_bytes + head_bytes + kv_read)
        running = [seq for seq in running + started if seq.num_left > 0]
    return Least(seconds, num_steps, num_bytes)


def _keys_seen(windows: Counter[int | None], length: int) -> int:
    """By the last token of a sequence, all layers together."""
    return sum(count * (length if window is None else min(length, window)) for window, count in windows.items())


def _pairs_seen(windows: Counter[int | None], length: int) -> int:
    """Pairs of a token and a key that it sees, in a sequence, all layers together."""
    return sum(count * _pairs_within(length, window) for window, count in windows.items())


def _pairs_within(length: int, window: int | None) -> int:
    rising = length if window is None else min(length, window)  # until then each token sees one key more
    return rising * (rising + 1) // 2 + (length - rising) * rising


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Memory reads in bytes/s and matrix products in FLOP/s, each the best of several tries of a few milliseconds.

    On a CPU, whose kernels multiply in a type of their own, products are those of its fastest float type.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:  # a copy reads and writes; each byte counts once each way
        source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bytes_per_s = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    else:
        floats = torch.ones(1 << 26)
        bytes_per_s = floats.numel() * 4 / _best(floats.sum, device)
    dtypes, size = ([dtype], 8192) if on_gpu else ([torch.bfloat16, torch.float32], 1024)
    return Ceilings(bytes_per_s, max(_product_rate(device, each, size) for each in dtypes))


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), device)


def _best(function: object, device: torch.device, tries: int = 10) -> float:
    assert callable(function)
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
