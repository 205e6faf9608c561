"""Command-line flags out of configuration classes: a field is a flag, its default the default, its docstring the help.

tyro does the parsing. What is added here: vLLM's short flags and its 4k / 4K numbers, the flags of other tools, values
from the environment and from a file, fields that a command leaves out, help without noise about None, and every
mistake told in one line.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from types import NoneType
from typing import Annotated, Any, NamedTuple, TypeVar, get_args

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ingle.cli import sources
from ingle.cli.fields import CONVERT, SHORT_FLAGS, Flag, Hidden, flags_of, is_positional, plain, types_of
from ingle.cli.line import Dialect, Line, read, told
from ingle.cli.sources import Default, Defaults
from ingle.config import CONFIGURATION, EngineConfig
from ingle.errors import ConfigError, printable
from ingle.habits.commands import FLAGS_OF_COMMANDS
from ingle.habits.variables import KEYS, noticed

T = TypeVar("T")

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_FROM_ELSEWHERE = """
Flags may also be set by the environment (INGLE_MAX_MODEL_LEN=4k), and by the same names in a .toml,
.yaml or .json file, --config FILE. The command line is stronger than the environment, and that than
the file. Flags of vLLM, llama.cpp, Ollama, TGI, SGLang and FastChat are understood: see `ingle help flags`."""


def parse(
    target: type[T],
    argv: Sequence[str],
    *,
    command: str,
    hide: Hidden | None = None,
    default_model: str | None = None,
) -> T:
    """Read `argv` into `target`, a dataclass of flags and of nested configuration classes.

    A required field is a positional argument; a required `model` may also be given as `--model`, and is `default_model`
    in commands that do without one. `hide` names the fields that get no flag and keep their default. A command with an
    `EngineConfig` also takes the flags of other tools, and fields of configuration classes from the environment and
    from `--config`; what is to be said of that goes to stderr. Raises `ConfigError`; `--help` prints and exits.
    """
    return parse_given(target, argv, command=command, hide=hide, default_model=default_model)[0]


class Given(NamedTuple):
    """What was asked for, in ingle's own words: for whoever starts the same elsewhere."""

    settings: list[tuple[Flag, list[str]]]
    """Of the command line and the environment, not of the file of `--config`."""
    config: str | None
    environment: dict[str, str]
    """Variables that flags of other tools set."""


