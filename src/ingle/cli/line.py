"""A command line before tyro reads it: whose flag is each word, and what do flags of other tools mean here?

What people type from habit (`ingle.habits`) becomes our own words, notices and objections. All objections are told at
once, and an unknown flag is named even when it took the model for its value.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ingle.cli.fields import Flag, is_positional, parse_truth
from ingle.errors import ConfigError
from ingle.habits.flags import SAME, SECRETS, VALUES, Habit, elsewhere, habits, refusal
from ingle.habits.near import nearest
from ingle.habits.turned import TURNED, Turned

_FLAG = re.compile(r"--?[A-Za-z][\w.-]*")
_TRUTH = {"true", "false", "on", "off", "yes", "no", "auto", "1", "0"}
_PROMPT = "PROMPT"


class Dialect(NamedTuple):
    """Which flags a command has."""

    own: Mapping[str, Flag]
    """By every spelling."""
    loads_model: bool
    """Whether it takes the flags of other tools that load one."""
    takes_prompt: bool = False
    """As a word after the model."""
    others: Mapping[str, Habit] = {}
    """Flags of other tools for this very command."""
    shared: bool = False
    """Whether the settings are those of a file, which may be meant for several commands."""


@dataclass
class Line:
    """What was asked for."""

    model: str | None = None
    positionals: list[str] = field(default_factory=list)
    """Without a model given by `--model`."""
    settings: list[tuple[Flag, list[str]]] = field(default_factory=list)
    implied: list[tuple[Flag, list[str]]] = field(default_factory=list)
    """Hold where `settings` says nothing."""
    config: str | None = None
    """The file of `--config`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that this process shall see."""
    notices: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)
    swallowed: bool = False
    """Whether a flag that takes all words up to the next one may have taken the model."""

    def words(self) -> list[str]:
        """Our own command line."""
        given = {flag.field for flag, _ in self.settings}
        settings = [*(each for each in self.implied if each[0].field not in given), *self.settings]
        flags = [word for flag, values in settings for word in spelled(flag, values)]
        # After `--` no flag takes what has a place for its value, and it may begin with a dash.
        return [*flags, "--", *([] if self.model is None else [self.model]), *self.positionals]


class _Item(NamedTuple):
    """A flag as it was typed."""

    typed: str
    name: str
    """With `-` for `_`."""
    values: list[str]


def spelled(flag: Flag, values: list[str]) -> list[str]:
    """A setting as words for tyro."""
    if flag.is_switch:
        return [flag.name if parse_truth(values[0]) else f"--no-{flag.name[2:]}"]
    if len(values) == 1 and not flag.takes_words:
        return [f"{flag.name}={values[0]}"]  # whatever it begins with
    return [flag.name, *values]


def read(words: Sequence[str], dialect: Dialect) -> Line:
    """Raises `ConfigError` for a model that is given twice, or not given after `--model`."""
    line = Line()
    items = list(_items(words, dialect, line))
    models = [item for item in items if _is_model(item, dialect)]
    for item in models:
        _take_model(line, item)
    if line.model is not None and line.positionals[:1] == [line.model]:
        del line.positionals[0]
    for item in items:
        if not _is_model(item, dialect):
            _apply(line, item, dialect)
    return line


def _items(words: Sequence[str], dialect: Dialect, line: Line) -> Iterator[_Item]:
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            line.positionals += rest
            return
        typed, equals, value = word.partition("=")
        if not _FLAG.fullmatch(typed):
            line.positionals.append(word)
            continue
        name = _dashed(typed)
        values = [value] if equals else _following(_takes(name, dialect), rest)
        if not equals and _takes(name, dialect) == "=+" and values:
            line.swallowed = True
        yield _Item(typed, name, values)


def _dashed(typed: str) -> str:
    """`--some-flag` of `--some_flag`, and of `--some-flag.key`, as vLLM's objects are written."""
    return typed.partition(".")[0].replace("_", "-") if typed.startswith("--") else typed


def is_flag(word: str) -> bool:
    return _FLAG.fullmatch(word.partition("=")[0]) is not None


