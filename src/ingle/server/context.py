"""What the HTTP server needs to know: one frozen value, handed to `create_app`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ingle.errors import EngineError, ModelError, RequestError
from ingle.request import EngineOutput, EngineRequest, SamplingParams
from ingle.server.queue import BodyMemory, RequestQueue

if TYPE_CHECKING:
    from ingle.text.chat_template import ChatTemplate
    from ingle.text.tokenizer import Tokenizer


class EngineInfo(Protocol):
    """What the engine tells about itself once it is ready."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def num_parameters(self) -> int: ...
    @property
    def stored_types(self) -> dict[str, int]: ...
    @property
    def expanded_types(self) -> list[str]: ...
    @property
    def weight_bytes(self) -> int: ...


class HealthStatus(Protocol):
    @property
    def ok(self) -> bool: ...
    @property
    def detail(self) -> str: ...


class AsyncEngine(Protocol):
    """The engine as the server sees it: tokens in, tokens out."""

    @property
    def info(self) -> EngineInfo: ...

    def health(self) -> HealthStatus: ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """Outputs of one request, the last with a finish reason. Closing or cancelling it aborts the request.

        Raises `EngineError` when the engine is dead.
        """
        ...


@dataclass(frozen=True)
class ServerContext:
    """One served model and how it may be reached."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    model_names: tuple[str, ...]
    """Names under which requests may ask for the model; answers carry the first."""
    model_root: str
    """Where the model came from, as `/v1/models` reports it."""
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    """The model's own temperature, top_p, top_k, min_p and repetition_penalty, for requests that set none."""
    api_keys: tuple[str, ...] = ()
    """Keys of which a request must bring one; empty asks for none."""
    allowed_hosts: tuple[str, ...] = ()
    """Names accepted in the Host header, besides localhost and the server's own address; empty accepts any."""
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""
    access_log: bool = True
    """Log one line per HTTP request to the logger `ingle.access`."""
    queue: RequestQueue = field(default_factory=RequestQueue)
    """The requests that wait for their first token."""
    unread: BodyMemory = field(default_factory=BodyMemory)
    """The bodies that are being read."""

    def __post_init__(self) -> None:
        try:
            SamplingParams(**self.default_sampling)
        except RequestError as error:
            raise ModelError(f"the model's own sampling defaults cannot be used: {error}") from error

    def check_model(self, name: str | None) -> None:
        """Raises `RequestError` (404) unless `name` is served here; None means the served model."""
        if name is not None and name not in self.model_names:
            raise RequestError(
                f"The model {name!r} does not exist. This server has: {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
                status=404,
            )

    def check_engine(self) -> None:
        """Raises `EngineError` when the engine cannot take requests."""
        health = self.engine.health()
        if not health.ok:
            raise EngineError(health.detail)