def parse_given(
    target: type[T],
    argv: Sequence[str],
    *,
    command: str,
    hide: Hidden | None = None,
    default_model: str | None = None,
) -> tuple[T, Given]:
    """As `parse`."""
    asked = _ask(target, argv, command, hide or {}, default_model)
    errors, flags = io.StringIO(), _Flags(hide or {}, asked.defaults, default_model)
    try:
        with contextlib.redirect_stderr(errors):
            parsed, unknown = tyro.cli(
                target,
                prog=f"ingle {command}",
                args=asked.words,
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
            if asked.dialect.loads_model:
                print(_FROM_ELSEWHERE)
            raise
        raise ConfigError(f"{_one_line(errors.getvalue())} (see `ingle {command} --help`)") from None
    except ConfigError as error:
        raise ConfigError(asked.with_origin(str(error))) from None
    if unknown:
        twice = f"; the model was already given as --model {asked.line.model}" if asked.line.model is not None else ""
        raise ConfigError(f"unexpected argument {unknown[0]!r}{twice} (see `ingle {command} --help`)")
    for notice in asked.notices:
        print("notice:", printable(notice), file=sys.stderr)
    if any(flag.field == "port" for flag in asked.dialect.own.values()) and (origins := asked.origins()):
        print("settings:", printable(origins), file=sys.stderr)
    os.environ.update(asked.line.environment)
    return parsed, asked.given()


class _Asked(NamedTuple):
    """A command line, and what stands behind it."""

    line: Line
    words: list[str]
    dialect: Dialect
    defaults: Defaults
    notices: list[str]

    def given(self) -> Given:
        config = self.line.config or os.environ.get("INGLE_CONFIG")
        said = {(flag.owner, flag.field): (flag, words) for flag, words in self.line.implied}
        flags = {(flag.owner, flag.field): flag for flag in self.dialect.own.values()}
        for key, default in self.defaults.items():
            if default.where != config and key not in said:
                said[key] = flags[key], default.words()
        said |= {(flag.owner, flag.field): (flag, words) for flag, words in self.line.settings}
        return Given(list(said.values()), config, self.line.environment)

    def origins(self) -> str:
        """The values that were not given on the command line, with where each comes from."""
        given = {(flag.owner, flag.field) for flag, _ in self.line.settings}
        flags = {(flag.owner, flag.field): flag for flag in self.dialect.own.values()}
        by_place: dict[str, list[str]] = {}
        for key, default in self.defaults.items():
            if key not in given:
                name = flags[key].name.removeprefix("--")
                by_place.setdefault(default.where, []).append(f"{name} {default.shown(flags[key])}")
        return "; ".join(f"{', '.join(settings)} by {where}" for where, settings in by_place.items())

    def with_origin(self, message: str) -> str:
        """An error, with where the value came from that it names, if that is not the command line."""
        given = {(flag.owner, flag.field) for flag, _ in self.line.settings}
        for (owner, field), default in self.defaults.items():
            if field == "model":
                continue
            name = f"--{field.replace('_', '-')}"
            if (owner, field) not in given and re.search(rf"(?<![\w-]){name}(?![\w-])", message):
                return f"{message} (set by {default.where})"
        return message


def _ask(target: type, argv: Sequence[str], command: str, hide: Hidden, default_model: str | None) -> _Asked:
    flags = list(flags_of(target, hide))
    own = {name: flag for flag in flags if not is_positional(flag) for name in flag.spellings}
    model = next((flag for flag in flags if flag.field == "model" and is_positional(flag)), None)
    if model is not None:
        own["--model"] = model
    loads_model = any(flag.owner is EngineConfig for flag in flags)
    takes_prompt = any(flag.field == "prompt" and is_positional(flag) for flag in flags)
    dialect = Dialect(own, loads_model, takes_prompt, FLAGS_OF_COMMANDS.get(command, {}))
    wants_help = any(word in ("-h", "--help") for word in argv)
    line = read([word for word in argv if word not in ("-h", "--help")], dialect)
    if wants_help:
        line.objections.clear()
    if line.objections:
        raise told(line.objections, command)
    defaults: Defaults = {}
    notices = line.notices
    if loads_model:
        defaults, more = _from_elsewhere(flags, line, dialect, command)
        notices = [*line.notices, *more]
    if model is not None and model.required and not wants_help:
        _find_model(line, defaults, command, default_model)
    words = ["--help"] if wants_help else line.words()
    return _Asked(line, words, dialect, defaults, notices)


def _from_elsewhere(flags: Sequence[Flag], line: Line, dialect: Dialect, command: str) -> tuple[Defaults, list[str]]:
    """What file and environment say, and what is to be said of them."""
    flags = [flag for flag in flags if flag.owner in CONFIGURATION or flag.field in SAMPLING]
    defaults, notices = {}, []
    path = line.config or os.environ.get("INGLE_CONFIG")
    if path:
        file = sources.from_file(path, dialect, command)
        notices += [f"{path}: {notice}" for notice in file.notices]
        configured = {(flag.owner, flag.field) for flag in flags}
        for flag, default in sources.values_of(file, path):
            if (flag.owner, flag.field) in configured:
                defaults[flag.owner, flag.field] = default
        if file.model is not None:
            defaults[EngineConfig, "model"] = Default(file.model, path)
        if any(sources.is_secret(flag) for flag, _ in file.settings):
            notices += filter(None, [sources.key_file_notice(path)])
    for flag, default in sources.from_environment(flags, os.environ):
        defaults[flag.owner, flag.field] = default
    notices += list(_of_variables(flags, line, defaults))
    return defaults, notices


def _of_variables(flags: Sequence[Flag], line: Line, defaults: Defaults) -> Iterator[str]:
    given = {flag.field for flag, _ in line.settings}
    for (_, field), default in defaults.items():
        if default.where in KEYS and field not in given:
            yield (
                f"{default.where} is taken as the server's API key, as without it the server would be open; set "
                "INGLE_API_KEY instead, or unset it"
            )
    if any(flag.field == "api_key" for flag in flags):  # a server: others would say the same each time they are started
        yield from noticed(os.environ)
    known = [sources.variable_of(flag) for each in CONFIGURATION for flag in flags_of(each, {})]
    yield from sources.unknown_variables([*known, *(f"INGLE_{name.upper()}" for name in SAMPLING)], os.environ)


SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "repetition_penalty", "presence_penalty"),
    "frequency_penalty",
)
"""Flags of sampling that the environment and the file may set, where a command has them."""


