"""Reads what `torch.save` wrote of a dict of tensors, without unpickling it.

A pickle is a program for a stack machine that may call any function. `read_state_dict` walks the few instructions that
`torch.save` writes for plain tensors (protocol 2, https://docs.python.org/3/library/pickletools.html) and makes of each
call a description: nothing is imported or called, whatever the bytes. Anything else is refused.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Far above what real tensors have. They also keep products of sizes within what Python multiplies at once.
MAX_DIMS = 16
MAX_SIZE = 1 << 48
MAX_STEPS = 1 << 22
"""Instructions: of each the machine may keep an object many times its size. A tensor takes some forty."""


class PickleError(ValueError):
    """The bytes are no pickle, or ask for something that is not a plain tensor."""


@dataclass(frozen=True)
class SavedTensor:
    """A view of a storage, as `torch.as_strided` describes it; sizes, strides and offset count elements."""

    storage: str
    """Name of the storage's file in the archive."""
    storage_type: str
    """Such as BFloat16Storage."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_storage_elements(self) -> int:
        """How much of the storage, from its start, the view reaches over."""
        if 0 in self.shape:
            return 0
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    @property
    def repeats(self) -> bool:
        """Whether it is larger than what it is a view of: made by `expand`, or to fill memory."""
        return math.prod(self.shape) > self.num_storage_elements


@dataclass(frozen=True)
class _Function:
    name: str


@dataclass(frozen=True)
class _Storage:
    type: str
    key: str


_MARK = object()
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_STORAGE_TYPES = (
    "BFloat16Storage", "HalfStorage", "FloatStorage", "DoubleStorage",
    "BoolStorage", "ByteStorage", "CharStorage", "ShortStorage", "IntStorage", "LongStorage",
)  # fmt: skip
_FUNCTIONS = {_ORDERED_DICT, _TENSOR, _PARAMETER, *(f"torch {name}" for name in _STORAGE_TYPES)}


def read_state_dict(pickle: bytes) -> dict[str, SavedTensor]:
    """The tensors of a pickled `dict[str, Tensor]`; entries of plain values are left out. Raises `PickleError`."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count >= MAX_STEPS:
                raise PickleError(f"it has more than {MAX_STEPS} instructions, which no model needs")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise PickleError(f"it has the instruction {opcode.name}, which no plain tensor needs")
            step(machine, argument)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise PickleError(f"it is damaged: {error or type(error).__name__}") from error
    if len(machine.stack) != 1 or not isinstance(machine.stack[0], dict):
        raise PickleError("it holds no dict of tensors")
    return {name: value for name, value in machine.stack[0].items() if isinstance(value, SavedTensor)}


class _Machine:
    """Values are: None, bools, ints, strings, tuples and lists of values, dicts with keys of strings, and the classes
    above. Tuples are only looked into one level deep, so that nesting costs nothing."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise PickleError("it is damaged: a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def tuple_of(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.push(tuple(values[::-1]))

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("it sets items of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise PickleError(f"it has a key that is a {type(key).__name__}, not a tensor's name")
            target[key] = value

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleError("it appends to something that is no list")
        target.extend(values)

    def find(self, name: str) -> None:
        if name not in _FUNCTIONS:
            raise PickleError(f"it asks for {name.replace(' ', '.')[:100]!r}, which is no part of a plain tensor")
        self.push(_Function(name))

    def build(self) -> None:
        """State of an ordered dict, such as the `_metadata` of `Module.state_dict`: not a tensor, so dropped."""
        self.pop()
        if not isinstance(self.stack[-1], dict):
            raise PickleError("it gives a state to something that is no dict")

    def storage(self) -> None:
        match self.pop():
            case ("storage", _Function(name), str(key), str(), int()) if name.startswith("torch "):
                self.push(_Storage(name.removeprefix("torch "), key))
            case _:
                raise PickleError("it refers to something that is no storage")

    def call(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Function(name), () if name == _ORDERED_DICT:
                self.push({})
            case _Function(name), (SavedTensor() as tensor, bool(), {}) if name == _PARAMETER:
                self.push(tensor)
            case _Function(name), (_Storage() as storage, offset, shape, stride, bool(), *_) if name == _TENSOR:
                if not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(stride)):
                    raise PickleError(f"it has a tensor in {storage.key[:100]!r} with impossible sizes")
                if len(shape) != len(stride):
                    raise PickleError(f"it has a tensor in {storage.key[:100]!r} with fewer strides than dimensions")
                self.push(SavedTensor(storage.key, storage.type, offset, shape, stride))
            case _:
                raise PickleError("it calls something in a way that no plain tensor needs")


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= MAX_DIMS
        and all(type(value) is int and 0 <= value <= MAX_SIZE for value in values)
    )


def _nothing(machine: _Machine, argument: Any) -> None:
    pass


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "STOP": _nothing,
    "MARK": lambda machine, _: machine.push(_MARK),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), _Machine.push
    ),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_to_mark()),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda machine, index: machine.memo.__setitem__(index, machine.stack[-1])
    ),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "GLOBAL": _Machine.find,
    "BINPERSID": lambda machine, _: machine.storage(),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
