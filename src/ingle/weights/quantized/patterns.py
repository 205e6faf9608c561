"""Which modules a configuration's names and patterns mean. Patterns are strangers': they get little time."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from ingle.errors import ModelError

_PATIENCE_S = 0.2
_MAX_PATTERN = 2000
_KINDS = ("Linear",)
"""Targets that mean modules of a class, which are all that are asked about."""


def contains(names: Sequence[str], module: str) -> bool:
    """Whether a module is one of these, lies in one, or has one for a part of its name: AWQ's and FP8's lists."""
    dotted = f".{module}."
    return any(f".{name}." in dotted for name in names)


def is_module(name: str, module: str) -> bool:
    return name == module


def is_glob(names: Sequence[str], module: str) -> bool:
    """With `*` for any letters."""
    return contains(names, module) or any(fnmatchcase(module, name[:_MAX_PATTERN]) for name in names if "*" in name)


def is_target(target: str, module: str) -> bool:
    """compressed-tensors': a name, a pattern behind `re:`, or a class of modules."""
    if target.startswith("re:"):
        return matches_regex(target.removeprefix("re:"), module)
    return target in _KINDS or target == module


def matches_regex(pattern: str, module: str) -> bool:
    """From the beginning of the name. Raises `ModelError` for a pattern that is none, or takes too long."""
    try:
        return _compiled(pattern).match(module, timeout=_PATIENCE_S) is not None
    except TimeoutError:
        raise ModelError(
            f"the pattern {reprlib.repr(pattern)} in the quantization's configuration takes too long"
        ) from None


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    import regex  # takes a while, and few configurations have patterns

    try:
        if len(pattern) > _MAX_PATTERN:
            raise regex.error("it is too long")
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        shown = reprlib.repr(pattern)
        raise ModelError(f"the pattern {shown} in the quantization's configuration is none: {error}") from None