def _find_model(line: Line, defaults: Defaults, command: str, default_model: str | None) -> None:
    """Sees to it that there is a model. Raises `ConfigError`."""
    if line.model is not None or line.positionals:
        defaults.pop((EngineConfig, "model"), None)
        return
    default = defaults.get((EngineConfig, "model"))
    if default is None and default_model is not None:
        line.model = default_model
        return
    if default is None:
        more = ""
        if line.swallowed:
            greedy = next(flag.name for flag, _ in line.settings if flag.takes_words)
            more = f"; {greedy} takes all words up to the next flag: give the model first"
        raise ConfigError(f"ingle {command} needs a MODEL{more or _examples(command)} (see `ingle {command} --help`)")
    line.model = default.value


def _examples(command: str) -> str:
    """What to type, by what is here."""
    from ingle.errors import IngleError

    try:
        from ingle.hub.store import Store

        stored = Store().names()
    except IngleError:
        stored = []
    default = "smollm2:135m"
    example = f": `ingle {command} {stored[0] if stored and default not in stored else default}`"
    return example + (f"; in the store are {', '.join(stored)}" if len(stored) > 1 else "")


class _Flags:
    """tyro's registry for one command line."""

    def __init__(self, hide: Hidden, defaults: Defaults, default_model: str | None) -> None:
        self._hide = hide
        self._default_model = default_model
        self._defaults = defaults
        self.registry = ConstructorRegistry()
        self.registry.primitive_rule(_primitive)
        self.registry.struct_rule(self._fields)

    def _fields(self, info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type):
            return None
        docs, types = partial(_docstrings, info.type), types_of(info.type)
        hidden = self._hide.get(info.type, frozenset())
        fields = []
        for field in dataclasses.fields(info.type):
            if field.name in hidden:
                continue
            default = tyro.MISSING_NONPROP if field.default is dataclasses.MISSING else field.default
            elsewhere = None if field.name == "model" else self._defaults.get((info.type, field.name))
            kind = plain(types[field.name])
            if not dataclasses.is_dataclass(kind):
                flag = Flag(info.type, field.name, kind)
                kind = _annotated(flag, default, elsewhere)
                default = default if elsewhere is None else elsewhere.value
                if field.name == "model" and self._default_model is not None:
                    kind, default = Annotated[kind, tyro.conf.Positional], self._default_model
            helptext = partial(_docstring, docs, field.name)
            fields.append(StructFieldSpec(name=field.name, type=kind, default=default, helptext=helptext))
        return StructConstructorSpec(info.type, tuple(fields))


def _annotated(flag: Flag, default: Any, elsewhere: Default | None) -> Any:
    # The docstring says what leaving the flag out means; "(default: None)" would only blur it.
    silent = default is None or default is False or default == () or default is tyro.MISSING_NONPROP
    hint = "" if silent else None
    if elsewhere is not None:
        hint = f"(default: {elsewhere.shown(flag)}, by {elsewhere.where})"
    return Annotated[flag.kind, tyro.conf.arg(aliases=SHORT_FLAGS.get(flag.field), help_behavior_hint=hint)]


def _docstring(docs: Callable[[], dict[str, str]], name: str) -> str | None:
    """Of a field, once help is asked for: the source of its class has to be read for that."""
    return docs().get(name)


@lru_cache
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
    if info.type is not int and (len(kinds) != 1 or NoneType not in get_args(info.type) or kinds[0] not in CONVERT):
        return None
    kind = kinds[0]
    choices = ("true", "false") if kind is bool else None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}" if choices else kind.__name__.upper(),
        instance_from_str=lambda args: CONVERT[kind](args[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def _words(args: list[str]) -> tuple[str, ...]:
    if not args:  # as `--api-key $KEY` is when KEY is not set
        raise ValueError("a value is missing")
    return tuple(args)


def _one_line(box: str) -> str:
    """The message in the box that tyro draws, in Unicode or ASCII: between the title's rule and that before its hints.

    A title stands in its rule, or above it where there is no box.
    """
    lines = [line.strip("│| ") for line in _COLOUR.sub("", box).strip().splitlines()]
    rules = [index for index, line in enumerate(lines[:2]) if line.endswith(("──╮", "--", "-+"))]
    below = lines[rules[0] + 1 :] if rules else lines
    message = itertools.takewhile(lambda line: line.strip("─-"), below)
    return " ".join(" ".join(message).split()).rstrip(".")
