"""Renders chat templates, and tries grammars, in a process of its own, in which a hostile one can do no harm.

A template is a program that comes with a model. Jinja's sandbox keeps it from the interpreter's internals, but not from
eating time and memory: `'{:9999999999}'.format(1)`, or the text of a list that holds the same list twice, sixty levels
deep, are single calls into C that no deadline checked in Python can interrupt. So the kernel sets the limits: the
default action of SIGPROF ends this process wherever it is, and its address space is bounded.

A grammar comes with a request: a schema of one line, such as whole multiples of a large prime, has an automaton of
gigabytes.

The protocol is a JSON line in, `{"template": source, "variables": {...}}`, and a JSON line out, `{"text": ...}` or
`{"error": ...}`, with a `"reason"` for the log where the error says too little; or `{"grammar": text, "fuel": most,
"vocabulary": {...}}`, and `{"num_bytes": taken}` or `{"error": ...}`. The parent (`sandbox.py`) imports no Jinja.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ingle.heap import num_bytes_in_use

MAX_CPU_S = 2.0
MAX_MEMORY_BYTES = 1 << 30
MAX_GRAMMAR_CPU_S = 4.0
MAX_GRAMMAR_BYTES = 96 << 20
"""While it is compiled."""
MAX_OUTPUT_CHARS = 4_000_000
MAX_ERROR_CHARS = 1000


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training. As in transformers, its body is a scope."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` for templates, without the type and its attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates. It takes no name that starts with an underscore: those lead into CPython."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name starts with an underscore")


def _raise_exception(message: Any) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def compile_template(source: str) -> Template:
    """Compile as transformers does: `utils/chat_template_utils.py` of 5.x. Raises Jinja's exceptions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of a template. Raises whatever the template raises, and `TemplateError` when it grows too long."""
    chunks, size = [], 0
    for chunk in compile_template(source).generate(variables):
        size += len(chunk)
        if size > MAX_OUTPUT_CHARS:
            raise TemplateError(f"it writes more than {MAX_OUTPUT_CHARS} characters")
        chunks.append(chunk)
    return "".join(chunks)


def _failure(error: Exception) -> dict[str, str]:
    """What a client may read of a failure: the template's own words. The names of Python are for the log."""
    if isinstance(error, TemplateSyntaxError):
        return {"error": f"{error.message} (line {error.lineno})"[:MAX_ERROR_CHARS]}
    if isinstance(error, MemoryError):
        return {"error": f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    if isinstance(error, TemplateError) and str(error):
        return {"error": str(error)[:MAX_ERROR_CHARS]}
    reason = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    return {"error": "it fails on this conversation; the log has the reason", "reason": reason}


@lru_cache(1)
def _tokenizer(vocabulary: str) -> Any:
    from ingle.text.grammar import small_vocabulary

    return small_vocabulary(**json.loads(vocabulary)).for_llguidance()


def try_grammar(text: str, fuel: int, vocabulary: str) -> dict[str, Any]:
    """Compiles it, and says what that takes of memory: where it is too much, the process ends."""
    from ingle.errors import RequestError
    from ingle.text.grammar import compile_grammar

    tokenizer = _tokenizer(vocabulary)
    signal.setitimer(signal.ITIMER_PROF, MAX_GRAMMAR_CPU_S)
    with _memory_limited(MAX_GRAMMAR_BYTES):
        before = num_bytes_in_use()
        try:
            compiled = compile_grammar(text, tokenizer, fuel)
        except RequestError as error:
            return {"error": str(error)}
        taken = num_bytes_in_use() - before
        del compiled
    return {"num_bytes": max(taken, 0)}


@contextlib.contextmanager
def _memory_limited(num_bytes: int) -> Iterator[None]:
    """Beyond what this process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (min(taken + num_bytes, MAX_MEMORY_BYTES), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    try:
        if "grammar" in request:
            return try_grammar(request["grammar"], request["fuel"], request["vocabulary"])
        return {"text": render(request["template"], request["variables"])}
    except Exception as error:  # whatever it is, it is the template's, and the answer to the parent
        return _failure(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main() -> None:
    """Answer requests until standard input ends, as it does when the parent dies."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with contextlib.suppress(ValueError, OSError):  # macOS has the limit's name only
        _, most = resource.getrlimit(resource.RLIMIT_AS)  # which nobody but root may raise
        allowed = MAX_MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (allowed, most))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()
