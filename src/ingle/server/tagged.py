"""Objects that say of which kind they are, in a field `type`, and lists of such."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

from pydantic import ValidationError

from ingle.server.body import FieldError, StrictModel, again, field_error, show

_MAX_FOUND = 20
"""Most wrong objects of a list that are reported."""


class OneOf:
    """The kinds of object that may stand somewhere, found by the `Literal` of their field `type`."""

    def __init__(
        self,
        what: str,
        kinds: Sequence[type[StrictModel]],
        *,
        refused: Mapping[str, str] | None = None,
        other: type[StrictModel] | None = None,
    ) -> None:
        """`refused` are kinds that are known without support, and why; `other` is what those are taken for that nobody
        knows, which are refused without it.
        """
        self._what = what
        self._kinds = {name: kind for kind in kinds for name in get_args(kind.model_fields["type"].annotation)}
        self._refused = refused or {}
        self._other = other

    def read(self, value: Any) -> StrictModel:
        """Raises `ValidationError`."""
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str):
            raise self._wrong(value, FieldError(after=f" must be an object with a type, got {show(value)}"))
        model = self._kinds.get(kind)
        if model is None and kind in self._refused:
            raise self._wrong(value, FieldError("type", f" is {show(kind)}, but {self._refused[kind]}"))
        if model is None and self._other is None:
            known = ", ".join(self._kinds)
            raise self._wrong(value, FieldError("type", f" is {show(kind)}, but {self._what} may be: {known}"))
        return (model or self._other or StrictModel).model_validate(value)

    def read_list(self, value: Sequence[Any]) -> list[StrictModel]:
        """Raises `ValidationError` that says where in the list."""
        found: list[StrictModel] = []
        wrong = []
        for index, entry in enumerate(value):
            try:
                found.append(self.read(entry))
            except ValidationError as error:
                wrong += [again(details, index) for details in islice(error.errors(include_url=False), _MAX_FOUND)]
                if len(wrong) >= _MAX_FOUND:
                    break
        if wrong:
            raise ValidationError.from_exception_data(self._what, wrong)
        return found

    def _wrong(self, value: Any, error: FieldError) -> ValidationError:
        return ValidationError.from_exception_data(self._what, [field_error((), value, error)])


def texts_or(kinds: OneOf) -> Callable[[Any], Any]:
    """Reads a text, or a list of objects of those kinds; null is an empty text."""

    def read(value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value or ""
        if isinstance(value, list):
            return kinds.read_list(value)
        raise ValueError(f"must be a string or a list, got {show(value)}")

    return read
