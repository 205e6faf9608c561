"""What an engine counts of its work, and how long requests wait for it: less than a microsecond a step."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from ingle.channel import STEP_TOKENS
from ingle.request import EngineOutput
from ingle.step import Step

if TYPE_CHECKING:
    from ingle.engine.sequence import Plan


class StepCounts:
    """Of all steps since the start, as `EngineStats` tells them."""

    def __init__(self) -> None:
        self.num_steps = self.num_failed = self.num_prompt_tokens = self.num_tokens = 0
        self.by_tokens = [0] * (len(STEP_TOKENS) + 1)

    def launched(self, step: Step) -> None:
        num_tokens = step.num_tokens
        self.num_steps += 1
        self.num_prompt_tokens += num_tokens - step.num_decodes
        self.num_tokens += num_tokens
        self.by_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1


class Waits:
    """Seconds from when a request comes until its first step, told with its first output."""

    def __init__(self) -> None:
        self._since_s: dict[str, float] = {}
        """Of requests that wait for their first step."""
        self._untold_s: dict[str, float] = {}
        """How long those waited that have had their first step, and no output."""

    def begin(self, request_id: str) -> None:
        self._since_s[request_id] = time.monotonic()

    def end(self, plan: Plan) -> None:
        """Of requests that are admitted by this step for the first time; one that was preempted waits no more."""
        now = time.monotonic()
        slots = {admission.slot for admission in plan.step.admissions}
        for seq in plan.sequences:
            if seq.slot in slots and (since := self._since_s.pop(seq.id, None)) is not None:
                self._untold_s[seq.id] = now - since

    def tell(self, outputs: Sequence[EngineOutput]) -> None:
        """Adds to first outputs how long their requests waited."""
        if not self._untold_s and not self._since_s:
            return
        for output in outputs:
            if (waited := self._untold_s.pop(output.id, None)) is not None:
                msgspec.structs.force_setattr(output, "queued_s", waited)
            elif output.finish_reason is not None:  # it failed before it had a slot
                self._since_s.pop(output.id, None)

    def drop(self, request_id: str) -> None:
        self._since_s.pop(request_id, None)
        self._untold_s.pop(request_id, None)
