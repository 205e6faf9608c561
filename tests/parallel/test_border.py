"""Borders of stages as GPUs have them, over Gloo: three stages that are threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch._C import _distributed_c10d as c10d

from ingle.parallel.group import Neighbours, StageBorder, TensorGroup, _gloo

CPU = torch.device("cpu")
NUM_STAGES, HIDDEN = 3, 8


def border_of(store: c10d.Store, stage: int) -> StageBorder:
    def between(first: int) -> TensorGroup | None:
        if not 0 <= first < NUM_STAGES - 1:
            return None
        return TensorGroup(_gloo(store, f"border {first}", stage - first, 2), stage - first, 2, "gloo")

    neighbours = Neighbours(between(stage - 1), between(stage))
    neighbours.meet(CPU)
    stages = TensorGroup(_gloo(store, "stages", stage, NUM_STAGES), stage, NUM_STAGES, "gloo")
    return StageBorder(stages, HIDDEN, torch.float32, CPU, neighbours)


def passed_on(store: c10d.Store, stage: int) -> list[torch.Tensor]:
    """What each of some steps has behind this stage, which adds its number and 1; others are replayed as CUDA graphs
    would be."""
    border, seen = border_of(store, stage), []

    def forward(step: int) -> torch.Tensor:
        x = torch.full((step, HIDDEN), float(step)) if stage == 0 else border.receive(step)
        x = x + stage + 1
        if stage < NUM_STAGES - 1:
            border.send(x)
        return x

    for step in (1, 5, 2):
        seen.append(forward(step).clone())
    for step in (3, 3 + stage):  # each by itself: ranks need not even agree on what they try
        with border.held():
            kept = forward(step)
            assert stage == 0 or bool((kept == stage + 1).all()), "what is read at once is zeros"
        crossing = border.captured()
        assert (crossing.landing is None, crossing.leaving is None) == (stage == 0, stage == NUM_STAGES - 1)
    with border.held():
        forward(3)
    crossing = border.captured()
    for step in (7, 8):
        if crossing.landing is not None:
            border.receive_into(crossing.landing)
        x = (torch.full((3, HIDDEN), float(step)) if crossing.landing is None else crossing.landing) + stage + 1
        if crossing.leaving is not None:
            crossing.leaving.copy_(x)
            border.send(crossing.leaving)
        seen.append(x)
    return seen


def test_steps_cross_in_their_order_and_captures_do_not() -> None:
    store = c10d.HashStore()
    with ThreadPoolExecutor(NUM_STAGES) as threads:
        seen = list(threads.map(lambda stage: passed_on(store, stage), range(NUM_STAGES)))
    for stage, steps in enumerate(seen):
        added = sum(range(1, stage + 2))
        assert [float(x[0, 0]) for x in steps] == [step + added for step in (1, 5, 2, 7, 8)]
        assert all(bool((x == x[0, 0]).all()) for x in steps)
