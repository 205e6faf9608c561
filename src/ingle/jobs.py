"""Prompts that are being answered in this process: what is asked of the engine, and what comes of it."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ingle.engine.shared import SharedEngine
from ingle.events import Answer, Event, Finish, Usage
from ingle.request import CompletionOutput, EngineOutput, RequestOutput, SamplingParams
from ingle.text.requests import PromptReader

_RATE = "{task.fields[rate]}"


class YoungGarbageOnly:
    """While any caller is inside, Python's garbage collector looks through what is new only.

    Through all of a process that has imported PyTorch it takes some 0.2 s, in which no step is planned.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._thresholds = gc.get_threshold()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._thresholds = gc.get_threshold()
                gc.set_threshold(*self._thresholds[:2], 1_000_000)
            self._num_inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                gc.set_threshold(*self._thresholds)


young_garbage_only = YoungGarbageOnly()
_bar = threading.Lock()
"""Held by the call whose progress bar is shown: a terminal has room for one."""


class Job:
    """One prompt: its `n` requests, and what has come of them."""

    def __init__(
        self,
        reader: PromptReader,
        request_ids: Iterator[str],
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        continues: bool = True,
        of_chat: bool = False,
    ) -> None:
        """`continues`: the answer goes on where the prompt ends. `of_chat`: the prompt stands as it is; to others the
        tokenizer adds what begins a text.
        """
        self.prompt = prompt if isinstance(prompt, str) else None
        self._asked = reader.read(prompt, params, request_ids, add_special_tokens=not of_chat, continues=continues)
        self.requests = self._asked.requests
        self._streams = {request.id: self._asked.stream(index) for index, request in enumerate(self.requests)}
        self._answer = Answer()

    def take(self, output: EngineOutput) -> Sequence[Event]:
        """What an output of one of the requests brings."""
        events = self._streams[output.id].push(output)
        self._answer.add(events)
        return events

    @property
    def finished(self) -> bool:
        return all(stream.finish_reason is not None for stream in self._streams.values())

    def usage(self) -> Usage:
        return Usage(len(self._asked.token_ids), self._num_cached_tokens(), self.num_tokens)

    @property
    def num_tokens(self) -> int:
        """That were generated so far."""
        return sum(stream.num_tokens for stream in self._streams.values())

    def result(self) -> RequestOutput:
        choices = [choice for _, choice in sorted(self._answer.choices.items())]
        return RequestOutput(
            request_id=self.requests[0].id,
            prompt=self.prompt,
            prompt_token_ids=list(self._asked.token_ids),
            outputs=[
                CompletionOutput(
                    index, choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason, choice.logprobs
                )
                for index, choice in enumerate(choices)
            ],
            num_cached_tokens=self._num_cached_tokens(),
            prompt_logprobs=choices[0].prompt_logprobs,
        )

    def _num_cached_tokens(self) -> int:
        begun = [choice.begin for choice in self._answer.choices.values() if choice.begin is not None]
        return max((begin.num_cached_tokens for begin in begun), default=0)


class AnswerStream(Iterator[Event]):
    """The events of one answer as they come; `Usage` last, unless it was closed before its end."""

    def __init__(self, engine: SharedEngine, job: Job) -> None:
        self._job = job
        self._call = engine.add(job.requests[:1])
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Stops the answer with the step that runs, also from a signal handler or another thread. It never waits."""
        self._call.close()

    def __del__(self) -> None:
        if hasattr(self, "_call"):  # one that the engine refused has none
            self._call.close()

    def _run(self) -> Iterator[Event]:
        with closing(self._call):
            for output in self._call.outputs():
                events = self._job.take(output)
                yield from events
                if has_ended(events):
                    break
        if self._job.finished:
            yield self._job.usage()


def finished(engine: SharedEngine, jobs: Sequence[Job]) -> Iterator[Job]:
    """Jobs as they end, all of which run together. Closed or interrupted, all are taken out of the engine again."""
    job_of = {request.id: job for job in jobs for request in job.requests}
    with young_garbage_only, closing(engine.add([request for job in jobs for request in job.requests])) as call:
        for output in call.outputs():
            job = job_of[output.id]
            if has_ended(job.take(output)):
                if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                    call.abort(output.id)
                if job.finished:
                    yield job


def has_ended(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Finish) for event in events)


def request_ids() -> Iterator[str]:
    return map(str, itertools.count())


@contextmanager
def bar(total: int, *, shown: bool) -> Iterator[Callable[[Job], None]]:
    """A progress bar for one call, to be told of each finished job; none for calls that run beside it."""
    shown = shown and total > 0 and _bar.acquire(blocking=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    num_tokens = 0
    try:
        with Progress(*columns, TextColumn(_RATE), disable=not shown) as progress:
            task, started = progress.add_task("Generating", total=total, rate=""), progress.get_time()

            def done(job: Job) -> None:
                nonlocal num_tokens
                num_tokens += job.num_tokens
                rate = num_tokens / max(progress.get_time() - started, 1e-9)
                progress.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

            yield done
    finally:
        if shown:
            _bar.release()
