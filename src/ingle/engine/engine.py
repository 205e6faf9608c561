"""The engine: requests of tokens in, tokens out, one step at a time."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from ingle.channel import EngineStats
from ingle.engine.counts import StepCounts, Waits
from ingle.engine.facts import EngineFacts
from ingle.engine.grammar import Grammars, Use
from ingle.engine.masks import Filled, MaskTable, TokenLists, TokenMask
from ingle.engine.scheduler import Scheduler
from ingle.engine.sequence import Plan, Sequence
from ingle.engine.worker import RunningStep, Worker
from ingle.errors import EngineError, RequestError, lack_of_memory
from ingle.request import EngineOutput, EngineRequest, check_request
from ingle.step import Masks, StepResult

if TYPE_CHECKING:
    import logging

    from ingle.engine.tiers.keeper import PageKeeper

_NO_MASKS = Masks()
_NO_MEMORY = "there is not enough memory to compute it: ask for less at once, such as a shorter prompt"
_UNKNOWN = "it could not be computed: the server's log says why"
"""For whoever sent a request: what happened within is the log's to tell."""
_UNBOUND = "what its answer has to follow failed"
_COMPILE_S = 0.005
"""For which a step waits for a grammar where there is nothing else to do."""
_READ_S = 0.005
"""The same for pages that are read from a lower tier."""


@dataclass(slots=True)
class _InFlight:
    plan: Plan
    launched_at_s: float
    running: RunningStep | None = None
    """None while it is being launched."""


@dataclass(frozen=True, slots=True)
class _Compiling:
    """A request that waits for its grammar."""

    request: EngineRequest
    seed: int
    use: Use


