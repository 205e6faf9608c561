"""The engine: requests of tokens in, tokens out, one step at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ingle.channel import EngineStats
from ingle.engine.parts import LaunchedStep, Worker
from ingle.engine.scheduler import Plan, Scheduler
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, check_prompt, check_token_ids


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    step: LaunchedStep


class Engine:
    """Owns the plan and the device. Not thread-safe: one thread adds, steps and aborts.

    With `overlap`, a step is launched before the one ahead of it is retired, so that the device computes while Python
    plans; without, each step is retired at once. Both orders run the same functions and give the same tokens.
    """

    def __init__(self, scheduler: Scheduler, worker: Worker, *, overlap: bool, seed: int) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self._overlap = overlap
        self._seeds = random.Random(seed)
        self._in_flight: _InFlight | None = None
        self._num_steps = 0
        self._num_prompt_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises `RequestError` when it cannot be served."""
        vocab_size = self.worker.model.config.vocab_size
        check_prompt(
            request.prompt_token_ids,
            request.sampling.max_tokens,
            vocab_size=vocab_size,
            max_model_len=self.scheduler.limits.max_model_len,
        )
        check_token_ids(request.sampling, vocab_size)
        seed = request.sampling.seed
        self.scheduler.add(request, self._seeds.getrandbits(63) if seed is None else seed)

    def abort(self, request_id: str) -> None:
        """Takes a request out of the batch before the next step; unknown or finished ones are left alone."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or a launched step is not retired."""
        return self.scheduler.has_work or self._in_flight is not None

    def step(self) -> list[EngineOutput]:
        """Plan, launch, retire. Returns what became known, which with overlap is the previous step's."""
        plan = self.scheduler.plan()
        launched = self._launch(plan) if plan is not None else None
        if launched is None and self._in_flight is None and self.scheduler.has_work:
            raise EngineError("requests are queued, but no step can be planned for any of them")
        if not self._overlap:
            return self._retire(launched)
        previous, self._in_flight = self._in_flight, launched
        return self._retire(previous)

    def _launch(self, plan: Plan) -> _InFlight:
        self._num_steps += 1
        self._num_prompt_tokens += plan.num_tokens - plan.num_decodes
        return _InFlight(plan, self.worker.launch(plan))

    def _retire(self, launched: _InFlight | None) -> list[EngineOutput]:
        if launched is None:
            return []
        return self.scheduler.retire(launched.plan, launched.step.result())

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_prompt_tokens=self._num_prompt_tokens,
        )
