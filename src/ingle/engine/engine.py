"""The engine: requests of tokens in, tokens out, one step at a time."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import msgspec

from ingle.channel import EngineStats
from ingle.engine.facts import EngineFacts
from ingle.engine.masks import Both, FailedMask, TokenLists, TokenMask, pack_mask
from ingle.engine.scheduler import Plan, Scheduler
from ingle.engine.worker import RunningStep, Worker
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, check_request
from ingle.step import Masks


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    running: RunningStep | None = None
    """None while it is being launched."""


class Engine:
    """Owns the plan and the device. Not thread-safe: one thread adds, steps and aborts.

    Up to `max_in_flight` steps are launched before the oldest of them is retired: with two, the device computes while
    Python plans; with one, each step is retired at once. Any number runs the same functions and gives the same tokens.
    """

    def __init__(
        self, scheduler: Scheduler, worker: Worker, facts: EngineFacts, *, max_in_flight: int, seed: int
    ) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.facts = facts
        self._max_in_flight = max_in_flight
        self._seeds = random.Random(seed)
        self._in_flight: deque[_InFlight] = deque()
        self._masks: dict[str, TokenMask] = {}
        self._num_steps = 0
        self._num_prompt_tokens = 0

    def add(self, request: EngineRequest, mask: TokenMask | None = None) -> None:
        """Queues a request, whose answer `mask` restricts. Raises `RequestError` when it cannot be served.

        End tokens that the model cannot give end nothing, so they are left out.
        """
        vocab_size = self.facts.vocab_size
        check_request(request, vocab_size=vocab_size, max_model_len=self.scheduler.limits.max_model_len)
        ends = tuple(token_id for token_id in request.eos_token_ids if 0 <= token_id < vocab_size)
        request, seed = msgspec.structs.replace(request, eos_token_ids=ends), request.sampling.seed
        seed = self._seeds.getrandbits(63) if seed is None else seed
        lists = TokenLists.of(request, vocab_size)
        if lists is not None:
            mask = lists if mask is None else Both(mask, lists)
        self.scheduler.add(request, seed, masked=mask is not None)
        if mask is not None:
            self._masks[request.id] = mask

    def abort(self, request_id: str) -> None:
        """Takes a request out of the batch before the next step; unknown or finished ones are left alone."""
        self.scheduler.abort(request_id)
        self._masks.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or a launched step is not retired."""
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> list[EngineOutput]:
        """Plan, launch, retire. Returns what became known, which is that of an earlier step where some are in flight.

        A step that raises an exception costs the request that is at fault, and no other. Raises when the device itself
        is lost.
        """
        plan = self.scheduler.plan()
        if plan is None and not self._in_flight and self.scheduler.has_work:
            raise EngineError("requests are queued, but no step can be planned for any of them")
        outputs: list[EngineOutput] = []
        try:
            if plan is not None:
                self._launch(plan)
            if plan is not None and plan.step.masked:
                self._retire(outputs, num_kept=1)  # what may come next depends on what came
                self._sample(self._in_flight[-1], self._allowed(plan))
            self._retire(outputs, num_kept=0 if plan is None else self._max_in_flight - 1)
        except Exception as error:
            if not self.worker.device.usable():
                raise
            outputs += self._recover(error)
        return outputs

    def _launch(self, plan: Plan) -> None:
        """Queues a step: all of it, or but for the draw where that is masked."""
        self._in_flight.append(_InFlight(plan))
        self._in_flight[-1].running = self.worker.forward(plan.step)
        if not plan.step.masked:
            self._sample(self._in_flight[-1], {})
        self._num_steps += 1
        self._num_prompt_tokens += plan.step.num_tokens - plan.step.num_decodes

    def _sample(self, launched: _InFlight, masks: Masks) -> None:
        assert launched.running is not None
        self.worker.sample(launched.running, masks)

    def _allowed(self, plan: Plan) -> Masks:
        """The masks of a step's sequences, all of whose tokens are known."""
        masks: Masks = {}
        for chunk, seq in zip(plan.step.chunks, plan.sequences, strict=True):
            mask = self._masks.get(seq.id)
            if chunk.samples and mask is not None and (allowed := mask.allowed()) is not None:
                masks[chunk.slot] = pack_mask(allowed, self.facts.vocab_size)
        return masks

    def _retire(self, outputs: list[EngineOutput], num_kept: int) -> None:
        """Takes in the oldest steps in flight, but for `num_kept`, and appends what they brought."""
        while len(self._in_flight) > num_kept:
            running = self._in_flight[0].running
            assert running is not None
            result = self.worker.result(running)
            new = self.scheduler.retire(self._in_flight.popleft().plan, result)
            self._tell_masks(new)
            outputs += new

    def _tell_masks(self, outputs: list[EngineOutput]) -> None:
        """Of the tokens that came. What one raises is its own request's, which has to end once it is asked again."""
        for output in outputs if self._masks else ():
            mask = self._masks.get(output.id)
            if mask is None:
                continue
            try:
                for token_id in output.token_ids:
                    mask.take(token_id)
            except Exception as error:
                self._masks[output.id] = FailedMask(error)
            if output.finish_reason is not None:
                del self._masks[output.id]

    def _recover(self, error: Exception) -> list[EngineOutput]:
        """Takes back what is in flight, and ends the request at fault, once it is known."""
        import logging  # which a start need not wait for

        sequences = self.scheduler.revoke([launched.plan for launched in self._in_flight])
        self._in_flight.clear()
        outputs = self.scheduler.blame(sequences, _reason(error))
        for output in outputs:
            self._masks.pop(output.id, None)
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
