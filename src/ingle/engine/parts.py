"""What a build of the engine brings together, whichever worker it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from ingle.engine.memory import MemoryPlan
from ingle.engine.scheduler import Plan, StepResult


class LaunchedStep(Protocol):
    def result(self) -> StepResult:
        """Waits for the step."""
        ...


class Worker(Protocol):
    """Runs planned steps: PyTorch's on any device (`worker`), or without it on a CPU (`host_worker`)."""

    model: Any
    """A `ingle.model.interface.Model`, or a `HostDecoder`."""

    @property
    def on_gpu(self) -> bool: ...

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a number in the KV cache."""
        ...

    def launch(self, plan: Plan) -> LaunchedStep:
        """Applies the plan to the tables and queues its computation."""
        ...

    def usable(self) -> bool:
        """Whether the device still computes, after a step has raised an exception."""
        ...

    def capture_next(self) -> bool:
        """Captures one more CUDA graph that is likely to be needed; False when there is none left."""
        ...


@dataclass(frozen=True)
class Parts:
    """A loaded model with its worker, and what there is to tell about them."""

    worker: Worker
    memory: MemoryPlan
    stored_types: dict[str, int]
    kept_types: frozenset[str]
    """Of `stored_types`, those that are held as they are stored."""
    num_parameters: int
    weight_bytes: int
    device: str
    dtype: str
    """Of the KV cache."""
    product_dtype: str
    """The coarsest type to which factors of matrix products may be rounded."""
    factors: frozenset[str]
    """The types that factors of matrix products have."""
    kernels: str
    """What multiplies and attends, for people."""
    notices: tuple[str, ...] = ()


@dataclass
class Startup:
    """Reports phases as they begin and keeps their seconds."""

    report: Callable[[str], None]
    timings_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, stage: str) -> Iterator[None]:
        self.report(stage)
        start = time.perf_counter()
        yield
        self.timings_s[name] = round(time.perf_counter() - start, 3)
