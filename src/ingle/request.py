"""What is asked of the engine and what it answers: plain values, shared by every process, free of torch."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ingle.errors import RequestError
from ingle.limits import limits
from ingle.structured import Grammar, StructuredOutputs

if TYPE_CHECKING:
    TokenIds = array[int]
else:
    TokenIds = array
"""Token ids at 4 bytes each. A list takes nine times that, and prompts wait by the million tokens."""

FinishReason = Literal["stop", "length", "error", "tool_calls"]
"""The last is an answer's that ends, by itself, behind calls of tools: the engine knows nothing of these."""
PoolingKind = Literal["last", "mean", "cls", "logits"]
"""What one vector is made of: the last token's hidden state, the mean of all, the first token's, or logits of the
last."""

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
"""Most entries of a bias: rows of a device's tables are so wide."""
MAX_SALT_CHARS = 1024
MAX_OBJECTIONS = 8
"""Most wrong fields that one error names."""
_AT_ONCE = 65_536
"""Tokens, in a call that holds the interpreter's lock."""
_FEW_TOKENS = 4096
"""Looked through in less time than NumPy takes to be imported."""
_I32_MAX = 2**31 - 1
_MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine needs to know to choose a request's tokens, and when to end it. Of text it knows nothing.

    The values are those of `SamplingParams`, which checks them.
    """

    temperature: float = 1.0
    """0 means greedy: the most likely token, ties to the lowest id."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this. In (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens, and those equally likely as the last. 0 or -1 keeps all; 1 is greedy."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one. In [0, 1]."""
    seed: int | None = None
    """Same seed, same prompt, same parameters: same tokens, whatever else is in the batch. -1 is the same as None.

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
    allowed_token_ids: tuple[int, ...] | None = None
    """No other tokens are drawn; None allows all. Ends of the answer count too."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the answer does not hold: the last of one is impossible after the others, unless there
    is no other token left."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the text, besides the model's own end tokens."""
    ignore_eos: bool = False
    """Go on past the model's end tokens. Stop strings and `stop_token_ids` still hold."""
    min_tokens: int = 0
    """End tokens and stop token ids are impossible before this many tokens."""
    max_tokens: int | None = 16
    """Most tokens to generate; None means as many as the context holds, 0 that the prompt is only scored."""
    logprobs: int | None = None
    """Report the sampled token's log probability and those of this many most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for each prompt token. Such a request does not read the prefix cache."""

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: one token of those that are equally likely, also with `top_k` 1."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class _Understanding(msgspec.StructMeta):
    """Makes a class answer to arguments that it does not have: those of other tools are known by name."""

    def __call__(cls, *args: Any, **given: Any) -> Any:
        try:
            return super().__call__(*args, **given)
        except TypeError:
            own = set(cls.__struct_fields__)
            if args or given.keys() <= own:
                raise
            return super().__call__(**_translated(given, own))


