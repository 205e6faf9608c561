"""What a build of the engine brings together, whichever device it has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ingle.device import Device
from ingle.engine.facts import EngineFacts
from ingle.engine.memory import MemoryPlan


@dataclass(frozen=True)
class Parts:
    """A loaded model on its device, and what there is to tell about them."""

    runs_on: Device
    facts: EngineFacts
    memory: MemoryPlan
    stored_types: dict[str, int]
    kept_types: frozenset[str]
    """Of `stored_types`, those that are held as they are stored."""
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