def _takes(name: str, dialect: Dialect) -> str:
    if (flag := dialect.own.get(name)) is not None:
        return "?" if flag.is_switch else "=+" if flag.takes_words else "="
    if dialect.loads_model and name in ("--model", "--config"):
        return "="
    habit = _habit(name, dialect)
    if habit is None:
        return ""
    if habit.kind == "same":
        ours = habit.says.partition("=")[0]
        if "=" in habit.says:
            return ""
        here = dialect.own.get(ours)
        return _takes(ours, dialect) if here is not None else _takes_elsewhere(ours)
    return habit.takes


def _takes_elsewhere(ours: str) -> str:
    return "=" if ours in (_PROMPT, "--model") else elsewhere()[ours].takes if ours in elsewhere() else ""


def _habit(name: str, dialect: Dialect) -> Habit | None:
    if name in dialect.others:
        return dialect.others[name]
    if not dialect.loads_model:
        return None
    return habits().get(name) or elsewhere().get(name)


def _following(takes: str, rest: list[str]) -> list[str]:
    """Takes a flag's values off what follows it."""
    count = 0
    if takes == "=":
        count = 1 if rest and not is_flag(rest[0]) else 0
    elif takes == "?":
        count = 1 if rest and rest[0].lower() in _TRUTH else 0
    elif takes == "#":
        count = _how_many(rest, str.isdecimal)
    elif takes == "=+":
        count = _how_many(rest, lambda word: not is_flag(word) and word != "--")
    values, rest[:count] = rest[:count], []
    return values


def _how_many(words: Sequence[str], fits: Callable[[str], bool]) -> int:
    """At the beginning."""
    return sum(1 for _ in itertools.takewhile(fits, words))


def _is_model(item: _Item, dialect: Dialect) -> bool:
    flag = dialect.own.get("--model")
    if flag is None or not is_positional(flag):  # where it is a flag as others are
        return False
    habit = None if item.name in dialect.own else _habit(item.name, dialect)
    return item.name == "--model" or (habit is not None and habit.kind == "same" and habit.says == "--model")


def _take_model(line: Line, item: _Item) -> None:
    value = item.values[0] if item.values else ""
    if not value:
        raise ConfigError(f"{item.typed} needs a value: a model's name, a folder or a .gguf file")
    if line.model not in (None, value):
        raise ConfigError(f"--model was given twice: {line.model!r} and {value!r}")
    line.model = value


def _apply(line: Line, item: _Item, dialect: Dialect) -> None:
    if item.name in dialect.own:
        _set(line, item, item.name, item.values, dialect)
    elif dialect.loads_model and item.name == "--config":
        _take_config(line, item)
    elif (habit := _habit(item.name, dialect)) is not None:
        _follow(line, item, habit, dialect)
    else:
        line.objections.append(_unknown(item, dialect))


def _take_config(line: Line, item: _Item) -> None:
    if not item.values or not item.values[0]:
        line.objections.append("--config needs a value: a .toml, .yaml or .json file")
    else:
        line.config = item.values[0]


def _is_shared(flag: Flag) -> bool:
    """Whether all commands that load a model have it. What only one has may mean something else elsewhere."""
    return flag.owner.__module__.startswith("ingle.config")


def _set(line: Line, item: _Item, name: str, values: list[str], dialect: Dialect) -> None:
    """A flag of our own. Whether its values are good ones is tyro's business, but for those that nobody can have."""
    flag = dialect.own[name]
    values = [VALUES.get(flag.name, {}).get(value.lower(), value) for value in values]
    if flag.is_switch:
        try:
            asked = parse_truth(values[0]) if values else True
        except ValueError as error:
            line.objections.append(f"{item.typed}: {error}")
            return
        values = ["true" if asked != (name.startswith("--no-") and name != flag.name) else "false"]
    elif not values and not flag.takes_words:
        line.objections.append(f"{item.typed} needs a value")
        return
    elif flag.is_truth:
        values = [value.lower() if value.lower() in _TRUTH else value for value in values]
    elif _is_shared(flag) and values and (answer := refusal(flag.name, values[0])) is not None:
        line.objections.append(f"{flag.name} {values[0]}: {answer}")
        return
    elif dialect.loads_model and values and _asks_nothing(flag, values[0]):
        return
    before = next((words for given, words in line.settings if given == flag and flag.takes_words), None)
    if before is not None and values:  # words add up, however often their flag is given
        before += values
    else:
        line.settings.append((flag, list(values)))


