"""The offline API: the engine inside this process, or several beside it; text in, text out."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Literal, overload

from ingle.config import EngineConfig, TextConfig
from ingle.engine.build import build_engine
from ingle.engine.check import before_loading
from ingle.engine.shared import SharedEngine, Stepped
from ingle.errors import RequestError
from ingle.events import Text
from ingle.hub.resolve import ensure_model
from ingle.jobs import AnswerStream, Job, bar, finished, request_ids, vectors
from ingle.request import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    EngineRequest,
    PoolingParams,
    RequestOutput,
    SamplingParams,
    ScoringOutput,
    ScoringRequestOutput,
    stopping_at,
)
from ingle.text.chat_call import ChatCall, Conversation, Message, Pair, as_messages, over, read_chat
from ingle.text.chat_template import ChatTemplate
from ingle.text.load import load_text_side
from ingle.text.requests import PromptReader
from ingle.text.reranker import pairs_of, score
from ingle.text.tokenizer import Tokenizer
from ingle.text.user_tokenizer import UserTokenizer
from ingle.text.vectors import Reading, TextReader, numbers

_KEEP_S = 5.0
"""At the end, for prefixes that are to be kept on a disk."""
logger = logging.getLogger("ingle")

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or as vLLM's users write them, {"prompt": "…"} and {"prompt_token_ids": […]}."""

_NOT_HERE = {
    "engine": "with data_parallel_size= there are several, in processes of their own",
    "llm_engine": "the engine is `llm.engine`, the facts of the model `llm.info`",
    "encode": "embed() makes vectors of texts; token ids come from llm.get_tokenizer().encode(text)",
    "classify": "ingle serves no classifying models",
    "reward": "ingle serves no reward models",
    "beam_search": "there is no beam search: generate() with n and temperature gives several answers",
    "set_tokenizer": "the tokenizer is the model's own; chat_template= replaces its template",
    "stream_generate": "stream_chat() gives an answer piece by piece",
    "apply_model": "models are no torch modules here",
    "collective_rpc": "there are no workers to call: the model runs in this process",
    "start_profile": "`ingle bench profile` measures where the time goes",
    "stop_profile": "`ingle bench profile` measures where the time goes",
    "sleep": "delete the LLM to free its memory",
    "wake_up": "an LLM is always awake",
}
"""What vLLM's `LLM` has beside, and what there is instead."""


