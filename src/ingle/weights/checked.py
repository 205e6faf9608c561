"""Values of a model's configuration, checked where they are read: files come from anywhere."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from ingle.errors import ConfigError, ModelError

_T = TypeVar("_T")

_MAX_INT = 1 << 31
_MAX_FLOAT = sys.float_info.max


class Checked:
    """A view of a mapping such as a config.json, which gives out what it has been asked for, or refuses.

    null counts as absent. A getter returns its default for an absent key, and whoever gives none cannot do without
    the key. Raises `ModelError`, one line that names the file, the key, its value and what was expected; `ConfigError`
    where they come from a flag.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        """`source` is what errors name, mostly a file; `prefix` stands before keys there."""
        self.values = values
        self.source = source
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = _MAX_INT) -> int:
        value = self._get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"not a whole number from {least} to {most}")
        return value

    def optional_integer(self, key: str, *, least: int = 1, most: int = _MAX_INT) -> int | None:
        return self.integer(key, least=least, most=most) if key in self else None

    def number(
        self,
        key: str,
        default: float | None = None,
        *,
        above: float = 0.0,
        least: float = 0.0,
        most: float = _MAX_FLOAT,
    ) -> float:
        """Above `above`, at least `least`, at most `most`, and so neither infinite nor NaN."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not (above < value and least <= value <= most):
            low = f"of at least {least:g}" if least > above else f"above {above:g}"
            self.refuse(key, f"not a number {low}{f' and at most {most:g}' if most < _MAX_FLOAT else ''}")
        return float(value)

    def optional_number(self, key: str, *, most: float = _MAX_FLOAT) -> float | None:
        return self.number(key, most=most) if key in self else None

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            self.refuse(key, "not true or false")
        return value

    def choice(self, key: str, known: Mapping[str, _T], default: str) -> _T:
        """What `known` has under the value, a string."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in known:
            self.fail(f"{key} {reprlib.repr(value)} is not supported; known are {', '.join(known)}")
        return known[value]

    def items(self, key: str, kind: type[_T], expected: str) -> list[_T]:
        """A list, empty for an absent key."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            self.refuse(key, f"not a list of {expected}")
        return value

    def section(self, key: str, prefix: str = "") -> Checked:
        """The object within this one, empty for an absent key."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            self.refuse(key, "not an object")
        return Checked(value, self.source, prefix)

    def refuse(self, key: str, why: str) -> NoReturn:
        """`why` goes on after the key and its value."""
        self.fail(f"{self._prefix}{key} is {reprlib.repr(self.values.get(key))}, {why}")

    def fail(self, message: str) -> NoReturn:
        kind = ConfigError if self.source.startswith("--") else ModelError
        raise kind(f"{self.source}: {message}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value
