"""Grammars as llguidance reads them: made of what a request gives, and tried before the engine hears of it."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ingle.errors import RequestError
from ingle.limits import limits
from ingle.structured import Grammar, StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

_WHITE_SPACE = r"[ \t]|\r?\n[ \t]{0,32}"
"""Between the tokens of JSON: a small model at a high temperature writes blanks for ever, where it may."""
_MAX_ITEMS = 50_000
"""Alternatives at one place: some thousand choices are among what people send."""
_MAX_KEPT = 256
_MAX_AT_ONCE, _PATIENCE_S = 2, 1.0
"""Some take a second to compile. Threads that prepare requests are few, and others need them too."""
_MAX_ERROR_CHARS = 300
_SPECIAL_BYTE = b"\xff"
"""With which llguidance marks special tokens."""

_STRING = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_STRING}{{1,{n}}}" for n in (2, 4, 6, 8, 10, 14, 20, 30)), f"{_STRING}+"]
"""Tokens that llguidance allows together, where all of them may come. Its own slices have strings of up to 10 and of up
to 30; where fewer characters than that may follow, it would look at each token for itself, which takes 2 ms.
"""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""What has schemas by names."""
_UNFORCED = '%llguidance {"no_forcing": true}\n'


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, each with its bytes."""

    tokens: Sequence[bytes]
    """By id, of all that the model can give; empty for those that stand for nothing."""
    special_ids: Sequence[int]
    """Which no text has inside."""
    end_ids: Sequence[int]
    """At least one."""
    encode: Callable[[str], Sequence[int]]

    def for_llguidance(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        words = _Words(self)
        tokenizer = LLTokenizer(cast("TokenizerWrapper", words), eos_token=list(self.end_ids), slices=_SLICES)
        words.greedy = tokenizer.greedy_tokenize
        return tokenizer


class _Words:
    """A vocabulary as `llguidance.TokenizerWrapper` has it, with the text of what a grammar forces as its tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        # A token with this byte, such as <0xFF>, would be taken for a special one. No text holds it.
        self.tokens = [b"" if _SPECIAL_BYTE in token else token for token in vocabulary.tokens]
        self.special_token_ids = list(vocabulary.special_ids)
        self.eos_token_id = vocabulary.end_ids[0]
        self.greedy: Callable[[str], list[int]] = lambda text: []
        self._encode = vocabulary.encode
        self._special = frozenset(self.special_token_ids)

    def __call__(self, text: str) -> list[int]:
        """The model's own tokens, if they spell the text, as they might not where it begins with a space of its own."""
        try:
            ids = list(self._encode(text))
        except RequestError:
            return self.greedy(text)
        if any(token_id >= len(self.tokens) or token_id in self._special for token_id in ids):
            return self.greedy(text)
        return ids if b"".join(map(self.tokens.__getitem__, ids)) == text.encode() else self.greedy(text)


def compile_grammar(text: str, tokenizer: LLTokenizer, fuel: int = 1_000_000) -> LLMatcher:
    """Compiled, with its first mask. Holds no lock of the interpreter's, and is bounded by llguidance's limits, and by
    `fuel`, steps of its lexer.

    Raises `RequestError`.
    """
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False, initial_lexer_fuel=fuel, max_items_in_row=_MAX_ITEMS)
    matcher = LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # the first takes longest
    if matcher.is_error():
        raise RequestError(_plain(matcher.get_error()))
    return matcher


def unforced(text: str) -> str:
    """A grammar whose masks allow all tokens that the text may go on with.

    Where a grammar leaves one way to go on, llguidance otherwise allows the one token alone that the model's tokenizer
    spells it with. It asks the tokenizer, in Python, once for each mask: on many threads, these wait for each other.
    """
    if not text.startswith("{"):  # Lark's notation
        return _UNFORCED + text
    found = json.loads(text)
    for each in found["grammars"]:
        if (schema := each.pop("json_schema", None)) is not None:
            each["lark_grammar"] = f"start: %json {json.dumps(schema, ensure_ascii=False)}"
        each["lark_grammar"] = _UNFORCED + each["lark_grammar"]
    return json.dumps(found)


def _plain(error: str) -> str:
    """llguidance's words, in one line."""
    if error.startswith("NoExtension"):
        return "no answer can follow it"
    return " ".join(error.replace("<non-verbose/>", "").split())[:_MAX_ERROR_CHARS]


def grammar_text(wanted: StructuredOutputs) -> str:
    """In llguidance's own form. Raises `ValueError` for what cannot be written in it."""
    from llguidance import LLMatcher

    if wanted.kind in ("json", "json_object"):
        return _of_schema(wanted)
    if wanted.regex is not None:
        return LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        strings = (json.dumps(each, ensure_ascii=False) for each in wanted.choice)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(strings))
    assert wanted.grammar is not None
    return LLMatcher.grammar_from_lark(_lark(wanted.grammar))