class Engine:
    """Owns the plan and the device. Not thread-safe: one thread adds, steps and aborts.

    Up to `max_in_flight` steps are launched before the oldest of them is retired: with two, the device computes while
    Python plans; with one, each step is retired at once. Any number runs the same functions and gives the same tokens.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        worker: Worker,
        facts: EngineFacts,
        *,
        max_in_flight: int,
        seed: int,
        grammars: Grammars | None = None,
        keeper: PageKeeper | None = None,
    ) -> None:
        """Without `grammars`, requests that bring one are refused. `keeper`: the scheduler's, if it has one."""
        self.scheduler = scheduler
        self.worker = worker
        self.facts = facts
        self._max_in_flight = max_in_flight
        self._in_turns = scheduler.limits.num_turns > 1
        self._seeds = random.Random(seed)
        self._in_flight: deque[_InFlight] = deque()
        self._planned: Plan | None = None
        """The next step, where there was time to plan it."""
        self.grammars = grammars
        self.keeper = keeper
        self._compiling: dict[str, _Compiling] = {}
        if grammars is None:
            self._masks = MaskTable(facts.vocab_size)
        else:
            self._masks = MaskTable(facts.vocab_size, grammars.fill_rows)
        self.begins: Callable[[list[str]], None] | None = None
        """Told the ids of requests before anything is computed of them."""
        self._counts = StepCounts()
        self.waits: Waits | None = None
        """Given by whoever wants first outputs to say how long their requests waited."""
        self.clock = time.perf_counter
        """Of the seconds that steps take."""
        self._retired_at_s = 0.0

    def add(self, request: EngineRequest, mask: TokenMask | None = None) -> None:
        """Queues a request, whose answer `mask` restricts. Raises `RequestError` when it cannot be served.

        End tokens that the model cannot give end nothing, so they are left out. One that brings a grammar waits until
        that is compiled, in a thread; no other does.
        """
        vocab_size = self.facts.vocab_size
        check_request(request, vocab_size=vocab_size, max_model_len=self.scheduler.limits.max_model_len)
        ends = tuple(token_id for token_id in request.eos_token_ids if 0 <= token_id < vocab_size)
        request, seed = msgspec.structs.replace(request, eos_token_ids=ends), request.sampling.seed
        seed = self._seeds.getrandbits(63) if seed is None else seed
        if request.grammar is None:
            self._queue(request, seed, mask)
        elif self.grammars is None:
            raise RequestError("this engine has no vocabulary, which grammars need", param="structured_outputs")
        elif request.id in self._compiling:
            raise ValueError(f"request id {request.id!r} is already in use")
        else:
            if self.begins is not None:
                self.begins([request.id])
            self._compiling[request.id] = _Compiling(request, seed, self.grammars.compile(request.grammar))
        if self.waits is not None:
            self.waits.begin(request.id)

    def _queue(self, request: EngineRequest, seed: int, mask: TokenMask | None) -> None:
        lists = TokenLists.of(request, self.facts.vocab_size)
        self.scheduler.add(request, seed, masked=mask is not None or lists is not None)
        self._masks.add(request.id, mask, lists)

    def abort(self, request_id: str) -> None:
        """Takes a request out of the batch before the next step; unknown or finished ones are left alone."""
        self._compiling.pop(request_id, None)
        self.scheduler.abort(request_id)
        self._masks.drop(request_id)
        if self.waits is not None:
            self.waits.drop(request_id)

    @property
    def has_work(self) -> bool:
        """True while a request is unfinished or a launched step is not retired."""
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._compiling) or self._planned is not None

    def step(self) -> list[EngineOutput]:
        """Plan, launch, retire. Returns what became known, which is that of an earlier step where some are in flight.

        A step that raises an exception costs the request that is at fault, and no other. Raises when the device itself
        is lost.
        """
        outputs = self._take_compiled() if self._compiling else []
        plan, self._planned = self._planned or self.scheduler.plan(), None
        if plan is not None and plan.step.admissions and self.begins is not None:
            admitted = {admission.slot for admission in plan.step.admissions}
            self.begins([seq.id for seq in plan.sequences if seq.slot in admitted])
        if plan is not None and plan.step.admissions and self.waits is not None:
            self.waits.end(plan)
        if plan is None and not self._in_flight and self.scheduler.has_work:
            if self.keeper is not None and self.scheduler.arrivals.is_reading:
                self.keeper.wait(_READ_S)
                return outputs
            raise EngineError("requests are queued, but no step can be planned for any of them")
        try:
            if plan is not None and plan.step.masked:
                self._masked_step(plan, outputs)
            elif plan is not None:
                self._launch(plan)
                self._sample(self._in_flight[-1], _NO_MASKS)
            self._retire(outputs, num_kept=self._num_kept(plan))
        except Exception as error:
            if not self.worker.device.usable():
                raise
            outputs += self._recover(error)
        if self.waits is not None:
            self.waits.tell(outputs)
        return outputs

    def _num_kept(self, plan: Plan | None) -> int:
        """Steps that stay in flight. Where sequences take turns, the oldest makes room for the next plan."""
        if plan is not None:
            return self._max_in_flight - 1
        return len(self._in_flight) - 1 if self._in_turns else 0

    def _take_compiled(self) -> list[EngineOutput]:
        """Queues the requests whose grammars are compiled. Returns an error for those that do not compile.

        Where there is nothing else to do, waits for some milliseconds.
        """
        if not self.scheduler.has_work and not self._in_flight:
            wait([each.use.compiled for each in self._compiling.values()], _COMPILE_S, FIRST_COMPLETED)
        outputs: list[EngineOutput] = []
        for each in [each for each in self._compiling.values() if each.use.compiled.done()]:
            request = self._compiling.pop(each.request.id).request
            assert self.grammars is not None and request.grammar is not None
            error = each.use.compiled.exception()
            if error is None:
                self._queue(request, each.seed, self.grammars.mask(request.grammar, each.use))
            else:
                outputs.append(self._failed(request.id, error, "its grammar could not be compiled"))
        return outputs

    @staticmethod
    def _failed(request_id: str, error: BaseException, what: str) -> EngineOutput:
        """The end of one request. `what` was done; what of our own went wrong is the log's to tell."""
        refused = isinstance(error, RequestError)
        if not refused:
            _logger().error("request %s: %s", request_id, what, exc_info=error)
        text = str(error) if refused else f"{what}: the server's log says why"
        return EngineOutput(request_id, [], "error", error=text, refused=refused)

    def _masked_step(self, plan: Plan, outputs: list[EngineOutput]) -> None:
        """Launches a step whose masks are filled while it is computed, and retires those before it."""
        filling = self._fill(plan) if self._in_turns or not self._in_flight else None
        self._launch(plan)
        while len(self._in_flight) > 1 and not self._in_turns:  # what may come next depends on what came
            retired = self._wait()
            if len(self._in_flight) == 1:
                filling = self._fill(plan)
            outputs += self._settle(*retired)
        assert filling is not None
        if self._max_in_flight > 1 and not self._in_turns:
            self._planned = self.scheduler.plan()
        filled = filling.result()
        self._sample(self._in_flight[-1], filled.masks)
        for request_id, error in filled.failed.items():
            if request_id in self._masks:
                self.abort(request_id)
                outputs.append(self._failed(request_id, error, _UNBOUND))

    def _fill(self, plan: Plan) -> Future[Filled]:
        """The masks of a step's sequences, all of whose tokens are known."""
        pairs = zip(plan.step.chunks, plan.sequences, strict=True)
        return self._masks.fill([(chunk.slot, seq.id) for chunk, seq in pairs if chunk.samples and seq.masked])

    def _launch(self, plan: Plan) -> None:
        """Queues a step but for the draw."""
        self._in_flight.append(_InFlight(plan, self.clock()))
        self._in_flight[-1].running = self.worker.forward(plan.step)
        self._counts.launched(plan.step)

    def _sample(self, launched: _InFlight, masks: Masks) -> None:
        assert launched.running is not None
        self.worker.sample(launched.running, masks)

    def _retire(self, outputs: list[EngineOutput], num_kept: int) -> None:
        """Takes in the oldest steps in flight, but for `num_kept`, and appends what they brought."""
        while len(self._in_flight) > num_kept:
            outputs += self._settle(*self._wait())

    def _wait(self) -> tuple[Plan, StepResult, dict[str, bool | Exception]]:
        """The oldest step in flight, what it computed, and which masks say that an answer has ended, or raise."""
        running = self._in_flight[0].running
        assert running is not None
        result = self.worker.result(running)
        retired = self._in_flight.popleft()
        self._learn_pace(retired)
        return retired.plan, result, self._masks.take_all(_drawn(retired.plan, result)) if self._masks else {}

    def _learn_pace(self, retired: _InFlight) -> None:
        """How long the device took: since the step was launched, or since the one before it was done."""
        step, began_s = retired.plan.step, max(retired.launched_at_s, self._retired_at_s)
        self._retired_at_s = self.clock()
        self.scheduler.pace.learn(step.num_tokens - step.num_decodes, self._retired_at_s - began_s)

    def _settle(self, plan: Plan, result: StepResult, ended: dict[str, bool | Exception]) -> list[EngineOutput]:
        outputs = self.scheduler.retire(plan, result)
        return [self._told(output, ended) for output in outputs] if self._masks else outputs

    def _told(self, output: EngineOutput, ended_by_id: dict[str, bool | Exception]) -> EngineOutput:
        """An output whose tokens its mask has heard of, with those that have to follow.

        The answer may have ended with them. What a mask raises is its own request's, which ends too.
        """
        try:
            ended = ended_by_id.get(output.id)
            if isinstance(ended, Exception):
                raise ended
            if ended is None:
                ended = bool(output.token_ids) and self._masks.take(output.id, output.token_ids)
            num_drawn = len(output.token_ids)
            if num_drawn and output.finish_reason is None and not ended and self.scheduler.may_jump(output.id):
                output = self.scheduler.jump(output, self._masks.forced(output.id))
                ended = self._masks.take(output.id, output.token_ids[num_drawn:])
        except Exception as error:
            self.abort(output.id)
            failed = self._failed(output.id, error, _UNBOUND)
            return msgspec.structs.replace(output, finish_reason="error", error=failed.error, refused=failed.refused)
        if output.finish_reason is not None:
            self._masks.drop(output.id)
        elif ended:
            self.abort(output.id)
            return msgspec.structs.replace(output, finish_reason="stop", complete=True)
        return output

    def _recover(self, error: Exception) -> list[EngineOutput]:
        """Takes back what is in flight, and ends the request at fault, once it is known."""
        plans = [launched.plan for launched in self._in_flight]
        sequences = self.scheduler.revoke(plans if self._planned is None else [*plans, self._planned])
        self._in_flight.clear()
        self._planned = None
        self._counts.num_failed += 1
        if not _ran_out_of_memory(error):
            return self._blamed(sequences, error, self.scheduler.blame(sequences, _UNKNOWN))
        self.worker.device.relieve()
        num_tokens = max((plan.step.num_tokens - plan.step.num_decodes for plan in plans), default=0)
        if (most := self.scheduler.pace.shrink(num_tokens)) is not None:
            _logger().warning(
                "memory ran out in a step that read %d tokens of prompts: the next read %d", num_tokens, most
            )
            return []
        return self._blamed(sequences, error, self.scheduler.blame(sequences, _NO_MEMORY, max_trials=1))

    def _blamed(self, sequences: list[Sequence], error: Exception, outputs: list[EngineOutput]) -> list[EngineOutput]:
        for output in outputs:
            self._masks.drop(output.id)
        fate = ", ".join(f"request {output.id} ends" for output in outputs) or "each is tried alone"
        _logger().error("a step of %d requests failed: %s", len(sequences), fate, exc_info=error)
        return outputs

    def close(self, timeout_s: float) -> None:
        """Has what is computed kept in lower tiers, if there are any and that takes no longer. Nothing comes after."""
        if self.keeper is not None:
            self.keeper.flush(timeout_s)
            self.keeper.stop()

    def stats(self) -> EngineStats:
        scheduler, pages, counts = self.scheduler, self.scheduler.pages, self._counts
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting + len(self._compiling),
            num_compiling=len(self._compiling),
            num_pages=pages.capacity,
            num_used_pages=pages.capacity - pages.num_available,
            num_cached_pages=pages.num_cached,
            num_steps=counts.num_steps,
            num_failed_steps=counts.num_failed,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_step_tokens=counts.num_tokens,
            step_tokens=tuple(counts.by_tokens),
            num_queried_tokens=scheduler.num_queried_tokens,
            num_hit_tokens=scheduler.num_hit_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_lower_queried_tokens=scheduler.num_lower_queried_tokens,
            num_lower_hit_tokens=scheduler.num_lower_hit_tokens,
            num_dropped_pages=0 if self.keeper is None else self.keeper.num_dropped,
            tiers=() if self.keeper is None else self.keeper.stats(),
        )


def _drawn(plan: Plan, result: StepResult) -> list[tuple[str, int]]:
    """The tokens of sequences that have a mask and got one token each."""
    drawing = (seq for chunk, seq in zip(plan.step.chunks, plan.sequences, strict=True) if chunk.samples)
    pairs = zip(drawing, result.token_ids, strict=True)
    return [(seq.id, ids[0]) for seq, ids in pairs if seq.masked and len(ids) == 1 and not seq.finished]


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether it says so, or what it came of: a CUDA graph's capture that is cut short brings an error of its own."""
    while error is not None:
        if "out of memory" in str(error) or lack_of_memory(error) is not None:
            return True
        error = error.__context__
    return False


def _logger() -> logging.Logger:
    import logging  # which a start need not wait for

    return logging.getLogger("ingle")
