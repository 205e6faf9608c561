"""The least time a workload can take on a device: the yardstick beside every measured figure.

Every step reads the weights once, of experts those that some token chooses, and once the keys and values that each
running sequence sees, in layers with a window the last ones, and does its matrix work; nothing else costs, nothing
overlaps with attention. What a step reads at the memory's
bandwidth or computes at the tensor cores' rate, whichever takes longer, is its least time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ingle.kv import KvSpec
from ingle.model.sizes import Mixture, ModelConfig, WeightSizes
from ingle.step import Limits


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: as measured, or as its vendor says."""

    bytes_per_s: float
    flops_per_s: float

    def times(self, num_devices: int) -> Ceilings:
        """Of so many of them together."""
        return Ceilings(self.bytes_per_s * num_devices, self.flops_per_s * num_devices)


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

    @classmethod
    def of(cls, weights: WeightSizes, kv: KvSpec) -> Stored:
        experts = (0, 0) if weights.mixture is None else (weights.mixture.num_parameters, weights.mixture.num_bytes)
        elsewhere = (weights.head, weights.looked_up, experts)
        body = [total - sum(part[index] for part in elsewhere) for index, total in enumerate(weights.total)]
        return cls(
            body_bytes=body[1],
            body_parameters=body[0],
            head_bytes=weights.head[1],
            head_parameters=weights.head[0],
            kv_bytes_per_token=kv.token_bytes,
            mixture=weights.mixture,
        )

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


def least(
    lengths: Sequence[tuple[int, int]], model: ModelConfig, stored: Stored, limits: Limits, top: Ceilings
) -> Least:
    """The limit for requests of so many tokens in and out, under these step limits, KV memory unbounded."""
    windows = Counter(model.windows or (None,) * model.num_layers)
    kv_layer_bytes = stored.kv_bytes_per_token / model.num_layers
    waiting = [[num_in, num_out, 0] for num_in, num_out in lengths]
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
        weights_s, weight_bytes = _weights(stored, num_tokens, rows, top)
        seconds += weights_s + kv_read / top.bytes_per_s + flops / top.flops_per_s
        num_steps += 1
        num_bytes += int(weight_bytes + kv_read)
        running = [seq for seq in running + started if seq.num_left > 0]
    return Least(seconds, num_steps, num_bytes)


def decode_seconds(num_seqs: int, context: int, model: ModelConfig, stored: Stored, top: Ceilings) -> float:
    """Of a step that computes a token for each of so many sequences, of `context` tokens each."""
    windows = Counter(model.windows or (None,) * model.num_layers)
    kv_read = num_seqs * _keys_seen(windows, context) * stored.kv_bytes_per_token / model.num_layers
    return _weights(stored, num_seqs, num_seqs, top)[0] + kv_read / top.bytes_per_s


def _weights(stored: Stored, num_tokens: int, rows: int, top: Ceilings) -> tuple[float, float]:
    """Seconds and bytes of a step's products with the weights; the head's are those of `rows` tokens."""
    head_bytes = stored.head_bytes if rows else 0
    body_bytes = stored.step_bytes(num_tokens)
    seconds = max(body_bytes / top.bytes_per_s, 2 * stored.token_parameters() * num_tokens / top.flops_per_s) + max(
        head_bytes / top.bytes_per_s, 2 * stored.head_parameters * rows / top.flops_per_s
    )
    return seconds, body_bytes + head_bytes


def _keys_seen(windows: Counter[int | None], length: int) -> int:
    """By the last token of a sequence, all layers together."""
    return sum(count * (length if window is None else min(length, window)) for window, count in windows.items())


def _pairs_seen(windows: Counter[int | None], length: int) -> int:
    """Pairs of a token and a key that it sees, in a sequence, all layers together."""
    return sum(count * _pairs_within(length, window) for window, count in windows.items())


def _pairs_within(length: int, window: int | None) -> int:
    rising = length if window is None else min(length, window)  # until then each token sees one key more
    return rising * (rising + 1) // 2 + (length - rising) * rising
