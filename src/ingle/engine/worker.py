"""Computes step messages on a device, and answers in messages. No PyTorch, no requests, no scheduling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ingle.device import Device, Launched, LogprobRows, Report
from ingle.request import TokenLogprobs
from ingle.step import Chunk, Masks, Step, StepResult


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step whose forward is queued."""

    step: Step
    launched: Launched


class Worker:
    """What one device computes of every step."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def forward(self, step: Step) -> RunningStep:
        """Applies a step to the device's tables and queues its forward."""
        self.device.apply(step)
        return RunningStep(step, self.device.forward(step))

    def sample(self, running: RunningStep, masks: Masks) -> None:
        """Queues the draw. `masks`: the tokens that may be drawn, by slot, where not all may."""
        running.launched.sample(masks)

    def result(self, running: RunningStep) -> StepResult:
        """Waits for a step."""
        return result_of(running.step, running.launched.report())


def result_of(step: Step, report: Report) -> StepResult:
    """What was drawn, chunk by chunk, without what follows a draft that was wrong."""
    token_ids, finite = report.token_ids.tolist(), report.finite.tolist()
    result = StepResult([], [])
    first = 0
    for index, chunk in enumerate(step.chunks):
        if chunk.samples:
            taken = slice(first, first + _num_taken(chunk, token_ids[first : first + chunk.num_samples]))
            result.token_ids.append(token_ids[taken])
            result.finite.append(all(finite[taken]))
            if chunk.logprobs is not None and report.logprobs is not None:
                result.logprobs[index] = list(_entries(report.logprobs, taken, chunk.logprobs))
            first += chunk.num_samples
    for index, rows in report.prompt_logprobs.items():
        wanted = step.chunks[index].prompt_logprobs
        assert wanted is not None
        result.prompt_logprobs[index] = list(_entries(rows, slice(None), wanted))
    result.pooled = {index: vector.astype("<f4").tobytes() for index, vector in report.pooled.items()}
    return result


def _num_taken(chunk: Chunk, drawn: list[int]) -> int:
    """The drafts that are what was drawn before them, and the token after the last of those."""
    for num_right, (draft, token_id) in enumerate(zip(chunk.drafts, drawn, strict=False)):
        if draft != token_id:
            return num_right + 1
    return len(drawn)


def _entries(rows: LogprobRows, taken: slice, num_alternatives: int) -> Iterator[TokenLogprobs]:
    columns = slice(1 + num_alternatives)
    token_ids, values = rows.token_ids[taken, columns].tolist(), rows.values[taken, columns].tolist()
    return map(TokenLogprobs, token_ids, values, rows.ranks[taken].tolist())
