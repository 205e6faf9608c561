"""What the commands that run a model in this process share."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ingle.cli.fields import Hidden
from ingle.cli.loading import loading
from ingle.cli.main import EXIT_INTERRUPTED
from ingle.config import EngineConfig, TextConfig
from ingle.request import SamplingParams

if TYPE_CHECKING:
    from ingle.llm import LLM

# --seed is the sampling seed there: the engine's serves only dummy weights and requests that bring none.
HIDDEN: Hidden = {EngineConfig: {"seed"}}


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. What is left out is the model's own default, or else neutral."""

    temperature: float | None = None
    """0 means greedy: the most likely token each time."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches this. Above 0, at most 1."""
    top_k: int | None = None
    """Keep this many of the most likely tokens; 0 keeps all."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the most likely one."""
    max_tokens: int | None = None
    """Most tokens to generate."""
    seed: int | None = None
    """Same seed and prompt, same text."""
    repetition_penalty: float | None = None
    """Above 1: tokens seen in prompt or answer become less likely."""
    presence_penalty: float | None = None
    """Above 0: tokens seen in the answer become less likely."""
    frequency_penalty: float | None = None
    """Above 0: tokens become less likely each time that they are in the answer."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""
    ignore_eos: bool = False
    """Go on past the model's end tokens."""

    def params(self, model_defaults: Mapping[str, Any], *, max_tokens: int | None) -> SamplingParams:
        """These flags over the model's defaults; `max_tokens` if neither says. Raises `RequestError`."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return SamplingParams(**{"max_tokens": max_tokens, **model_defaults, **given})

    def given(self) -> dict[str, Any]:
        """Those that the user gave."""
        return {name: value for name, value in asdict(self).items() if value not in (None, (), False)}


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports that take seconds: Ctrl-C ends the process with code 130 instead of raising.

    Extension modules swallow a `KeyboardInterrupt` that hits their set-up, or turn it into an `ImportError`.
    """
    previous = signal.signal(signal.SIGINT, lambda signum, frame: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def load_llm(engine: EngineConfig, text: TextConfig) -> LLM:
    """Load the model, pulling it first when it is in the catalog and not on this machine yet."""
    from ingle.hub.resolve import ensure_model

    ensure_model(engine.model)  # LLM does this too, but a pull has a bar of its own, and a wrong name should not wait
    with loading() as report:
        report("starting")
        from ingle.llm import LLM

        return LLM(engine.model, report=report, **asdict(text), **engine.options())