class LLM:
    """A model and its engine, in this process.

        llm = LLM("smollm2:135m")
        print(llm.generate("The capital of France is")[0].outputs[0].text)

    `model` is what `ingle serve` takes: a name, a model's folder or a .gguf file; `options` are those of
    `ingle.config.EngineConfig.of`, of which `rope_scaling` may also be a dict. `chat_template`, `merge_system`,
    `pooling` and `rerank_template` are those of `ingle.config.TextConfig`. `report` is told what happens while the
    model is loaded, for people. Raises `ModelError` and `ConfigError`.

    It may be used from many threads, and from within the loop over a stream: calls that run at the same time share the
    engine's steps, and each gets its own outputs. In asyncio: `await asyncio.to_thread(llm.generate, prompt)`.
    """

    def __init__(
        self,
        model: str,
        *,
        chat_template: str | None = None,
        merge_system: bool = False,
        pooling: Literal["auto", "last", "mean", "cls"] = "auto",
        rerank_template: Literal["auto", "qwen3", "none"] = "auto",
        report: Callable[[str], None] = lambda stage: None,
        **options: Any,
    ) -> None:
        if isinstance(options.get("rope_scaling"), dict):
            options["rope_scaling"] = json.dumps(options["rope_scaling"])
        config = EngineConfig.of(model, **options)
        source = ensure_model(model)
        report("reading the tokenizer")
        with before_loading(config, source.path):
            text_config = TextConfig(chat_template, merge_system, pooling, rerank_template)
            text = load_text_side(source.path, text_config, source.recommended)
        self.tokenizer = text.tokenizer
        self.chat_template = text.chat_template
        self.default_sampling = text.default_sampling
        stepped = self._load(config, source.path, text.tokenizer, report)
        for notice in [*self.info.notices, *text.notices, *self.tokenizer.hold_against(self.info.vocab_size)]:
            logger.warning("notice: %s", notice)
        self._shared = SharedEngine(stepped)
        self.prompts = PromptReader(self.tokenizer, self.info)
        self.texts = TextReader(self.tokenizer, self.info, text.pooling)
        self.reranker = text.reranker
        self.request_ids = request_ids()

    def _load(self, config: EngineConfig, path: Path, tokenizer: Tokenizer, report: Callable[[str], None]) -> Stepped:
        """What answers: an engine here, or several in processes of their own."""
        if config.parallel.data_parallel_size > 1:
            from ingle.server.offline import OfflineReplicas

            replicas = OfflineReplicas(config, path, report)
            self.info = replicas.info
            return replicas
        self.engine, self.info = build_engine(config, path, report, tokenizer=lambda: tokenizer)
        self.engine.worker.device.if_stuck(_end_at_once)
        if self.engine.keeper is not None:
            weakref.finalize(self, self.engine.close, _KEEP_S)
        return self.engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes each prompt; the outputs are in the order of the prompts.

        One `SamplingParams` serves all prompts, a sequence of them one each, None the model's own defaults.
        `prompt_token_ids` may stand in place of `prompts`. Raises `RequestError` before anything runs when a prompt or
        a parameter cannot be served.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise RequestError("give either prompts or prompt_token_ids")
        batch = _as_batch(prompts if prompt_token_ids is None else prompt_token_ids)
        params = self._params_for(len(batch), sampling_params)
        return self._run_all(self._jobs(batch, params), shown=use_tqdm)

    @overload
    def chat(
        self,
        query: str,
        history: Sequence[Message] | None = None,
        sampling_params: SamplingParams | None = None,
        **options: Any,
    ) -> tuple[str, list[Message]]: ...

    @overload
    def chat(
        self, query: str, history: Sequence[Pair], sampling_params: SamplingParams | None = None, **options: Any
    ) -> tuple[str, list[Pair]]: ...

    @overload
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(self, *said: Any, **named: Any) -> Any: ...

    def chat(self, *said: Any, **named: Any) -> Any:
        """The answer to a question, or to conversations. What was asked with decides what is returned.

        A question, which is text, returns the reply and the history with it, as ChatGLM's, Qwen's and TigerBot's do:

            reply, history = llm.chat("你好", history=None)
            reply, history = llm.chat(query="And now?", history=history, sampling_params=params)

        `history` is messages, or pairs of question and answer, and comes back in the same form (None: messages). A
        tokenizer before the question, as in `chat(tokenizer, query, history)`, is passed over.

        Messages return a list of `RequestOutput`, as vLLM's `LLM.chat` does; a list of conversations, one for each:

            outputs = llm.chat([{"role": "user", "content": "你好"}], sampling_params)
            outputs = llm.chat(messages=[first, second], sampling_params=params, use_tqdm=False)

        Options: `system` (a message before all others), `add_generation_prompt`, `continue_final_message`, `tools` and
        `documents` for the template, `chat_template` (the template itself), `chat_template_kwargs`, and each of
        `SamplingParams` by name. Without any, the model's own defaults hold and an answer may be as long as the
        context. Calls of tools and thoughts stay in the text. Raises `RequestError`.
        """
        call = read_chat(said, named)
        params = self._params_for(len(call.conversations), call.sampling_params, max_tokens=None)
        jobs = [
            self._chat_job(messages, over(each, call.sampling), **self._template_options(call))
            for messages, each in zip(call.conversations, params, strict=True)
        ]
        outputs = self._run_all(jobs, shown=call.use_tqdm and not call.asked_by_text)
        if not call.asked_by_text:
            return outputs
        reply = outputs[0].outputs[0].text
        return reply, call.history_with(reply)

    def stream_chat(
        self,
        messages: str | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        history: Sequence[Message] | Sequence[Pair] | None = None,
    ) -> Iterator[str]:
        """The reply to a conversation, or to a question after a `history`, piece by piece.

        Closing the iterator stops the generation.
        """
        if isinstance(messages, str):
            messages = [*as_messages(history), {"role": "user", "content": messages}]
        with closing(self.chat_events(messages, sampling_params)) as events:
            for event in events:
                if isinstance(event, Text) and event.text:
                    yield event.text

    def chat_events(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> AnswerStream:
        """The answer to a conversation, as events."""
        params = sampling_params or self._default_params(max_tokens=None)
        return AnswerStream(self._shared, self._chat_job(messages, params))

    def prompt_events(self, prompt: str, sampling_params: SamplingParams | None = None) -> AnswerStream:
        """What follows a prompt, as events."""
        return AnswerStream(self._shared, self._job(prompt, sampling_params or self._default_params()))

    def answers(
        self, questions: Sequence[str | Sequence[Message]], sampling_params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Completes prompts and answers conversations, all together; each with its place, as they end.

        Raises `RequestError` before anything runs.
        """
        jobs = self._jobs(questions, sampling_params)
        place = {id(job): index for index, job in enumerate(jobs)}
        for job in finished(self._shared, jobs):
            yield place[id(job)], job.result()

    def num_prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Of a conversation's prompt. Raises `RequestError` for one that the template does not render."""
        return len(self.tokenizer.encode(self._template().prompt(list(messages)), add_special_tokens=False))

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each text, in `outputs.embedding`; any model makes some, by its last token if its files say
        nothing else.

        Options are those of `PoolingParams`, by name, and go before it. `prompt_name` is one of the model's prompts
        (`query`, …), which goes before each text. Raises `RequestError` before anything runs when a text or a
        parameter cannot be served.
        """
        asked = _pooling_params(pooling_params, options)
        reading = Reading(prompt_name=prompt_name, truncate=asked.truncate_prompt_tokens)
        pooling = self.texts.pooling.of(asked.dimensions, asked.normalize)
        requests = [
            self.texts.read(_plain(prompt), pooling, reading, next(self.request_ids), f"prompt {index}")
            for index, prompt in enumerate(_as_batch(prompts))
        ]
        found = self._vectors(requests, "Embedding", shown=use_tqdm)
        return [
            EmbeddingRequestOutput(request.id, EmbeddingOutput(numbers(vector)), list(request.prompt_token_ids))
            for request, vector in zip(requests, found, strict=True)
        ]

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        *,
        instruction: str | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool = True,
    ) -> list[ScoringRequestOutput]:
        """How well each document answers the query, or the query at its place: `outputs.score`, from 0 to 1.

        Raises `RequestError`, also for a model that is no reranker.
        """
        if self.reranker is None:
            raise RequestError(
                "this model is no reranker that ingle knows: rerank_template= (--rerank-template) names one"
            )
        pairs = pairs_of(queries, documents)
        most = self.texts.max_tokens if truncate_prompt_tokens == -1 else truncate_prompt_tokens
        prompts = [self.reranker.prompt(query, text, instruction, most) for query, text in pairs]
        requests = [
            self.texts.request(prompt, self.reranker.pooling, next(self.request_ids), f"document {index}")
            for index, prompt in enumerate(prompts)
        ]
        found = self._vectors(requests, "Scoring", shown=use_tqdm)
        return [
            ScoringRequestOutput(request.id, ScoringOutput(score(numbers(vector))), list(request.prompt_token_ids))
            for request, vector in zip(requests, found, strict=True)
        ]

    def get_tokenizer(self) -> UserTokenizer:
        """`encode`, `decode`, `apply_chat_template` and special tokens, as in transformers."""
        return UserTokenizer(self.tokenizer, self.chat_template)

    def get_default_sampling_params(self) -> SamplingParams:
        """Those that the model's makers recommend, and neutral values for the others."""
        return self._default_params()

    def __getattr__(self, name: str) -> Any:
        hint = _NOT_HERE.get(name)
        raise AttributeError(f"an ingle.LLM has no {name}" + (f": {hint}" if hint else ""))

    def _run_all(self, jobs: Sequence[Job], *, shown: bool) -> list[RequestOutput]:
        with bar(len(jobs), shown=shown) as done:
            for job in finished(self._shared, jobs):
                done(job.num_tokens)
        return [job.result() for job in jobs]

    def _vectors(self, requests: Sequence[EngineRequest], title: str, *, shown: bool) -> list[bytes]:
        with bar(len(requests), shown=shown, title=title) as done:
            return vectors(self._shared, requests, done)

    def _jobs(self, questions: Sequence[Prompt | Sequence[Message]], params: Sequence[SamplingParams]) -> list[Job]:
        jobs = []
        for index, (question, each) in enumerate(zip(questions, params, strict=True)):
            try:
                jobs.append(self._job(question, each))
            except RequestError as error:
                if len(questions) == 1:
                    raise
                raise RequestError(f"prompt {index}: {error}", param=error.param, code=error.code) from None
        return jobs

    def _job(self, question: Prompt | Sequence[Message], params: SamplingParams) -> Job:
        if isinstance(question, Sequence) and question and isinstance(question[0], Mapping):
            return self._chat_job(question, params)  # type: ignore[arg-type]
        return Job(self.prompts, self.request_ids, _plain(question), params)

    def _chat_job(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        template: ChatTemplate | None = None,
        **options: Any,
    ) -> Job:
        """`options` are those of `ChatTemplate.prompt`."""
        prompt = (template or self._template()).prompt(list(messages), **options)
        stopping = stopping_at(params, self.tokenizer.chat_stops)
        continues = bool(options.get("continue_final_message"))
        return Job(self.prompts, self.request_ids, prompt, stopping, continues=continues, of_chat=True)

    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: give one with chat_template= (--chat-template), or use generate()"
            )
        return self.chat_template

    def _template_options(self, call: ChatCall) -> dict[str, Any]:
        options = dict(call.template)
        source = options.pop("chat_template", None)
        if source is not None:
            options["template"] = ChatTemplate(source, self.tokenizer.special_tokens)
        return options

    def _params_for(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None, **defaults: Any
    ) -> list[SamplingParams]:
        if params is None:
            params = self._default_params(**defaults)
        if isinstance(params, SamplingParams):
            return [params] * count
        if not isinstance(params, Sequence) or not all(isinstance(each, SamplingParams) for each in params):
            raise RequestError(f"sampling_params is a {type(params).__name__}: give SamplingParams, one or a list")
        if len(params) != count:
            raise RequestError(f"{count} prompts and {len(params)} sampling_params: give one for all or one each")
        return list(params)

    def _default_params(self, **overrides: Any) -> SamplingParams:
        return SamplingParams(**{**self.default_sampling, **overrides})


def _pooling_params(params: PoolingParams | None, options: Mapping[str, Any]) -> PoolingParams:
    base = PoolingParams() if params is None else params
    known = PoolingParams.__struct_fields__
    if others := sorted(options.keys() - set(known)):
        raise RequestError(f"embed() has no option {others[0]!r:.60}: it takes {', '.join(known)}")
    return PoolingParams(**{name: options.get(name, getattr(base, name)) for name in known})


def _end_at_once(reason: str) -> None:
    """A step will never end, and nothing in this process can interrupt it."""
    logger.critical("%s; this process waits for a GPU that never answers, and ends", reason)
    os._exit(1)


def _as_batch(prompts: Any) -> list[Prompt]:
    """One prompt or many: text is one prompt, and so are a flat sequence of token ids and a dict."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts are a {type(prompts).__name__}: give text, token ids, or a list of such")
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)


def _plain(prompt: Any) -> str | Sequence[int]:
    """The text or token ids of a prompt."""
    if isinstance(prompt, Mapping):
        named = {name: value for name, value in prompt.items() if value is not None}
        others = sorted(map(str, named.keys() - {"prompt", "prompt_token_ids"}))
        if others:
            raise RequestError(
                f"a prompt holds {others[0]!r:.60}: give prompt or prompt_token_ids alone", param="prompt"
            )
        if not named:
            raise RequestError('a prompt is empty: give {"prompt": "…"} or {"prompt_token_ids": […]}', param="prompt")
        prompt = named.get("prompt_token_ids", named.get("prompt"))
    if not isinstance(prompt, str | Sequence):
        raise RequestError(f"the prompt is a {type(prompt).__name__}: give text or token ids", param="prompt")
    return prompt
