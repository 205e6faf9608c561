"""What is asked of the engine and what it answers: plain values, shared by every process, free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from ingle.errors import RequestError

FinishReason = Literal["stop", "length", "error"]

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 65_536
"""In all stop strings of a request."""
MAX_N = 128
_I64_MIN, _I64_MAX = -(2**63), 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop. Field names and neutral values are vLLM's.

    Raises `RequestError` naming the field when a value is out of range, NaN or infinite.
    """

    n: int = 1
    """Independent completions of the same prompt. The i-th uses `seed + i`."""
    temperature: float = 1.0
    """0 means greedy: the most likely token, ties to the lowest id."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this. In (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens. 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. In [0, 1]."""
    seed: int | None = None
    """Same seed, same prompt, same parameters: same tokens, whatever else is in the batch.

    Exact as far as the logits are: 16-bit products round differently in batches of different sizes.
    """
    repetition_penalty: float = 1.0
    """Divides positive (multiplies negative) logits of tokens seen in prompt or output. > 0."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already in the output. In [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence from the logit of every token already in the output. In [-2, 2]."""
    logit_bias: dict[int, float] | None = None
    """Token id to a value in [-100, 100] that is added to its logit."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it unless `include_stop_str_in_output`."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text, besides the model's own end tokens."""
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    """Go on past the model's end tokens. `stop` and `stop_token_ids` still hold."""
    min_tokens: int = 0
    """End tokens and stop token ids are impossible before this many tokens."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means as many as the context holds."""
    logprobs: int | None = None
    """Report the sampled token's log probability and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for each prompt token. Such a request does not read the prefix cache."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            msgspec.structs.force_setattr(self, "stop", tuple(self.stop or ()))
        if not isinstance(self.stop_token_ids, tuple):
            msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._check()

    def _check(self) -> None:
        _in_range("n", self.n, 1, MAX_N)
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be greater than 0 and at most 1, got 0", param="top_p")
        _in_range("top_k", self.top_k, -1, _I64_MAX)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _in_range("seed", self.seed, _I64_MIN, _I64_MAX)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0)
        if self.repetition_penalty == 0.0:
            raise RequestError("repetition_penalty must be greater than 0, got 0", param="repetition_penalty")
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _in_range("min_tokens", self.min_tokens, 0, _I64_MAX)
        if self.max_tokens is not None:
            _in_range("max_tokens", self.max_tokens, 1, _I64_MAX)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})", param="min_tokens"
                )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _in_range(name, value, 0, MAX_LOGPROBS)
        self._check_stops()
        self._check_logit_bias()

    def _check_stops(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS or any(not isinstance(s, str) or not s for s in self.stop):
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings that are not empty", param="stop")
        if (num_chars := sum(map(len, self.stop))) > MAX_STOP_CHARS:
            raise RequestError(
                f"the stop strings have {num_chars} characters, at most {MAX_STOP_CHARS} are taken", param="stop"
            )
        for token_id in self.stop_token_ids:
            _in_range("stop_token_ids", token_id, 0, 2**31 - 1)

    def _check_logit_bias(self) -> None:
        if not self.logit_bias:
            return
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} entries, at most {MAX_LOGIT_BIAS} are taken", param="logit_bias"
            )
        for token_id, bias in self.logit_bias.items():
            _in_range("logit_bias", token_id, 0, 2**31 - 1)
            _in_range("logit_bias", bias, -100.0, 100.0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _in_range(name: str, value: float, low: float, high: float) -> None:
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        kind = "an integer" if whole else "a number"
        raise RequestError(f"{name} must be {kind}, got {value!r}", param=name)
    if math.isnan(value) or not low <= value <= high:
        bound = f"at least {low}" if high == _I64_MAX and value < low else f"between {low} and {high}"
        raise RequestError(f"{name} must be {bound}, got {value}", param=name)


def stopping_at(params: SamplingParams, stops: tuple[str, ...]) -> SamplingParams:
    """`params` with more stop strings, unless they want to go on past every end."""
    more = tuple(stop for stop in stops if stop not in params.stop)
    if not more or params.ignore_eos or len(params.stop) + len(more) > MAX_STOP_STRINGS:
        return params
    return msgspec.structs.replace(params, stop=(*params.stop, *more))


class EngineRequest(msgspec.Struct, frozen=True, tag="request"):
    """One prompt for the engine. The engine knows tokens, not text: `sampling.stop` is not its business."""

    id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    """The model's end tokens; `sampling.ignore_eos` switches them off."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the distribution before temperature, penalties and bias."""

    token_ids: list[int]
    """The chosen (or prompt) token first, then the most likely ones in falling order."""
    logprobs: list[float]
    rank: int
    """1 when the chosen token is the most likely."""


class EngineOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought for one request."""

    id: str
    token_ids: list[int]
    """New tokens, end or stop token included."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The entry of `stop_token_ids` that ended the request; None when an end token of the model did."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    logprobs: list[TokenLogprobs] | None = None
    """One per entry of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One per prompt token, the first None; comes once, with the first token."""
    error: str | None = None
    """What went wrong, when `finish_reason` is "error"."""


class CompletionOutput(msgspec.Struct):
    """One finished completion of a prompt."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None when an end token or a limit did."""
    logprobs: list[TokenLogprobs] | None = None


class RequestOutput(msgspec.Struct):
    """All completions of one prompt, as `LLM.generate` returns them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finished: bool = True


def check_token_ids(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises `RequestError` when `sampling` names tokens that the model does not have."""
    for name, token_ids in (("logit_bias", sampling.logit_bias or ()), ("stop_token_ids", sampling.stop_token_ids)):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}, the model's vocabulary has {vocab_size} tokens", param=name
                )


def check_prompt(
    prompt_token_ids: Sequence[int], max_tokens: int | None, *, vocab_size: int, max_model_len: int
) -> int:
    """The number of tokens this prompt may generate: `max_tokens`, cut to what the context leaves.

    Raises `RequestError` with exact numbers when the prompt is empty, leaves no room, or has ids out of range.
    """
    if not prompt_token_ids:
        raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
    for token_id in prompt_token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} is not in the model's vocabulary of {vocab_size} tokens", param="prompt"
            )
    room = max_model_len - len(prompt_token_ids)
    if room < 1:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{len(prompt_token_ids)} tokens and leaves no room for an answer. Shorten it by at least {1 - room}.",
            param="prompt",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else min(max_tokens, room)
