"""Command-line flags out of configuration classes: a field is a flag, its default the default, its docstring the help.

tyro does the parsing. What is added here: vLLM's short flags and its 4k / 4K numbers, fields that a command leaves out,
help without noise about None, and every mistake told in one line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence, Set
from functools import lru_cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ingle.errors import ConfigError

T = TypeVar("T")
Hidden = Mapping[Any, Set[str]]
"""Configuration class to the names of its fields that get no flag."""

SHORT_FLAGS = {"tensor_parallel_size": ("-tp",), "quantization": ("-q",), "yes": ("-y",)}
_UNITS: dict[str, int] = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = re.compile(r"(?P<whole>[+-]?\d{1,18})(?:\.(?P<decimals>\d{1,18}))?(?P<unit>[kmgKMG]?)")


def parse(target: type[T], argv: Sequence[str], *, command: str, hide: Hidden | None = None) -> T:
    """Read `argv` into `target`, a dataclass of flags and of nested configuration classes.

    A required field is a positional argument; a required `model` may also be given as `--model`. `hide` names the
    fields that get no flag and keep their default. Raises `ConfigError`; `--help` prints and exits.
    """
    args, model = _model_first(argv)
    flags = _Flags(hide or {})
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                target,
                prog=f"ingle {command}",
                args=args,
                return_unknown_args=True,
                registry=flags.registry,
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.PositionalRequiredArgs,
                    tyro.conf.PositionalMetavarFromFieldName,
                ),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _one_line(errors.getvalue())
        if "MODEL" in message and (greedy := flags.greedy.intersection(map(_flag_of, args))):
            message += f"; {min(greedy)} takes all words up to the next flag: give the model first"
        raise ConfigError(f"{message} (see `ingle {command} --help`)") from None
    if unknown and unknown != [model]:
        raise ConfigError(f"{_unexpected(unknown[0], model, flags.names)} (see `ingle {command} --help`)")
    return parsed


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


_CONVERT: dict[type, Callable[[str], Any]] = {
    int: parse_int,
    float: float,
    str: str,
    Path: Path,
    bool: lambda text: text == "true",
}


class _Flags:
    """tyro's registry for one command line, and the names of the flags it made."""

    def __init__(self, hide: Hidden) -> None:
        self.names: set[str] = set()
        self.greedy: set[str] = set()
        """Those that take several words."""
        self._hide = hide
        self.registry = ConstructorRegistry()
        self.registry.primitive_rule(_primitive)
        self.registry.struct_rule(self._fields)

    def _fields(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type):
            return None
        docs, types = lru_cache(lambda: _docstrings(info.type)), get_type_hints(info.type, include_extras=True)
        hidden = self._hide.get(info.type, frozenset())
        fields = []
        for field in dataclasses.fields(info.type):
            if field.name in hidden:
                continue
            default = tyro.MISSING_NONPROP if field.default is dataclasses.MISSING else field.default
            kind = _plain(types[field.name])
            if not dataclasses.is_dataclass(kind):
                kind = self._flag(field.name, kind, default)
            helptext = partial(_docstring, docs, field.name)
            fields.append(StructFieldSpec(name=field.name, type=kind, default=default, helptext=helptext))
        return StructConstructorSpec(info.type, tuple(fields))

    def _flag(self, name: str, kind: Any, default: Any) -> Any:
        flag = f"--{name.replace('_', '-')}"
        self.names.update({flag, *SHORT_FLAGS.get(name, ())})
        if kind is bool:
            self.names.add(f"--no-{flag[2:]}")
        if kind is tuple:
            self.greedy.add(flag)
        # The docstring says what leaving the flag out means; "(default: None)" would only blur it.
        silent = default is None or default is False or default == () or default is tyro.MISSING_NONPROP
        hint = "" if silent else None
        return Annotated[kind, tyro.conf.arg(aliases=SHORT_FLAGS.get(name), help_behavior_hint=hint)]


def _plain(kind: Any) -> Any:
    """The type in words whose defaults tyro checks itself: for others it imports a checker, a tenth of a start."""
    if isinstance(kind, UnionType):
        return Union[get_args(kind)]  # noqa: UP007 (X | Y is what it was)
    return tuple if kind == tuple[str, ...] else kind


def _docstring(docs: Callable[[], dict[str, str]], name: str) -> str | None:
    """Of a field, once help is asked for: the source of its class has to be read for that."""
    return docs().get(name)


def _docstrings(config: type) -> dict[str, str]:
    """The string below each field of a class, by the field's name."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, below in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            docs[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return docs


def _primitive(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Words, whole numbers with units, and optional values that do not offer the word None."""
    if info.type is tuple:
        return PrimitiveConstructorSpec(
            nargs="*",
            metavar="[STR [STR ...]]",
            instance_from_str=_words,
            is_instance=lambda value: isinstance(value, tuple),
            str_from_instance=list,
        )
    kinds = [kind for kind in get_args(info.type) or (info.type,) if kind is not NoneType]
    if info.type is not int and (len(kinds) != 1 or NoneType not in get_args(info.type) or kinds[0] not in _CONVERT):
        return None
    kind = kinds[0]
    choices = ("true", "false") if kind is bool else None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}" if choices else kind.__name__.upper(),
        instance_from_str=lambda args: _CONVERT[kind](args[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def _words(args: list[str]) -> tuple[str, ...]:
    if not args:  # as `--api-key $KEY` is when KEY is not set
        raise ValueError("a value is missing")
    return tuple(args)


def _model_first(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """`argv` with the value of `--model` moved to the front, where a positional model stands; and that value."""
    rest: list[str] = []
    models: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--model":
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value or value.startswith("-"):
            raise ConfigError("--model needs a value: a short name, a folder or a .gguf file")
        models.append(value)
    if not models:
        return rest, None
    if len(set(models)) > 1:
        raise ConfigError(f"--model was given twice: {models[0]!r} and {models[1]!r}")
    return [models[0], *rest], models[0]


def _unexpected(word: str, model: str | None, known: Set[str]) -> str:
    if not word.startswith("-"):
        twice = f"; the model was already given as --model {model}" if model is not None else ""
        return f"unexpected argument {word!r}{twice}"
    near = difflib.get_close_matches(_flag_of(word), [flag for flag in known if flag.startswith("--")], 1, cutoff=0.75)
    return f"unknown flag {word.partition('=')[0]}" + (f"; did you mean {near[0]}?" if near else "")


def _flag_of(word: str) -> str:
    """`--some-flag` of `--some_flag=value`."""
    return word.partition("=")[0].replace("_", "-")


def _one_line(box: str) -> str:
    """The message in the box that tyro draws, in Unicode or ASCII: between the title's rule and that before its hints.

    A title stands in its rule, or above it where there is no box.
    """
    lines = [line.strip("│| ") for line in _COLOUR.sub("", box).strip().splitlines()]
    rules = [index for index, line in enumerate(lines[:2]) if line.endswith(("──╮", "--", "-+"))]
    below = lines[rules[0] + 1 :] if rules else lines
    message = itertools.takewhile(lambda line: line.strip("─-"), below)
    return " ".join(" ".join(message).split()).rstrip(".")