def _asks_nothing(flag: Flag, value: str) -> bool:
    habit = habits().get(flag.name)
    return habit is not None and habit.kind == "refused" and value.lower() in habit.harmless


def _follow(line: Line, item: _Item, habit: Habit, dialect: Dialect) -> None:
    """A flag of another tool, or one of ours that this command has not."""
    value = item.values[0] if item.values else ""
    shown = f"{item.typed} {value}" if value and not _is_secret(item.name) else item.typed
    if habit.kind == "same":
        _follow_same(line, item, habit, dialect)
    elif habit.kind == "turned":
        takes, turn = TURNED[habit.name]
        if takes == "=" and not value:
            line.objections.append(f"{item.typed} needs a value")
        else:
            _take_turned(line, item, shown, turn(value, line.model or _first(line.positionals)), dialect)
    elif habit.kind in ("elsewhere", "refused here") and dialect.shared:
        if habit.kind == "refused here":
            line.notices.append(f"{item.typed} changes nothing here: {habit.says}")
    elif habit.kind in ("refused", "refused here"):
        asks_nothing = bool(value) and value.lower() in habit.harmless
        if not asks_nothing:
            line.objections.append(f"{shown}: {habit.says}")
    else:
        line.notices.append(f"{item.typed} changes nothing here: {habit.says}")


def _first(words: list[str]) -> str | None:
    return words[0] if words else None


def _is_secret(name: str) -> bool:
    return name in SECRETS


def _follow_same(line: Line, item: _Item, habit: Habit, dialect: Dialect) -> None:
    ours, equals, fixed = habit.says.partition("=")
    if ours == _PROMPT and dialect.takes_prompt:
        line.positionals += item.values
    elif ours in dialect.own:
        if not equals or [value.lower() for value in item.values] != ["false"]:
            _set(line, item, ours, [fixed] if equals else item.values, dialect)
    elif (other := elsewhere().get(ours)) is not None:
        _follow(line, item, other, dialect)
    else:
        line.objections.append(_unknown(item, dialect))


def _take_turned(line: Line, item: _Item, shown: str, turned: Turned, dialect: Dialect) -> None:
    if turned.refusal:
        line.objections.append(f"{shown}: {turned.refusal}")
    for flag, values in _settings(turned.words):
        if flag in dialect.own:
            _set(line, item, flag, values, dialect)
        elif (other := elsewhere().get(flag)) is not None:
            _follow(line, item, other, dialect)
    for flag, values in _settings(turned.implied):
        if flag in dialect.own:
            line.implied.append((dialect.own[flag], values))
    if turned.notice:
        line.notices.append(f"{shown} {turned.notice}")
    if turned.environment is not None:
        line.environment.update([turned.environment])
    if turned.model is not None:
        if line.model is None and line.positionals:
            line.positionals[0] = turned.model
        else:
            line.model = turned.model


def _settings(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag, and the words up to the next."""
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    for start, end in itertools.pairwise([*starts, len(words)]):
        yield words[start], list(words[start + 1 : end])


def _unknown(item: _Item, dialect: Dialect) -> str:
    near = nearest(item.name, candidates(dialect))
    return f"unknown flag {item.typed}" + (f"; did you mean {near}?" if near is not None else "")


def candidates(dialect: Dialect) -> Mapping[str, str]:
    """What a mistyped flag may have been meant to be, and what to call that: our own flags, and others' for them."""
    found = {name: name for name in dialect.own if name.startswith("--")}
    if dialect.loads_model:
        found |= {"--model": "--model", "--config": "--config"}
        for ours, theirs in SAME.items():
            if ours in dialect.own:
                found |= {name: ours for name in theirs.split() if name.startswith("--") and name not in found}
    return found


def told(objections: Iterable[str], command: str, *, where: str = "") -> ConfigError:
    """All objections in one error."""
    told = list(objections)
    before = f"{where}: " if where else ""
    if len(told) == 1:
        see = f" (see `ingle {command} --help`)" if told[0].startswith("unknown") else ""
        return ConfigError(f"{before}{told[0]}{see}")
    return ConfigError(f"{before}{len(told)} flags cannot be had here: " + "; ".join(told))