def _lark(grammar: str) -> str:
    """A grammar in Lark's notation, which GBNF is turned into. Raises `ValueError`."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:  # all that a parser of some hundred lines raises
        raise ValueError(f"it is neither Lark's notation nor GBNF: {error}") from None


def _of_schema(wanted: StructuredOutputs) -> str:
    schema = {"type": "object"} if wanted.json is None else json.loads(str(wanted.json))
    if not isinstance(schema, dict):  # true: any JSON
        schema = {}
    if wanted.disable_additional_properties:
        _close(schema)
    given = schema.get("x-guidance")
    options = {"whitespace_pattern": _WHITE_SPACE, **(given if isinstance(given, dict) else {})}
    if wanted.disable_any_whitespace or options.get("whitespace_flexible") is False:
        options = {**options, "whitespace_flexible": False}
        options.pop("whitespace_pattern", None)
    if wanted.whitespace_pattern is not None:
        options["whitespace_pattern"] = wanted.whitespace_pattern
    # What the standard says and llguidance does not do is refused, whatever the schema asks for.
    schema["x-guidance"] = {**options, "lenient": False, "coerce_one_of": False}
    return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)


def _close(part: Any) -> None:
    """Adds `additionalProperties: false` to schemas of objects that name properties and leave it open, in a schema."""
    if isinstance(part, dict):
        if isinstance(part.get("properties"), dict):
            part.setdefault("additionalProperties", False)
        for name, value in part.items():
            if name in ("enum", "const", "default", "examples"):  # values, not schemas
                continue
            _close(list(value.values()) if name in _NAMED and isinstance(value, dict) else value)
    elif isinstance(part, list):
        for each in part:
            _close(each)


def small_vocabulary(special: Mapping[str, str], ends: Sequence[int], size: int) -> Vocabulary:
    """For trials: the special tokens of a vocabulary of that size, by their ids and in Latin-1, and behind it 256
    tokens of a byte each."""
    tokens = [b""] * size
    for token_id, text in special.items():
        tokens[int(token_id)] = text.encode("latin-1")
    return Vocabulary(
        [*tokens, *(bytes([byte]) for byte in range(256))],
        [int(token_id) for token_id in special],
        ends,
        lambda text: [size + byte for byte in text.encode()],
    )


class GrammarCheck:
    """Tries grammars for one tokenizer, by 256 tokens of a byte each: what compiles for them compiles for it.

    In a process of its own (`template_worker`): a line of a schema may ask for gigabytes, and for minutes.
    """

    def __init__(self, special: Mapping[int, bytes], end_ids: Sequence[int], vocab_size: int) -> None:
        """`special`: tokens that a grammar may name, and their text."""
        self._end_ids = end_ids
        self._vocabulary = json.dumps(
            {
                "special": {id: text.decode("latin-1") for id, text in special.items()},
                "ends": list(end_ids),
                "size": vocab_size,
            }
        )
        self._lock = threading.Lock()
        self._checked: OrderedDict[StructuredOutputs, Grammar | str] = OrderedDict()
        self._trying: dict[StructuredOutputs, Future[Grammar | str]] = {}
        self._places = threading.Semaphore(_MAX_AT_ONCE)

    def grammar(self, wanted: StructuredOutputs) -> Grammar:
        """For the engine. Raises `RequestError` for what cannot be followed."""
        with self._lock:
            known = self._checked.get(wanted)
            trying = self._trying.get(wanted)
            is_first = known is None and trying is None
            if is_first:
                trying = self._trying[wanted] = Future()
        if known is None:
            assert trying is not None
            known = self._tried(wanted, trying) if is_first else trying.result()
        if isinstance(known, str):
            raise RequestError(
                f"{wanted.asked_as}: {wanted.kind}: {known}", param=wanted.asked_as, code="invalid_grammar"
            )
        return known

    def _tried(self, wanted: StructuredOutputs, trying: Future[Grammar | str]) -> Grammar | str:
        """Of several that ask for the same at the same time, one tries it. Raises `RequestError` (503)."""
        try:
            if not self._places.acquire(timeout=_PATIENCE_S):
                raise RequestError("The server compiles other grammars: send this one again later.",
                                   code="server_busy", status=503)  # fmt: skip
            try:
                known = self._check(wanted)
            finally:
                self._places.release()
            with self._lock:
                self._checked[wanted] = known
                while len(self._checked) > _MAX_KEPT:
                    self._checked.popitem(last=False)
            trying.set_result(known)
            return known
        except BaseException as error:
            trying.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._trying[wanted]

    def _check(self, wanted: StructuredOutputs) -> Grammar | str:
        """The grammar, or what is wrong with it. Raises `RequestError` (503) where it could not be tried."""
        from ingle.text.sandbox import SandboxError, sandboxes  # of which an engine's start needs nothing

        if not self._end_ids:
            return "this model has no end token, with which such an answer ends"
        fuel = limits().max_grammar_fuel
        try:
            text = grammar_text(wanted)
        except (ValueError, RequestError) as error:
            return _plain(str(error))
        asked = {"grammar": text, "fuel": fuel, "vocabulary": self._vocabulary}
        try:
            tried = sandboxes.ask(json.dumps(asked).encode())
        except SandboxError as error:
            if error.may_pass:
                raise RequestError(f"The server cannot compile a grammar now: {error}.",
                                   code="server_busy", status=503) from None  # fmt: skip
            return f"it cannot be compiled: {error}"
        if "error" in tried:
            return _plain(tried["error"])
        return Grammar(text, wanted.after, wanted.kind in ("json", "json_object"), fuel, tried["num_bytes"])
