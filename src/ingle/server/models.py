"""The models that a server hands out: a value for each, and the pool that finds one by its name."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ingle.errors import EngineError, ModelError, RequestError
from ingle.request import SamplingParams
from ingle.server.queue import RequestQueue
from ingle.server.statistics import ModelStatistics
from ingle.text.requests import PromptReader
from ingle.text.vectors import TextReader

if TYPE_CHECKING:
    from starlette.requests import Request

    from ingle.channel import EngineInfo
    from ingle.server.engine_client import HealthStatus
    from ingle.server.replicas import ServedEngine
    from ingle.text.chat_template import ChatTemplate
    from ingle.text.load import TextSide
    from ingle.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class ServedModel:
    """One model: an engine for its tokens, and all that turns text into them and back."""

    engine: ServedEngine
    text: TextSide
    names: tuple[str, ...]
    """Under which requests may ask for it; answers carry the first."""
    root: str
    """Where it came from, as `/v1/models` reports it."""
    also: tuple[str, ...] = ()
    """Other names under which requests may ask for it, which nobody is shown."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""
    queue: RequestQueue = field(default_factory=RequestQueue)
    """Its requests that wait for their first token."""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)

    def __post_init__(self) -> None:
        try:
            SamplingParams(**self.default_sampling)
        except RequestError as error:
            raise ModelError(f"the model's own sampling defaults cannot be used: {error}") from error

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        return self.text.chat_template

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """The model's own temperature, top_p, top_k, min_p and repetition_penalty, for requests that set none."""
        return self.text.default_sampling

    @property
    def prompts(self) -> PromptReader:
        return PromptReader(self.text.tokenizer, self.engine.info)

    @property
    def texts(self) -> TextReader:
        return TextReader(self.text.tokenizer, self.engine.info, self.text.pooling)

    def check_engine(self) -> None:
        """Raises `EngineError` when the engine cannot take requests."""
        health = self.engine.health()
        if not health.ok:
            raise EngineError(health.detail, retry_after_s=health.retry_after_s)


class ModelPool:
    """All models of a server. Today it is a pool of one, and empty until that is loaded."""

    def __init__(self, models: Sequence[ServedModel] = ()) -> None:
        self._models: tuple[ServedModel, ...] = ()
        self._by_name: dict[str, ServedModel] = {}
        self._by_other_name: dict[str, ServedModel] = {}
        for model in models:
            self.add(model)

    def add(self, model: ServedModel) -> None:
        self._models += (model,)
        self._by_name |= dict.fromkeys(model.names, model)
        self._by_other_name |= dict.fromkeys(model.also, model)

    @property
    def models(self) -> tuple[ServedModel, ...]:
        return self._models

    @classmethod
    def of(cls, request: Request) -> ModelPool:
        """That of the application which got the request."""
        pool: ModelPool = request.app.state.models
        return pool

    def get(self, name: str | None) -> ServedModel:
        """The model of that name; None means the first. Raises `RequestError` (404) for a name that none has."""
        if name is None:
            return self._models[0]
        model = self._by_name.get(name) or self._by_other_name.get(name)
        if model is None:
            raise RequestError(
                f"The model {name!r} does not exist. This server has: {', '.join(self._by_name)}",
                param="model",
                code="model_not_found",
                status=404,
            )
        return model

    def named(self) -> Iterable[tuple[str, ServedModel]]:
        """Each model, once for every name that it has."""
        return self._by_name.items()

    def health(self) -> HealthStatus:
        """Of the first engine that is unwell; of the first of all when none is."""
        states = [model.engine.health() for model in self._models]
        return next((state for state in states if not state.ok), states[0])

    def check_engines(self) -> None:
        """Raises `EngineError` when no engine takes requests, so that none need be read."""
        states = [model.engine.health() for model in self._models]
        if not any(state.ok for state in states):
            raise EngineError(states[0].detail, retry_after_s=states[0].retry_after_s)