def _translated(given: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """Raises `RequestError` for arguments that nobody can have."""
    import logging

    from ingle.habits.sampling import translated

    try:
        found, notices = translated(given, own)
    except ValueError as error:
        raise RequestError(str(error)) from None
    for notice in notices:
        logging.getLogger("ingle").warning("notice: %s", notice)
    return found


class SamplingParams(Sampling, frozen=True, kw_only=True, metaclass=_Understanding):
    """How to choose tokens and when to stop: what is asked of the engine, and of the text that is made of its tokens.

    Field names and neutral values are vLLM's; names of other tools are taken where they mean the same. Raises
    `RequestError` naming every field whose value is out of range, NaN or infinite.
    """

    n: int = 1
    """Independent completions of the same prompt. The i-th uses `seed + i`."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; not part of it unless `include_stop_str_in_output`."""
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    bad_words: tuple[str, ...] = ()
    """Words that the text does not hold, as the tokenizer writes them at its start and after a space."""
    truncate_prompt_tokens: int | None = None
    """Keep this many of the prompt's last tokens; -1 as many as the context holds beside `max_tokens`."""
    priority: int = 0
    """Of requests that wait, those with the lowest go first; with the highest, they give way when memory is short."""
    cache_salt: str = ""
    """Prompts share what the prefix cache has of them only with those of the same salt."""
    return_progress: bool = False
    """Say how much of the prompt is read, step by step."""
    structured_outputs: StructuredOutputs | None = None
    """What the answer is bound to, also as a dict: {"json": schema}, {"regex": "…"}, {"choice": […]}, …"""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        elif not isinstance(self.stop, tuple):
            msgspec.structs.force_setattr(self, "stop", tuple(self.stop or ()))
        if not isinstance(self.stop_token_ids, tuple):
            msgspec.structs.force_setattr(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        for name in ("bad_words", "bad_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
            elif value is None and name != "allowed_token_ids":
                value = ()
            msgspec.structs.force_setattr(self, name, (value,) if isinstance(value, str) else value)
        if self.seed == -1:
            msgspec.structs.force_setattr(self, "seed", None)
        if self.structured_outputs is not None:
            try:
                msgspec.structs.force_setattr(self, "structured_outputs", StructuredOutputs.of(self.structured_outputs))
            except ValueError as error:
                raise RequestError(f"structured_outputs: {error}", param="structured_outputs") from None
        self._check()

    def of_choice(self, index: int, max_tokens: int) -> Sampling:
        """The engine's part of one of the `n` completions, with what the context leaves of `max_tokens`.

        Raises `RequestError` when that is less than `min_tokens`.
        """
        if objections := list(self._too_few(max_tokens)):
            raise refusal(objections)
        seed = self.seed
        if seed is not None:
            seed = (seed + index - _MIN_INTEGER) % 2**64 + _MIN_INTEGER
            seed = _MIN_INTEGER if seed == -1 else seed  # which would be none
        own = {name: getattr(self, name) for name in Sampling.__struct_fields__}
        return Sampling(**{**own, "seed": seed, "max_tokens": max_tokens})

    def _check(self) -> None:
        objections = [*self._out_of_range(), *self._bad_stops(), *self._bad_logit_bias(), *self._bad_words()]
        objections += self._bound_too_long()
        objections = [(name, f"{name} {text}") for name, text in objections] or list(self._too_few(self.max_tokens))
        if objections:
            raise refusal(objections)

    def _too_few(self, max_tokens: int | None) -> Iterator[tuple[str, str]]:
        if max_tokens is not None and self.min_tokens > max_tokens:
            yield "min_tokens", f"min_tokens ({self.min_tokens}) is greater than max_tokens ({max_tokens})"

    def _out_of_range(self) -> Iterator[tuple[str, str]]:
        for name in RANGES:
            value = getattr(self, name)
            optional = name in _OPTIONAL and value is None
            if not optional and (text := objection(name, value)) is not None:
                yield name, text

    def _bad_stops(self) -> Iterator[tuple[str, str]]:
        if (text := stop_objection(self.stop)) is not None:
            yield "stop", text
        yield from _first("stop_token_ids", (_range_objection(id, 0, _I32_MAX) for id in self.stop_token_ids))

    def _bad_words(self) -> Iterator[tuple[str, str]]:
        words = self.bad_words
        if (text := _words_objection(words, "bad_words", "max_bad_words", "max_bad_words_chars")) is not None:
            yield "bad_words", text
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                yield "allowed_token_ids", "allows no token: leave it out to allow all"
            of_ids = (_range_objection(token_id, 0, _I32_MAX) for token_id in self.allowed_token_ids)
            yield from _first("allowed_token_ids", of_ids)
        if any(not sequence for sequence in self.bad_token_ids):
            yield "bad_token_ids", "holds a sequence without tokens"
        of_ids = (_range_objection(token_id, 0, _I32_MAX) for token_id in chain.from_iterable(self.bad_token_ids))
        yield from _first("bad_token_ids", of_ids)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT_CHARS:
            yield "cache_salt", f"must be a string of at most {MAX_SALT_CHARS} characters"

    def _bound_too_long(self) -> Iterator[tuple[str, str]]:
        if self.structured_outputs is not None and self.min_tokens:
            yield "min_tokens", f"({self.min_tokens}) cannot hold where structured_outputs says when an answer ends"

    def _bad_logit_bias(self) -> Iterator[tuple[str, str]]:
        biases = self.logit_bias or {}
        text = limits().over("max_logit_bias", len(biases), f"has {len(biases)} entries")
        if text is not None:
            yield "logit_bias", text
            return
        of_ids = (_range_objection(token_id, 0, _I32_MAX) for token_id in biases)
        yield from _first("logit_bias", chain(of_ids, (_range_objection(b, -100.0, 100.0) for b in biases.values())))


RANGES: dict[str, tuple[float, float]] = {
    "n": (1, MAX_INTEGER),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, MAX_INTEGER),
    "min_p": (0.0, 1.0),
    "seed": (_MIN_INTEGER, MAX_INTEGER),
    "repetition_penalty": (0.0, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "min_tokens": (0, MAX_INTEGER),
    "max_tokens": (0, MAX_INTEGER),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "truncate_prompt_tokens": (-1, MAX_INTEGER),
    "priority": (_MIN_INTEGER, MAX_INTEGER),
}
"""What each number may be; whole bounds mean whole numbers."""
LIMITED = {"n": "max_n", "logprobs": "max_logprobs", "prompt_logprobs": "max_prompt_logprobs"}
"""Those that a limit bounds too."""
ABOVE_ZERO = ("top_p", "repetition_penalty")
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens")


def objection(name: str, value: Any) -> str | None:
    """What is wrong with the value of one sampling parameter that is a number, in words that follow its name."""
    low, high = RANGES[name]
    if name in LIMITED:
        return bounded(value, int(low), LIMITED[name])
    text = _range_objection(value, low, high)
    if text is None and name in ABOVE_ZERO and value == 0:
        text = f"must be greater than 0 and at most {RANGES[name][1]:g}, got 0"
    return text


def bounded(value: Any, low: int, limit: str) -> str | None:
    """What is wrong with a whole number that must be `low` or more and that a limit bounds."""
    text = _range_objection(value, low, getattr(limits(), limit))
    return None if text is None else text.replace(", got", f"{limits().by(limit)}, got", 1)


def stop_objection(stops: Sequence[Any]) -> str | None:
    return _words_objection(stops, "strings", "max_stop_strings", "max_stop_chars")


def _words_objection(words: Sequence[Any], what: str, most: str, most_chars: str) -> str | None:
    """What is wrong with strings of a field, in words that follow its name."""
    if (text := limits().over(most, len(words), f"has {len(words)} {what}")) is not None:
        return text
    if any(not isinstance(word, str) or not word.strip(None if what == "bad_words" else "") for word in words):
        return f"takes up to {getattr(limits(), most)} {what} that are not empty"
    num_chars = sum(map(len, words))
    return limits().over(most_chars, num_chars, f"has {num_chars} characters in its {what}")


def _range_objection(value: Any, low: float, high: float) -> str | None:
    whole = isinstance(low, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return f"must be {'an integer' if whole else 'a number'}, got {_shown(value)}"
    if low <= value <= high:  # false of NaN
        return None
    bound = f"at least {low}" if high == MAX_INTEGER and value < low else f"between {low} and {high}"
    return f"must be {bound}, got {_shown(value)}"


def _first(name: str, texts: Iterable[str | None]) -> Iterator[tuple[str, str]]:
    """The first objection to the entries of a field: a thousand would say no more."""
    yield from islice(((name, text) for text in texts if text is not None), 1)


def _shown(value: Any) -> str:
    """A wrong value. Python refuses to write out integers of many digits."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.80}"


def refusal(objections: Sequence[tuple[str, str]], code: str | None = None) -> RequestError:
    """One error of all that is wrong, each with the field's name before it; `param` is the first field."""
    shown = [text for _, text in objections[:MAX_OBJECTIONS]]
    if len(objections) > MAX_OBJECTIONS:
        shown.append(f"and {len(objections) - MAX_OBJECTIONS} more")
    return RequestError("; ".join(shown), param=objections[0][0], code=code)


def stopping_at(params: SamplingParams, stops: tuple[str, ...]) -> SamplingParams:
    """`params` with more stop strings, unless they want to go on past every end."""
    more = tuple(stop for stop in stops if stop not in params.stop)
    if not more or params.ignore_eos or len(params.stop) + len(more) > limits().max_stop_strings:
        return params
    return msgspec.structs.replace(params, stop=(*params.stop, *more))


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How one vector is made of a prompt's hidden states, which are those after the last norm."""

    kind: PoolingKind = "last"
    normalize: bool = True
    """To length 1."""
    dimensions: int | None = None
    """Keep so many of the first numbers, before the length is made 1."""
    token_ids: tuple[int, ...] = ()
    """For `logits`: of these tokens."""

    @property
    def needs_all(self) -> bool:
        """Whether hidden states count that the prefix cache does not hold."""
        return self.kind in ("mean", "cls")


NO_TOKENS = Sampling(max_tokens=0)
"""Of a request with `Pooling`."""


class EngineRequest(msgspec.Struct, frozen=True, tag="request"):
    """One prompt for the engine, which knows tokens, not text."""

    id: str
    prompt_token_ids: TokenIds
    sampling: Sampling
    eos_token_ids: tuple[int, ...] = ()
    """The model's end tokens; `sampling.ignore_eos` switches them off."""
    grammar: Grammar | None = None
    """What the answer follows. It ends with that, also where `sampling.ignore_eos` is set."""
    priority: int = 0
    """As in `SamplingParams`; so are the others."""
    cache_salt: str = ""
    return_progress: bool = False
    client: str = ""
    """Whose it is: clients share what there is of steps, whatever number of requests they have."""
    pooling: Pooling | None = None
    """One vector is made of the prompt, and no token drawn: `sampling` says `max_tokens=0`."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_token_ids, array):  # a caller whose types nobody checks
            msgspec.structs.force_setattr(self, "prompt_token_ids", token_ids(self.prompt_token_ids))


def token_ids(ids: Sequence[int]) -> TokenIds:
    made = array("i", ids[:_AT_ONCE])
    for start in range(_AT_ONCE, len(ids), _AT_ONCE):  # in pieces, so that other threads run in between
        made.extend(ids[start : start + _AT_ONCE])
    return made


def encode_token_ids(value: Any) -> bytes:
    """What msgspec does not know how to encode, for a message to the same machine."""
    if not isinstance(value, array):
        raise NotImplementedError(f"no message holds a {type(value).__name__}")
    return value.tobytes()


def decode_token_ids(kind: type, value: Any) -> TokenIds:
    """The inverse of `encode_token_ids`."""
    if kind is not array or not isinstance(value, bytes):
        raise NotImplementedError(f"no message holds a {kind.__name__}")
    ids = token_ids(())
    ids.frombytes(value)
    return ids


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one position, of the distribution before temperature, penalties and bias."""

    token_ids: list[int]
    """The chosen (or prompt) token first, then the most likely ones in falling order, it before its equals."""
    logprobs: list[float]
    rank: int
    """1 when the chosen token is the most likely."""

    @classmethod
    def ranked(
        cls, token_id: int, logprob: float, rank: int, top_ids: list[int], top_logprobs: list[float]
    ) -> TokenLogprobs:
        """Of the most likely tokens in falling order, whatever the order of equals and which of them were left out."""
        if rank <= len(top_ids):  # the chosen one is among them, or one as likely was taken in its place
            place = top_ids.index(token_id) if token_id in top_ids else -1
            top_ids, top_logprobs = list(top_ids), list(top_logprobs)
            del top_ids[place], top_logprobs[place]
            top_ids.insert(rank - 1, token_id)
            top_logprobs.insert(rank - 1, logprob)
        return cls([token_id, *top_ids], [logprob, *top_logprobs], rank)


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
    pooled: bytes | None = None
    """What became of the prompt of a request with `pooling`: float32, little-endian."""
    num_prompt_read: int | None = None
    """Prompt tokens that are computed so far, in an output that says nothing else, if asked for."""
    refused: bool = False
    """It is the request that is wrong."""
    busy: bool = False
    """With `finish_reason` error: it cannot be computed now, and may be asked again."""
    complete: bool = False
    """Ended by its grammar: the last token is part of the answer."""
    queued_s: float | None = None
    """Seconds that the request waited before its first step; comes with its first output."""


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


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of `LLM.embed`, as vLLM's users write it. None is the model's own way."""

    dimensions: int | None = None
    """The first numbers of each vector."""
    normalize: bool | None = None
    """To length 1."""
    truncate_prompt_tokens: int | None = None
    """Tokens that are kept of a longer text, -1 for as many as the model takes; None refuses it."""


class EmbeddingOutput(msgspec.Struct):
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


class EmbeddingRequestOutput(msgspec.Struct):
    """The vector of one text, as `LLM.embed` returns them."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


class ScoringOutput(msgspec.Struct):
    score: float


class ScoringRequestOutput(msgspec.Struct):
    """How well one text answers its query, as `LLM.score` returns them."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True


def check_request(request: EngineRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raises `RequestError` for a request that a model of this vocabulary and context cannot serve."""
    prompt = vocabulary_ids(request.prompt_token_ids, vocab_size)
    room_for(len(prompt), request.sampling.max_tokens, max_model_len)
    check_sampling(request.sampling, vocab_size, request.eos_token_ids)
    if request.pooling is not None:
        vocabulary_ids(request.pooling.token_ids, vocab_size)


def check_sampling(sampling: Sampling, vocab_size: int, end_token_ids: Iterable[int] = ()) -> None:
    """Raises `RequestError` when `sampling` names tokens that the model does not have, or leaves none to be drawn."""
    named: dict[str, Iterable[int]] = {
        "logit_bias": sampling.logit_bias or (),
        "stop_token_ids": sampling.stop_token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "bad_token_ids": chain.from_iterable(sampling.bad_token_ids),
    }
    for name, token_ids in named.items():
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}, the model's vocabulary has {vocab_size} tokens", param=name
                )
    _check_choice(sampling, vocab_size, end_token_ids)


def _check_choice(sampling: Sampling, vocab_size: int, end_token_ids: Iterable[int]) -> None:
    """Raises `RequestError` where the first token could be none."""
    if sampling.allowed_token_ids is None and not sampling.bad_token_ids:
        return
    left = set(range(vocab_size) if sampling.allowed_token_ids is None else sampling.allowed_token_ids)
    left.difference_update(sequence[0] for sequence in sampling.bad_token_ids if len(sequence) == 1)
    if not left:
        name = "bad_words" if sampling.allowed_token_ids is None else "allowed_token_ids"
        raise RequestError(f"{name} leaves no token that could be drawn", param=name)
    if sampling.min_tokens and left <= {*end_token_ids, *sampling.stop_token_ids}:
        raise RequestError(
            "allowed_token_ids holds only tokens that end the answer, which min_tokens rules out at first",
            param="allowed_token_ids",
        )


def vocabulary_ids(ids: Sequence[int], vocab_size: int, param: str = "prompt") -> TokenIds:
    """`ids` at 4 bytes each. Raises `RequestError` naming the first that a model of `vocab_size` tokens lacks."""
    try:
        checked = ids if isinstance(ids, array) and ids.typecode == "i" else token_ids(ids)
        known = _are_below(checked, vocab_size)
    except OverflowError:  # an id of more than 32 bits
        known = False
    if not known:
        token_id = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise RequestError(
            f"token id {_shown(token_id)} is not in the model's vocabulary of {vocab_size} tokens", param=param
        )
    return checked


def _are_below(ids: TokenIds, vocab_size: int) -> bool:
    if len(ids) <= _FEW_TOKENS:
        return not ids or (min(ids) >= 0 and max(ids) < vocab_size)
    import numpy as np  # which the first short prompts of a server need not wait for

    values = np.frombuffer(ids, np.int32)
    return bool(values.min() >= 0 and values.max() < vocab_size)


def room_for(num_prompt_tokens: int, max_tokens: int | None, max_model_len: int) -> int:
    """The number of tokens this prompt may generate: `max_tokens`, cut to what the context leaves. 0 needs no room.

    Raises `RequestError` with exact numbers when the prompt is empty or leaves no room.
    """
    if not num_prompt_tokens:
        raise RequestError("the prompt is empty: it must hold at least one token", param="prompt")
    room = max_model_len - num_prompt_tokens
    needed = 0 if max_tokens == 0 else 1
    if room < needed:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has "
            f"{num_prompt_tokens} tokens and leaves no room for an answer. Shorten it by at least {needed - room}.",
            param="prompt",
            code="context_length_exceeded",
        )
    return room if max_tokens is None else min(max_tokens, room)
