"""Answers that follow a grammar, by llguidance: it is compiled in a thread, and then says what may come next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet, finalize

import numpy as np

from ingle.engine.masks import TokenMask, Words, pack_mask
from ingle.errors import RequestError
from ingle.kernels.cpu import threads
from ingle.structured import Grammar
from ingle.text.grammar import Vocabulary, compile_grammar, unforced

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_NUM_THREADS = 2
"""That compile: one that takes a second holds up no other."""
_MAX_DIGITS = 24
"""Of a number in JSON, one after the other: a 64-bit integer has up to 20, a double needs 17.

A schema bounds its value and not its digits, and a small model at a high temperature writes zeros for ever.
"""
_MAX_KEPT = 64
"""Grammars that are kept compiled. Most take some hundred kB."""
_MAX_BYTES = 1 << 30
"""Of all that are compiled, whether they are kept or in use."""
_MAX_SHARING = 8
"""Answers that follow one copy of a grammar before there is another."""
_MAX_FILLING = 4
"""Threads that fill masks: more take longer to wake than they save."""


@dataclass(eq=False)
class Copy:
    """A grammar, compiled. Answers that follow the same copy wait for each other: llguidance gives them one lexer, with
    a lock. What one of them has found out, all of them know.
    """

    matcher: Future[LLMatcher]
    num_bytes: int = 0
    uses: WeakSet[Use] = field(default_factory=WeakSet)


class Use:
    """One answer's hold on a copy."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        copy.uses.add(self)

    @property
    def compiled(self) -> Future[LLMatcher]:
        """Raises in its result `RequestError` for a grammar that does not compile."""
        return self.copy.matcher


class GrammarMask:
    """The state of one answer in its grammar."""

    def __init__(self, use: Use, grammar: Grammar, bytes_of: Sequence[bytes]) -> None:
        self.use = use
        self.matcher = use.compiled.result().deep_copy()
        self.numbers = Numbers() if grammar.is_json else None
        self._bytes_of = bytes_of
        self._after = grammar.after.encode()
        self._text = b""
        """The end of what came before the answer is bound, as long as what it waits for."""
        self.bound = not self._after

    @property
    def ended(self) -> bool:
        return self.bound and self.matcher.is_stopped()

    def allowed(self) -> Words | None:
        """Of one that is not bound yet. The rows of others are filled together, by `Grammars.fill_rows`."""
        if self.matcher.is_error():
            raise _fault(self.matcher)
        return None

    def forced(self) -> list[int]:
        return self.matcher.compute_ff_tokens() if self.bound else []

    def take(self, token_ids: Sequence[int]) -> None:
        free = 0
        while not self.bound and free < len(token_ids):
            text = self._text + self._bytes_of[token_ids[free]]
            self.bound = self._after in text
            self._text = text[-len(self._after) :]
            free += 1
        for token_id in token_ids[free:]:
            if not self.matcher.consume_token(token_id):
                raise _fault(self.matcher)
            if self.numbers is not None:
                self.numbers.take(self._bytes_of[token_id])


class Numbers:
    """Tells numbers that do not end from the digits of strings, in a JSON text that grows."""

    def __init__(self) -> None:
        self._in_string = False
        self._escaped = False
        self._num_digits = 0

    @property
    def too_long(self) -> bool:
        """Whether no more digit should follow."""
        return self._num_digits >= _MAX_DIGITS

    def take(self, data: bytes) -> None:
        """What a token adds to the text."""
        if b'"' in data or b"\\" in data or self._escaped:
            for byte in data:
                self._take_byte(byte)
        if self._in_string:
            self._num_digits = 0
        elif data.isdigit():
            self._num_digits += len(data)
        else:
            self._num_digits = len(data) - len(data.rstrip(b"0123456789"))

    def _take_byte(self, byte: int) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string and byte == ord("\\"):
            self._escaped = True
        elif byte == ord('"'):
            self._in_string = not self._in_string


def _by_copy(bound: tuple[GrammarMask, int]) -> int:
    """Threads get neighbours: those of one copy should be one thread's."""
    return id(bound[0].use.copy)


def _fault(matcher: LLMatcher) -> Exception:
    """What llguidance says of an answer that cannot go on.

    That is a grammar which takes more than its limits allow, or a token that none of our masks should have let through.
    """
    error = matcher.get_error().splitlines()[0]
    kind = ValueError if "satisfy the grammar" in error else RequestError
    return kind(f"the grammar cannot be followed any further: {error:.200}")


