"""The fields of configuration classes as flags: their names, and what their values are."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

Hidden = Mapping[Any, Set[str]]
"""Configuration class to the names of its fields that get no flag."""

SHORT_FLAGS = {
    "tensor_parallel_size": ("-tp",),
    "data_parallel_size": ("-dp",),
    "quantization": ("-q",),
    "yes": ("-y",),
    "input_file": ("-i",),
    "output_file": ("-o",),
}
_UNITS: dict[str, int] = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_NUMBER = re.compile(r"(?P<whole>[+-]?\d{1,18})(?:\.(?P<decimals>\d{1,18}))?(?P<unit>[kmgKMG]?)")
_TRUE, _FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def parse_int(text: str) -> int:
    """A whole number; as in vLLM 4k is 4000 and 4K is 4096, and so on with m and g. Raises `ValueError`."""
    match = _NUMBER.fullmatch(text)
    if match is None or (match["decimals"] and not match["unit"]):
        raise ValueError(f"{text!r} is not a whole number; 4k (4000) and 4K (4096) are fine")
    decimals: str = match["decimals"] or ""
    divisor = int("1" + "0" * len(decimals))
    scaled = int(match["whole"] + decimals) * _UNITS.get(match["unit"], 1)
    if scaled % divisor:
        raise ValueError(f"{text!r} is not a whole number")
    return scaled // divisor


def parse_truth(text: str) -> bool:
    """Raises `ValueError`."""
    if (lowered := text.lower()) not in _TRUE | _FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return lowered in _TRUE


def _parse_float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None


CONVERT: dict[type, Callable[[str], Any]] = {
    int: parse_int,
    float: _parse_float,
    str: str,
    Path: Path,
    bool: parse_truth,
}


class Flag(NamedTuple):
    """A field that has a flag."""

    owner: type
    field: str
    kind: Any
    """Its type as `plain` says it."""
    required: bool = False

    @property
    def name(self) -> str:
        return f"--{self.field.replace('_', '-')}"

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that it goes by on a command line."""
        negated = (f"--no-{self.name[2:]}",) if self.is_switch else ()
        return (self.name, *SHORT_FLAGS.get(self.field, ()), *negated)

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def takes_words(self) -> bool:
        """As many as there are."""
        return self.kind is tuple or get_origin(self.kind) is tuple

    @property
    def is_truth(self) -> bool:
        """Whether it is given as true or false, in a word of its own."""
        return not self.is_switch and bool in get_args(self.kind)

    def value(self, words: Sequence[str]) -> Any:
        """What the words after it mean. Raises `ValueError`."""
        if self.takes_words:
            return tuple(words)
        if len(words) != 1:
            raise ValueError("it takes one value")
        kinds = [kind for kind in get_args(self.kind) or (self.kind,) if kind is not NoneType]
        if get_origin(self.kind) is Literal:
            if words[0] not in get_args(self.kind):
                raise ValueError(f"{words[0]!r} is not one of {', '.join(get_args(self.kind))}")
            return words[0]
        return CONVERT[kinds[0]](words[0])


def plain(kind: Any) -> Any:
    """The type in words whose defaults tyro checks itself: for others it imports a checker, a tenth of a start."""
    if isinstance(kind, UnionType):
        return Union[get_args(kind)]  # noqa: UP007 (X | Y is what it was)
    return tuple if kind == tuple[str, ...] else kind


@lru_cache(maxsize=32)
def types_of(config: type) -> dict[str, Any]:
    return get_type_hints(config, include_extras=True)


def flags_of(target: type, hide: Hidden) -> Iterator[Flag]:
    """Of a class and of those nested in it. A hidden field has none."""
    types = types_of(target)
    for field in dataclasses.fields(target):
        kind = plain(types[field.name])
        if field.name in hide.get(target, ()):
            continue
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from flags_of(kind, hide)
        else:
            yield Flag(target, field.name, kind, required=field.default is dataclasses.MISSING)


def is_positional(flag: Flag) -> bool:
    """Whether it is given by its place; tyro's word for that is an annotation."""
    from tyro.conf import Positional

    annotation: Any = types_of(flag.owner)[flag.field]
    return flag.required or any(mark is Positional for mark in getattr(annotation, "__metadata__", ()))
