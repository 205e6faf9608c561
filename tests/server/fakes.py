"""A scripted engine, and how tests read what the server answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.types import ASGIApp

from ingle.channel import EngineStats
from ingle.config.access import ApiKey
from ingle.errors import EngineError
from ingle.request import EngineOutput, EngineRequest, TokenLogprobs
from ingle.server.access import Access
from ingle.server.app import create_app
from ingle.server.engine_client import caller, in_background
from ingle.server.graceful import http_config
from ingle.server.http_limits import HttpLimits, OpenConnections
from ingle.server.models import ModelPool, ServedModel
from ingle.text.load import TextSide
from ingle.text.tokenizer import Tokenizer

MODEL = "tiny/bytes"
MAX_MODEL_LEN = 256
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if shout is defined %}SHOUT{% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GREETING = "Hello, wörld 你好 😀!"


@dataclass
class Info:
    max_model_len: int
    vocab_size: int
    device: str = "cpu"
    dtype: str = "float32"
    family: str = "llama"
    writes_text: bool = True
    hidden_size: int = 8
    max_num_seqs: int = 8
    num_parameters: int = 1000
    stored_types: dict[str, int] = field(default_factory=lambda: {"Q8_0": 900, "F32": 100})
    expanded_types: list[str] = field(default_factory=lambda: ["Q8_0"])
    weight_bytes: int = 4000
    kv_cache_bytes: int = 2000
    num_pages: int = 33
    page_size: int = 16
    kv_dtype: str = "float32"


@dataclass
class Health:
    ok: bool = True
    detail: str = "ok"
    status: str = "ok"
    retry_after_s: int | None = None


@dataclass
class ScriptedEngine:
    """Answers every request with `reply(request)`, some tokens a step, and remembers what was asked and aborted."""

    tokenizer: Tokenizer
    info: Info
    reply: Callable[[EngineRequest], Iterable[int]]
    tokens_per_step: int = 1
    step_s: float = 0.0
    num_cached_tokens: Callable[[EngineRequest], int] = lambda request: 0
    fail_after: int | None = None
    """Tokens after which a request ends with an error."""
    busy: bool = False
    """That error is one of the moment."""
    die_after: int | None = None
    """Tokens after which the engine is dead."""
    status: Health = field(default_factory=Health)
    stats: EngineStats = field(default_factory=EngineStats)
    pid: int = field(default_factory=os.getpid)
    requests: list[EngineRequest] = field(default_factory=list)
    in_background: list[bool] = field(default_factory=list)
    """Of each of them, whether it may wait for others."""
    callers: list[str] = field(default_factory=list)
    """The same: who asked."""
    aborted: list[str] = field(default_factory=list)
    running: int = 0
    num_restarts: int = 0
    num_steps: int = 0

    def say(self, text: str) -> None:
        tokens = [*self.tokenizer.encode(text, add_special_tokens=False), *self.tokenizer.eos_token_ids[:1]]
        self.reply = lambda request: tokens

    @property
    def engines(self) -> list[ScriptedEngine]:
        return [self]

    def health(self) -> Health:
        return self.status

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        if not self.status.ok:
            raise EngineError(self.status.detail)
        self.requests.append(request)
        self.in_background.append(in_background.get())
        self.callers.append(caller.get())
        self.running += 1
        finished = False
        try:
            for output in self._outputs(request):
                await asyncio.sleep(self.step_s)
                finished = output.finish_reason is not None
                self.num_steps += 1
                yield output
                if finished:
                    return
        finally:
            self.running -= 1
            if not finished:
                self.aborted.append(request.id)

    def _outputs(self, request: EngineRequest) -> Iterator[EngineOutput]:
        """The reply, over and over until something ends it."""
        sampling = request.sampling
        if sampling.max_tokens == 0:
            yield self._output(request, [], "length", first=True)
            return
        step: list[int] = []
        for count, token in enumerate(itertools.cycle(self.reply(request))):
            if count == self.fail_after:
                yield EngineOutput(request.id, [], "error", error="the logits are not finite", busy=self.busy)
            if count == self.die_after:
                raise EngineError("killed by SIGKILL")
            step.append(token)
            ended = token in request.eos_token_ids and not sampling.ignore_eos
            reason = "stop" if ended else "length" if count + 1 == sampling.max_tokens else None
            if reason or len(step) == self.tokens_per_step:
                yield self._output(request, step, reason, first=count < len(step))
                step = []

    def _output(self, request: EngineRequest, step: list[int], reason: Any, first: bool) -> EngineOutput:
        sampling, prompt = request.sampling, request.prompt_token_ids
        logprobs = prompt_logprobs = None
        if sampling.logprobs is not None:
            logprobs = [scored(token, sampling.logprobs) for token in step]
        if sampling.prompt_logprobs is not None and first:
            prompt_logprobs = [None, *(scored(token, sampling.prompt_logprobs) for token in prompt[1:])]
        cached = self.num_cached_tokens(request) if first else 0
        return EngineOutput(request.id, list(step), reason, None, cached, logprobs, prompt_logprobs)


def scored(token: int, num_top: int) -> TokenLogprobs:
    """A made-up entry: the token itself is second, after its predecessor."""
    top = [token - 1, token, *range(token + 1, token + num_top - 1)][:num_top]
    return TokenLogprobs([token, *top], [-1.5, *(-0.5 - index for index in range(num_top))], 2)


def app_for(model: ServedModel, **changes: Any) -> Starlette:
    """The application of one model, with other fields of the model, its text side or the access, or other options."""

    def taken(kind: type) -> dict[str, Any]:
        return {name.name: changes.pop(name.name) for name in fields(kind) if name.name in changes}

    if keys := changes.get("api_keys"):
        changes["api_keys"] = tuple(ApiKey(key) if isinstance(key, str) else key for key in keys)
    access, text = Access(**taken(Access)), replace(model.text, **taken(TextSide))
    return create_app(ModelPool([replace(model, text=text, **taken(ServedModel))]), access, **changes)


def client_of(app: Starlette, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000", **options)


async def until(condition: Callable[[], bool], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        await asyncio.sleep(0.002)


@asynccontextmanager
async def served(app: ASGIApp, **limits: Any) -> AsyncIterator[int]:
    """A real server on 127.0.0.1, whose port this is, with connections as `ingle serve` has them."""
    given = HttpLimits(**limits)
    counted = OpenConnections(given.max_connections)
    config = http_config(
        app, given, counted, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started, within_s=5.0)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


def events(response: httpx.Response) -> list[Any]:
    """The JSON of a stream's events; the closing [DONE] stays text."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, rest = response.text.split("\n\n")
    assert rest == "" and all(line.startswith("data: ") for line in lines)
    payloads = [line.removeprefix("data: ") for line in lines]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]


def assert_error(response: httpx.Response, status: int, *parts: str, param: str | None = None) -> dict[str, Any]:
    """The response is an OpenAI-shaped error of one line that holds `parts`."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert "\n" not in error["message"]
    for part in parts:
        assert part in error["message"]
    assert error["param"] == param
    return dict(error)