class Grammars:
    """Compiles grammars for one model, and fills the masks of all that follow one."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], *, forcing: bool = True) -> None:
        """`vocabulary` is called once, in a thread, for the first grammar: it takes some tenths of a second.

        `forcing`: masks know `forced` tokens, which costs them most of their time.
        """
        self._read = vocabulary
        self._forcing = forcing
        self._reading = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: LLTokenizer | None = None
        self._executor: LLExecutor | None = None
        self._digits: Words | None = None
        """Tokens that begin with one."""
        self._pool = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._copies: OrderedDict[str, list[Copy]] = OrderedDict()
        self._num_bytes = 0
        """What all copies take that are kept or in use."""
        self._num_threads = max(1, min(threads.default_count() * 4 // 5, _MAX_FILLING))

    def compile(self, grammar: Grammar) -> Use:
        """For one answer, which `mask` goes on with."""
        copies = self._copies.get(grammar.text, [])
        least = min((len(copy.uses) for copy in copies), default=_MAX_SHARING)
        if least >= _MAX_SHARING and len(copies) < self._num_threads:
            if copies and self._num_bytes + grammar.num_bytes > _MAX_BYTES:
                return Use(min(copies, key=lambda copy: len(copy.uses)))
            copies.append(self._copy(grammar))
        self._copies[grammar.text] = copies
        self._copies.move_to_end(grammar.text)
        if len(self._copies) > _MAX_KEPT:
            self._copies.popitem(last=False)
        return Use(min(copies, key=lambda copy: len(copy.uses)))

    def _copy(self, grammar: Grammar) -> Copy:
        """Raises `RequestError` where those in use leave no memory for it; others make room."""
        unused = [text for text, copies in self._copies.items() if not any(copy.uses for copy in copies)]
        while self._num_bytes + grammar.num_bytes > _MAX_BYTES and unused:
            self._copies.pop(unused.pop(0))
        if self._num_bytes + grammar.num_bytes > _MAX_BYTES:
            message = "the grammars that are in use take all memory there is for them: send this again later"
            raise RequestError(message, param="structured_outputs", code="server_busy", status=503)
        copy = Copy(self._pool.submit(self._compile, grammar.text, grammar.fuel), grammar.num_bytes)
        self._num_bytes += grammar.num_bytes
        finalize(copy, self._forget, grammar.num_bytes).atexit = False
        return copy

    def _forget(self, num_bytes: int) -> None:
        self._num_bytes -= num_bytes

    def mask(self, grammar: Grammar, use: Use) -> GrammarMask:
        """For an answer whose grammar is compiled."""
        assert self._vocabulary is not None, "it was read for the first grammar"
        return GrammarMask(use, grammar, self._vocabulary.tokens)

    def fill_rows(self, rows: Sequence[tuple[TokenMask, int]], words: Words) -> Sequence[tuple[TokenMask, int]]:
        """Fills rows of `words`, on several threads, without the interpreter's lock."""
        bound = [(mask, row) for mask, row in rows if isinstance(mask, GrammarMask) and mask.bound]
        if bound:
            from llguidance.numpy import fill_next_token_bitmask_par

            bound.sort(key=_by_copy)
            fill_next_token_bitmask_par(self._threads(), [(mask.matcher, row) for mask, row in bound], words)
            self._end_numbers([words[row] for mask, row in bound if mask.numbers is not None and mask.numbers.too_long])
        filled = {row for mask, row in bound if not mask.matcher.is_error()}
        return [each for each in rows if each[1] not in filled]

    def _end_numbers(self, rows: Sequence[Words]) -> None:
        """Takes tokens that begin with a digit out of rows that allow others too."""
        if not rows:
            return
        if self._digits is None:
            assert self._vocabulary is not None
            self._digits = pack_mask(np.array([token[:1].isdigit() for token in self._vocabulary.tokens], np.bool_))
        for row in rows:
            rest = row & ~self._digits
            if rest.any():
                row[:] = rest

    def _threads(self) -> LLExecutor:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(self._num_threads)
        return self._executor

    def _compile(self, text: str, fuel: int) -> LLMatcher:
        with self._reading:
            if self._tokenizer is None:
                self._vocabulary = self._read()
                self._tokenizer = self._vocabulary.for_llguidance()
        return compile_grammar(text if self._forcing else unforced(text), self._tokenizer, fuel)
