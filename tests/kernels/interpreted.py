"""Triton's interpreter: where it does not compute what a GPU does, and where it takes long."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import chain, combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch


def pairwise(*axes: Iterable[Any]) -> list[Any]:
    """All combinations, a value of each axis in each; a tuple stands for several arguments.

    A GPU tries them all. In the interpreter each two values meet once, and the rest is slow.
    """
    values = [list(axis) for axis in axes]
    combined = list(product(*map(range, map(len, values))))
    pairs = {each: set(combinations(enumerate(each), 2)) for each in combined}
    unmet, kept = set[Any]().union(*pairs.values()), set()
    while unmet:
        best = max(combined, key=lambda each: len(unmet & pairs[each]))
        kept.add(best)
        unmet -= pairs[best]
    slow = () if torch.cuda.is_available() else pytest.mark.slow
    cases = []
    for each in combined:
        chosen = [axis[index] for axis, index in zip(values, each, strict=True)]
        arguments = chain.from_iterable(value if type(value) is tuple else (value,) for value in chosen)
        cases.append(pytest.param(*arguments, marks=() if each in kept else slow))
    return cases


def exact_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 becomes FP8 as on a GPU: rounded to even, too large numbers to the largest. The interpreter's own
    conversion loses what rounding carries into the exponent, and cuts off numbers without one."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(numbers: npt.NDArray[Any], of: Any, to: Any, mode: Any) -> npt.NDArray[Any]:
        if (of.name, to.name) != ("fp32", "fp8e4nv"):
            return np.asarray(convert(numbers, of, to, mode))
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32)).clamp(-448, 448)
        return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(numbers.shape)

    monkeypatch.setattr(interpreter, "_convert_float", converted)


def quicken() -> None:
    """The same in less than half the time: inside each call of a function the interpreter looks through all of Triton's
    language for what it stands in for, and with each sum of integers it computes whether that overflowed, and forgets
    it."""
    from triton import language
    from triton.runtime import interpreter

    stand_in, np_dtype_of, is_builtin = interpreter._patch_lang, interpreter._get_np_dtype, language.core.is_builtin
    places, np_dtypes = dict[Any, list[str]](), dict[str, Any]()

    def patch_builtin(place: Any, builder: Any, scope: Any) -> None:
        if place not in places:
            places[place] = [name for name, member in inspect.getmembers(place) if is_builtin(member)]
        for name in places[place]:
            if is_builtin(member := getattr(place, name)):
                interpreter._patch_attr(place, name, member, builder, scope)

    @cache
    def languages(function: Any) -> list[Any]:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [module for module in (language, language.core) if module in modules]

    def patch_lang(function: Any) -> Any:
        if any(is_builtin(module.load) for module in languages(function)):
            return stand_in(function)
        return interpreter._LangPatchScope()  # inside a kernel, whose end takes it all back

    def np_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype_of(kind)
        return np_dtypes[name]

    interpreter._patch_builtin, interpreter._patch_lang, interpreter._get_np_dtype = patch_builtin, patch_lang, np_dtype
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
