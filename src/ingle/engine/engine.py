"""The engine: requests of tokens in, tokens out, one step at a time."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import msgspec

from ingle.channel import EngineStats
from ingle.engine.parts import LaunchedStep, Worker
from ingle.engine.scheduler import Plan, Scheduler
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, check_request


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    step: LaunchedStep | None = None
    """None while it is being launched."""


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
        self._in_flight: deque[_InFlight] = deque()  # at most two
        self._num_steps = 0
        self._num_prompt_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queues a request. Raises `RequestError` when it cannot be served.

        End tokens that the model cannot give end nothing, so they are left out.
        """
        vocab_size = self.worker.model.config.vocab_size
        check_request(request, vocab_size=vocab_size, max_model_len=self.scheduler.limits.max_model_len)
        ends = tuple(token_id for token_id in request.eos_token_ids if 0 <= token_id < vocab_size)
        request, seed = msgspec.structs.replace(request, eos_token_ids=ends), request.sampling.seed
        self.scheduler.add(request, self._seeds.getrandbits(63) if seed is None else seed)

    def abort(self, request_id: str) -> None:
        """Takes a request out of the batch before the next step; unknown or finished ones are left alone."""
        self.scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or a launched step is not retired."""
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[EngineOutput]:
        """Plan, launch, retire. Returns what became known, which with overlap is the previous step's.

        A step that raises an exception costs the request that is at fault, and no other. Raises when the device itself
        is lost.
        """
        plan = self.scheduler.plan()
        if plan is None and not self._in_flight and self.scheduler.has_work:
            raise EngineError("requests are queued, but no step can be planned for any of them")
        try:
            if plan is not None:
                self._launch(plan)
            if len(self._in_flight) <= (self._overlap and plan is not None):
                return []
            step = self._in_flight[0].step
            assert step is not None
            result = step.result()
        except Exception as error:
            if not self.worker.usable():
                raise
            return self._recover(error)
        return self.scheduler.retire(self._in_flight.popleft().plan, result)

    def _launch(self, plan: Plan) -> None:
        self._in_flight.append(_InFlight(plan))
        self._in_flight[-1].step = self.worker.launch(plan)
        self._num_steps += 1
        self._num_prompt_tokens += plan.num_tokens - plan.num_decodes

    def _recover(self, error: Exception) -> list[EngineOutput]:
        """Takes back what is in flight, and ends the request at fault, once it is known."""
        import logging  # which a start need not wait for

        sequences = self.scheduler.revoke([launched.plan for launched in self._in_flight])
        self._in_flight.clear()
        outputs = self.scheduler.blame(sequences, _reason(error))
        fate = ", ".join(f"request {output.id} ends" for output in outputs) or "each is tried alone"
        logging.getLogger("ingle").error("a step of %d requests failed: %s", len(sequences), fate, exc_info=error)
        return outputs

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_steps=self._num_steps,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_prompt_tokens=self._num_prompt_tokens,
        )


def _reason(error: Exception) -> str:
    """For whoever sent the request: what happened within is the log's to tell."""
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "there is not enough memory to compute it: ask for less at once, such as a shorter prompt"
    return "it could not be computed: the server's log says why"
