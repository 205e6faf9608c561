"""What one request, one connection, and all that wait together may take: every bound is a flag of `ingle serve`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields

from ingle.errors import ConfigError


@dataclass(frozen=True)
class LimitsConfig:
    """Most that a request, a connection and all requests together may take. A request beyond one is refused with an
    error that names the limit, the value and the flag."""

    max_connections: int = 4096
    """Most connections open at once; one address may have half of them."""
    timeout_keep_alive: float = 65.0
    """Seconds that a connection stays open between two requests. More than a proxy before the server waits."""
    header_timeout: float = 30.0
    """Seconds in which the line and the headers of a request must arrive."""
    body_timeout: float = 120.0
    """Seconds in which the body of a request must arrive."""
    max_header_bytes: int = 65_536
    """Most bytes of a request's line and headers together."""
    max_header_count: int = 256
    """Most headers of a request."""
    max_body_bytes: int = 33_554_432
    """Most bytes of a request's body."""
    max_bodies_bytes: int = 268_435_456
    """Most bytes of all bodies that are being read and prepared; those beyond get 503."""
    max_field_bytes: int = 262_144
    """Most bytes of a field of a body that is no prompt, conversation, tool or input."""
    max_json_depth: int = 128
    """Most lists and objects of a body within each other."""
    max_json_values: int = 100_000
    """Most numbers, strings, lists and objects in a conversation, and of a list of texts."""
    max_messages: int = 8192
    """Most messages of a conversation."""
    max_tools: int = 1024
    """Most tools of a request."""
    max_tools_bytes: int = 1_048_576
    """Most bytes of all tools of a request, as JSON."""
    max_prompts: int = 1024
    """Most prompts of a request to /v1/completions."""
    max_texts: int = 2048
    """Most texts of a request for embeddings, rankings or scores."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt. Default: as many as the context holds."""
    max_prompt_chars: int = 8_388_608
    """Most characters of a prompt, or of all texts of a conversation; never more than 128 for each token of the
    context."""
    max_n: int = 128
    """Most completions of a prompt, `n`."""
    max_best_of: int = 128
    """Most completions that are computed to choose among, `best_of`."""
    max_choices: int = 1024
    """Most completions of a request: prompts times `n`."""
    max_logprobs: int = 20
    """Most log probabilities per token, `logprobs` and `top_logprobs`; 20 at most."""
    max_prompt_logprobs: int = 20
    """Most log probabilities per token of the prompt; 20 at most."""
    max_stop_strings: int = 64
    """Most stop strings of a request."""
    max_stop_chars: int = 65_536
    """Most characters of all stop strings of a request."""
    max_bad_words: int = 1024
    """Most `bad_words` of a request."""
    max_bad_words_chars: int = 65_536
    """Most characters of all bad words of a request."""
    max_logit_bias: int = 1024
    """Most entries of `logit_bias`; 1024 at most."""
    max_grammar_bytes: int = 131_072
    """Most bytes of a schema, an expression, a grammar, or of all choices that an answer is bound to."""
    max_grammar_choices: int = 4096
    """Most choices that an answer is bound to."""
    max_schema_depth: int = 100
    """Most objects and lists of a schema within each other; 100 at most."""
    max_grammar_fuel: int = 1_000_000
    """Most work to compile a grammar, in steps of its lexer. 1,000,000 take a second or less."""
    max_num_queued_reqs: int = 4096
    """Most requests that wait for their first token; those beyond get 429 with an estimate. Each choice of a request
    counts."""
    max_num_queued_tokens: int = 4_194_304
    """Most prompt tokens of requests that wait, and of one request with all its choices. A single prompt is taken
    while no other waits, whatever its size."""
    max_answers_bytes: int = 1_073_741_824
    """Most memory for all requests that are being answered: prompts, and answers that are not streamed, until they are
    read. Beyond it the largest is ended."""
    request_timeout: float | None = None
    """Most seconds from a request's arrival to the end of its answer, and the `timeout` of requests that bring none.
    Default: as long as it takes."""
    slow_reader_timeout: float = 60.0
    """Seconds in which a client must read what waits for it; then it is cut off."""
    max_unread_bytes: int = 4_194_304
    """Most memory of a stream's tokens that wait for its client to read on; then the request is ended."""
    max_file_bytes: int = 536_870_912
    """Most bytes of an uploaded file."""
    max_batch_lines: int = 50_000
    """Most lines of a batch."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value, flag = getattr(self, field.name), flag_of(field.name)
            if value is None and field.default is None:
                continue
            if "timeout" in field.name:
                _check_seconds(flag, value)
            else:
                _check_number(flag, value, *_BOUNDS.get(field.name, (1, _MOST)))
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ConfigError(
                f"--max-bodies-bytes {self.max_bodies_bytes} is too small: one body may have {self.max_body_bytes} "
                "(--max-body-bytes)"
            )

    def over(self, name: str, value: int, what: str) -> str | None:
        """What is wrong where a request has `value` of something, `what` in words; None while the limit holds."""
        most = getattr(self, name)
        if most is None or value <= most:
            return None
        return f"{what}, at most {most} are taken{self.by(name)}"

    def by(self, name: str) -> str:
        """Which flag says so; nothing where none does."""
        return "" if self is OFFLINE else f" ({flag_of(name)})"


_MOST = 2**53
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "max_header_bytes": (1024, 2**24),
    "max_header_count": (8, 2**16),
    "max_body_bytes": (1024, 2**31),
    "max_bodies_bytes": (1024, _MOST),
    "max_field_bytes": (1024, 2**24),
    "max_json_depth": (8, 900),
    "max_n": (1, 16_384),
    "max_best_of": (1, 16_384),
    "max_choices": (1, 16_384),
    "max_logprobs": (0, 20),
    "max_prompt_logprobs": (0, 20),
    "max_stop_strings": (1, 16_384),
    "max_stop_chars": (1, 2**20),
    "max_bad_words": (1, 16_384),
    "max_bad_words_chars": (1, 2**20),
    "max_logit_bias": (1, 1024),
    "max_grammar_bytes": (16, 2**24),
    "max_grammar_choices": (1, 2**20),
    "max_schema_depth": (1, 100),
    "max_grammar_fuel": (1000, 2**32),
    "max_answers_bytes": (2**20, _MOST),
    "max_unread_bytes": (2**12, _MOST),
}
"""What a flag may be: beyond the upper ones something else gives way, such as tables of devices or Python's stack."""


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_number(flag: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{flag} {value!r} is not a whole number")
    if not low <= value <= high:
        bound = f"small: give at least {low}" if value < low else f"large: give at most {high}"
        raise ConfigError(f"{flag} {value} is too {bound}")


def _check_seconds(flag: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{flag} {value!r} is not a number")
    if not 0.0 < value < math.inf:
        raise ConfigError(f"{flag} {value} is not a time: give seconds above 0")


def _offline() -> LimitsConfig:
    """As much as anything here can take."""
    names = ("json_depth", "n", "best_of", "choices", "stop_strings", "stop_chars", "bad_words", "bad_words_chars",
             "grammar_bytes", "grammar_choices")  # fmt: skip
    return LimitsConfig(**{f"max_{name}": _BOUNDS[f"max_{name}"][1] for name in names})


OFFLINE = _offline()
"""Of whoever calls ingle in Python: nobody is kept from their own machine."""
_at_hand: ContextVar[LimitsConfig] = ContextVar("limits", default=OFFLINE)


def limits() -> LimitsConfig:
    """Those of the request that is read now, in this thread."""
    return _at_hand.get()


@contextlib.contextmanager
def holding(limits: LimitsConfig) -> Iterator[None]:
    """Inside, requests are read within these."""
    token = _at_hand.set(limits)
    try:
        yield
    finally:
        _at_hand.reset(token)
