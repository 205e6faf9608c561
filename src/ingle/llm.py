"""The offline API: the engine inside this process, text in, text out."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ingle.config import EngineConfig, TextConfig
from ingle.engine.build import build_engine
from ingle.engine.check import before_loading
from ingle.engine.shared import SharedEngine
from ingle.errors import RequestError
from ingle.events import Answer, Event, Finish, Text
from ingle.hub.resolve import ensure_model
from ingle.request import CompletionOutput, EngineOutput, RequestOutput, SamplingParams, stopping_at
from ingle.text.load import load_text_side
from ingle.text.requests import PromptReader

logger = logging.getLogger("ingle")

Prompt = str | Sequence[int]
Message = dict[str, Any]


class _YoungGarbageOnly:
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


_young_garbage_only = _YoungGarbageOnly()
_bar = threading.Lock()
"""Held by the call whose progress bar is shown: a terminal has room for one."""


class LLM:
    """A model and its engine, in this process.

        llm = LLM("smollm2:135m")
        print(llm.generate("The capital of France is")[0].outputs[0].text)

    `model` is a short name, a Hugging Face folder or a .gguf file; `options` are those of
    `ingle.config.EngineConfig.of`, of which `rope_scaling` may also be a dict. Raises `ModelError` and `ConfigError`.

    It may be used from many threads, and from within the loop over a stream: calls that run at the same time share the
    engine's steps, and each gets its own outputs. In asyncio: `await asyncio.to_thread(llm.generate, prompt)`.
    """

    def __init__(self, model: str, *, chat_template: str | None = None, **options: Any) -> None:
        if isinstance(options.get("rope_scaling"), dict):
            options["rope_scaling"] = json.dumps(options["rope_scaling"])
        config = EngineConfig.of(model, **options)
        source = ensure_model(model)
        with before_loading(config, source.path):
            text = load_text_side(source.path, TextConfig(chat_template))
        self.tokenizer = text.tokenizer
        self.chat_template = text.chat_template
        self.default_sampling = text.default_sampling
        self.engine, self.info = build_engine(config, Path(source.path))
        for notice in [*self.info.notices, *self.tokenizer.hold_against(self.info.vocab_size)]:
            logger.warning("notice: %s", notice)
        self._shared = SharedEngine(self.engine)
        self.prompts = PromptReader(self.tokenizer, self.info)
        self.request_ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt, text or token ids; the outputs are in the order of the prompts.

        One `SamplingParams` serves all prompts, a sequence of them one each, None the model's own defaults.
        Raises `RequestError` before anything runs when a prompt or a parameter cannot be served.
        """
        batch = _as_batch(prompts)
        params = self._params_for(batch, sampling_params)
        jobs = [self._job(index, len(batch), *pair) for index, pair in enumerate(zip(batch, params, strict=True))]
        with _young_garbage_only, _progress(len(jobs), shown=use_tqdm) as progress:
            task = progress.add_task("Generating", total=len(jobs), rate="")
            self._run(jobs, progress, task)
        return [job.result() for job in jobs]

    def chat(
        self,
        message: str | Sequence[Message],
        history: Sequence[Message] | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> tuple[str, list[Message]]:
        """The model's reply, and the conversation with it: `reply, history = llm.chat("你好", history=None)`.

        `message` is the user's text, or messages that continue `history`.
        """
        if isinstance(history, SamplingParams):  # as in vLLM, where it comes second
            raise RequestError("the second argument is the history: give parameters as sampling_params=")
        new = [{"role": "user", "content": message}] if isinstance(message, str) else list(message)
        messages = [*(history or ()), *new]
        reply = "".join(self.stream_chat(messages, sampling_params))
        return reply, [*messages, {"role": "assistant", "content": reply}]

    def stream_chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """The reply to a conversation, piece by piece. Closing the iterator stops the generation."""
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: give one with chat_template= (--chat-template), or use generate()"
            )
        params = stopping_at(sampling_params or self._default_params(max_tokens=None), self.tokenizer.chat_stops)
        job = _Job(self, self.chat_template.prompt(list(messages)), params, continues=False)
        with closing(self._shared.add(job.requests[:1])) as call:
            for output in call.outputs():
                events = job.take(output)
                yield "".join(event.text for event in events if isinstance(event, Text))
                if _has_ended(events):
                    return

    def _run(self, jobs: Sequence[_Job], progress: Progress, task: Any) -> None:
        """Until every job is done; when it is interrupted, all are taken out of the engine again."""
        job_of = {request.id: job for job in jobs for request in job.requests}
        started, num_tokens = progress.get_time(), 0
        with closing(self._shared.add([request for job in jobs for request in job.requests])) as call:
            for output in call.outputs():
                job = job_of[output.id]
                num_tokens += len(output.token_ids)
                if _has_ended(job.take(output)):
                    if output.finish_reason is None:  # a stop string, which the engine knows nothing of
                        call.abort(output.id)
                    if job.finished:
                        rate = num_tokens / max(progress.get_time() - started, 1e-9)
                        progress.update(task, advance=1, rate=f"{rate:,.0f} tokens/s")

    def _job(self, index: int, num_prompts: int, prompt: Prompt, params: SamplingParams) -> _Job:
        try:
            return _Job(self, prompt, params)
        except RequestError as error:
            if num_prompts == 1:
                raise
            raise RequestError(f"prompt {index}: {error}", param=error.param, code=error.code) from None

    def _params_for(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self._default_params()
        if isinstance(params, SamplingParams):
            return [params] * len(prompts)
        if len(params) != len(prompts):
            raise RequestError(
                f"{len(prompts)} prompts and {len(params)} sampling_params: give one for all or one each"
            )
        return list(params)

    def _default_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{**self.default_sampling, **overrides})


class _Job:
    """One prompt: its `n` requests, and what has come of them."""

    def __init__(self, llm: LLM, prompt: Prompt, params: SamplingParams, *, continues: bool = True) -> None:
        if not isinstance(prompt, str | Sequence):
            raise RequestError(f"the prompt is a {type(prompt).__name__}: give text or token ids", param="prompt")
        self.prompt = prompt if isinstance(prompt, str) else None
        self._asked = llm.prompts.read(
            prompt, params, llm.request_ids, add_special_tokens=continues, continues=continues
        )
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

    def result(self) -> RequestOutput:
        choices = [choice for _, choice in sorted(self._answer.choices.items())]
        begun = [choice.begin for choice in choices if choice.begin is not None]
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
            num_cached_tokens=max(begin.num_cached_tokens for begin in begun),
            prompt_logprobs=choices[0].prompt_logprobs,
        )


def _has_ended(events: Sequence[Event]) -> bool:
    return any(isinstance(event, Finish) for event in events)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many: text is one prompt, and so is a flat sequence of token ids."""
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are a {type(prompts).__name__}: give text, token ids, or a list of such")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


@contextmanager
def _progress(total: int, *, shown: bool) -> Iterator[Progress]:
    """A bar for one call; none for those that run beside it."""
    shown = shown and total > 0 and _bar.acquire(blocking=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TextColumn("{task.fields[rate]}"), disable=not shown) as progress:
            yield progress
    finally:
        if shown:
            _bar.release()
