"""What the benchmarks run: how many requests, with how many tokens in and out. Named, seeded, the same everywhere."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from ingle.errors import ConfigError


@dataclass(frozen=True)
class Workload:
    """All requests are sent at once."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    """(prompt tokens, generated tokens) of each request."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(num_in for num_in, _ in self.lengths)

    @property
    def num_output_tokens(self) -> int:
        return sum(num_out for _, num_out in self.lengths)

    @property
    def longest(self) -> int:
        return max(num_in + num_out for num_in, num_out in self.lengths)

    def described(self) -> str:
        """Such as "16 requests of 128 tokens in, 64 out"."""
        count, tokens = len(self.lengths), (_range(n for n, _ in self.lengths), _range(n for _, n in self.lengths))
        return f"{count} request{'s' if count > 1 else ''} of {tokens[0]} tokens in, {tokens[1]} out"

    def prompts(self, vocab_size: int, seed: int = 0) -> list[list[int]]:
        """Random token ids, uniform over the lower part of the vocabulary, where there are no special tokens."""
        rng = random.Random(seed)
        top = min(vocab_size, 150_000)
        return [[rng.randrange(top) for _ in range(num_in)] for num_in, _ in self.lengths]


def _range(numbers: Iterable[int]) -> str:
    each = sorted(numbers)
    low, high = each[0], each[-1]
    return str(low) if low == high else f"{low}–{high}"


def _equal(name: str, count: int, num_in: int, num_out: int) -> Workload:
    return Workload(name, ((num_in, num_out),) * count)


def _uniform(name: str, count: int, seed: int) -> Workload:
    rng = random.Random(seed)
    return Workload(name, tuple((rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(count)))


CONCURRENCIES = (1, 2, 4, 8, 16, 25, 36, 64, 128, 256)
GPU = (
    *(_equal(f"c{count}", count, 128, 256) for count in CONCURRENCIES),
    _uniform("nano256", 256, seed=0),
    _uniform("mix1024", 1024, seed=1),
    _equal("prefill", 32, 2048, 1),
)
CPU = (
    *(_equal(f"cpu-c{count}", count, 128, 64) for count in (1, 2, 4, 8, 16)),
    _equal("cpu-prefill", 1, 512, 1),
    _equal("cpu-decode", 1, 512, 64),
)
_MIX = next(workload for workload in GPU if workload.name == "mix1024")
REPLICAS = tuple(Workload(f"mix1024x{count}", _MIX.lengths * count) for count in (2, 4, 8))
"""As much for each of several replicas. Of one list for all of them, its longest requests are left over at the end."""
WORKLOADS = {workload.name: workload for workload in (*GPU, *REPLICAS, *CPU)}
GROUPS = {"gpu": GPU, "replicas": REPLICAS, "cpu": CPU}


def select(names: tuple[str, ...]) -> list[Workload]:
    """The named workloads; a group stands for all of its. Raises `ConfigError` for an unknown name."""
    chosen: list[Workload] = []
    for name in names:
        if name not in WORKLOADS and name not in GROUPS:
            raise ConfigError(f"--workload {name!r:.80}: there are {', '.join((*GROUPS, *WORKLOADS))}")
        chosen += GROUPS[name] if name in GROUPS else (WORKLOADS[name],)
    return chosen
