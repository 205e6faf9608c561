"""One engine for several callers at once: one inside the other in a thread, or in many threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from ingle.request import EngineOutput, EngineRequest


class Works(Protocol):
    @property
    def has_work(self) -> bool: ...


class Stepped(Works, Protocol):
    """What takes requests and brings their outputs, step by step: an `Engine`, or several of them as one."""

    @property
    def scheduler(self) -> Works:
        """Whose work is that of unfinished requests, without steps in flight."""
        ...

    def add(self, request: EngineRequest, /) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def step(self) -> list[EngineOutput]: ...


class SharedEngine:
    """Whoever waits for outputs steps the engine for all, one caller at a time; what comes for others is kept for them.

    So a caller that does not ask, such as a stream that nobody reads on, holds nobody up: its requests go on whenever
    somebody steps.
    """

    def __init__(self, engine: Stepped) -> None:
        self._engine = engine
        self._turn = threading.Condition()
        self._busy = False
        """Some caller has the engine, which takes one at a time."""
        self._num_adding = 0
        """Callers that wait to add requests: they go before the next step."""
        self._calls: dict[str, Call] = {}
        """By the ids of their unfinished requests."""
        self._aborted: deque[str] = deque()
        """Requests that whoever has the engine takes out of it before giving it back."""

    def add(self, requests: Sequence[EngineRequest]) -> Call:
        """Queues requests, all or none. Raises `RequestError` when one cannot be served."""
        call = Call(self, [request.id for request in requests])
        self._acquire()
        try:
            for request in requests:
                self._engine.add(request)
                self._calls[request.id] = call
        except BaseException:
            call.close()
            raise
        finally:
            self._release([])
        return call

    def abort(self, request_ids: Iterable[str]) -> None:
        """Takes requests out, and what is in flight with the last of them, so that its pages return.

        Never waits: a generator that is collected as garbage may call this in the midst of a step.
        """
        for request_id in request_ids:
            self._calls.pop(request_id, None)
            self._aborted.append(request_id)
        with self._turn:
            if self._busy:
                return
            self._busy = True
        self._release([])

    def next_outputs(self, call: Call) -> list[EngineOutput]:
        """Outputs of a call's requests, at least one unless all of them are finished. Steps if nobody else does."""
        while call.unfinished:
            outputs: list[EngineOutput] = []
            mine = False
            try:
                with self._turn:
                    while not call.inbox and (self._busy or self._num_adding):
                        self._turn.wait()
                    if call.inbox:
                        taken, call.inbox = call.inbox, []
                        return taken
                    self._busy = mine = True
                outputs = self._engine.step()
            finally:
                if mine:
                    self._release(outputs)
        return []

    def _acquire(self) -> None:
        with self._turn:
            self._num_adding += 1
            try:
                while self._busy:
                    self._turn.wait()
                self._busy = True
            finally:
                self._num_adding -= 1

    def _release(self, outputs: list[EngineOutput]) -> None:
        """Delivers outputs, does what others left to be done, and lets the next caller have the engine."""
        done = False
        while not done:
            with self._turn:
                for output in outputs:
                    self._deliver(output)
                self._turn.notify_all()
            try:
                outputs = self._take_out()
            except BaseException:
                self._give_up()
                raise
            with self._turn:
                done = not outputs and not self._aborted
                if done:
                    self._give_up()

    def _take_out(self) -> list[EngineOutput]:
        while self._aborted:
            self._engine.abort(self._aborted.popleft())
        outputs: list[EngineOutput] = []
        while self._engine.has_work and not self._engine.scheduler.has_work:
            outputs += self._engine.step()
        return outputs

    def _give_up(self) -> None:
        with self._turn:
            self._busy = False
            self._turn.notify_all()

    def _deliver(self, output: EngineOutput) -> None:
        call = self._calls.get(output.id)
        if call is not None:
            call.inbox.append(output)
            if output.finish_reason is not None:
                del self._calls[output.id]


class Call:
    """Requests that were added together, and their outputs. Closing it takes out those that still run."""

    def __init__(self, engine: SharedEngine, request_ids: Sequence[str]) -> None:
        self.unfinished = set(request_ids)
        self.inbox: list[EngineOutput] = []
        self._engine = engine

    def outputs(self) -> Iterator[EngineOutput]:
        """As they come, until every request is finished or aborted."""
        while self.unfinished:
            for output in self._engine.next_outputs(self):
                if output.id in self.unfinished:  # not aborted since
                    if output.finish_reason is not None:
                        self.unfinished.discard(output.id)
                    yield output

    def abort(self, request_id: str) -> None:
        """Takes out one request; nothing more comes of it."""
        self.unfinished.discard(request_id)
        self._engine.abort([request_id])

    def close(self) -> None:
        unfinished, self.unfinished = self.unfinished, set()
        if unfinished:
            self._engine.abort(unfinished)
