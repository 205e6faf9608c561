"""What checks share: what they are about, and what is looked up once for several of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ingle.config import EngineConfig, ServerConfig, TextConfig
from ingle.doctor.children import Children
from ingle.doctor.hubs import HubAnswer, ask_hubs
from ingle.doctor.nvidia import Seen, look

T = TypeVar("T")


class Once(Generic[T]):
    """A function's value or exception, found out by whoever asks first."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._values: list[T] = []
        self._error: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if not self._values and self._error is None:
                try:
                    self._values.append(self._function())
                except Exception as error:
                    self._error = error
            if self._error is not None:
                raise self._error
            return self._values[0]


@dataclass(frozen=True)
class Question:
    """What the checks are about."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 for any, of which one is always free."""
    engine: EngineConfig | None = None
    """A model that is to be served, and how."""
    text: TextConfig = field(default_factory=TextConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    """How it is to be reached, beside host and port."""
    timeout_s: float = 20.0
    """For a probe; what is known to take longer gets a multiple."""
    root: Path = Path("/")
    """The folder that stands for `/`, for tests."""


class Here:
    """This machine, as far as it was looked at."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.children = Children()
        self.gpus: Once[Seen] = Once(lambda: look(self.children, question.timeout_s, question.root))
        self.torch: Once[dict[str, Any]] = Once(lambda: self.children.ask("torch", question.timeout_s))
        self.hubs: Once[list[HubAnswer]] = Once(ask_hubs)
