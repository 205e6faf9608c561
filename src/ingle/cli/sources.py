"""Where a flag's value comes from when the command line does not say: the environment, then the file of `--config`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ingle.cli.fields import Flag
from ingle.cli.line import Dialect, Line, read, told
from ingle.errors import ConfigError
from ingle.habits.near import nearest
from ingle.habits.variables import KEYS, OURS

_MAX_BYTES = 1 << 20
_SEPARATORS = re.compile(r"[\s,]+")


SECRETS = ("api_key", "admin_api_key", "ssl_keyfile_password")
"""Fields whose values are not shown."""


class Default(NamedTuple):
    """A value that was not given on the command line."""

    value: Any
    where: str
    """The variable, or the file."""

    def shown(self, flag: Flag) -> str:
        """The value, unless it is a secret."""
        if is_secret(flag):
            return "set"
        return " ".join(self.value) if isinstance(self.value, tuple) else str(self.value)

    def words(self) -> list[str]:
        """As they are typed after the flag."""
        value = self.value
        return (
            list(value) if isinstance(value, tuple) else [str(value).lower() if isinstance(value, bool) else str(value)]
        )


Defaults = dict[tuple[type, str], Default]
"""By class and field."""


def is_secret(flag: Flag) -> bool:
    return flag.field in SECRETS


def variable_of(flag: Flag) -> str:
    return f"INGLE_{flag.field.upper()}"


def variables_of(flag: Flag) -> tuple[str, ...]:
    """Of several words; keys go by two names, and those of both count."""
    name = variable_of(flag)
    return (name, f"{name}S") if flag.field in ("api_key", "admin_api_key") else (name,)


def from_environment(flags: Sequence[Flag], environment: Mapping[str, str]) -> Iterator[tuple[Flag, Default]]:
    """Raises `ConfigError` that names the variable. An empty one is not set."""
    for flag in flags:
        names = [name for name in variables_of(flag) if environment.get(name, "").strip()]
        if not names:
            continue
        text, where = " ".join(environment[name].strip() for name in names), " and ".join(names)
        words = [word for word in _SEPARATORS.split(text) if word] if flag.takes_words else [text]
        yield flag, Default(_value(flag, words, where, text), where)
    for flag in flags:
        given = next((name for name in KEYS if environment.get(name)), None)
        if flag.field == "api_key" and given is not None and not any(map(environment.get, variables_of(flag))):
            yield flag, Default((environment[given],), given)


def _value(flag: Flag, words: list[str], where: str, text: str) -> Any:
    try:
        return flag.value(words)
    except ValueError as error:
        shown = "" if is_secret(flag) else f"={text}"
        raise ConfigError(f"{where}{shown}: {error}") from None


def unknown_variables(known: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """What to say of variables that look like ours and are not."""
    names = OURS.union(known)
    for name in sorted(environment):
        if name.startswith("INGLE_") and name not in names:
            near = nearest(_as_flag(name), {_as_flag(each): each for each in names})
            yield f"{name} changes nothing: there is no such variable" + (f"; did you mean {near}?" if near else "")


def _as_flag(variable: str) -> str:
    return "--" + variable.lower().replace("_", "-")


def from_file(path: str, dialect: Dialect, command: str) -> Line:
    """The settings in a file, read as flags are. Raises `ConfigError` that names the file.

    Keys that other commands have as flags are left to those.
    """
    line = read(list(_words(_parsed(path))), dialect._replace(shared=True))
    if line.config is not None:
        line.objections.append("unknown key config: a file does not name another")
    if line.objections:
        objections = [text.replace("flag --", "key ").replace("mean --", "mean ") for text in line.objections]
        raise told(objections, command, where=path)
    return line


def values_of(line: Line, path: str) -> Iterator[tuple[Flag, Default]]:
    for flag, words in (*line.implied, *line.settings):
        yield flag, Default(_value(flag, words, f"{path}: {flag.field}", " ".join(words)), path)


def _words(settings: Mapping[str, Any]) -> Iterator[str]:
    for key, value in settings.items():
        name = "--" + str(key).replace("_", "-")
        if isinstance(value, bool):
            yield f"{name}={'true' if value else 'false'}"
        elif isinstance(value, list):
            yield name
            yield from map(_text, value)
        elif value is not None:
            yield f"{name}={_text(value)}"


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _parsed(path: str) -> Mapping[str, Any]:
    file = Path(path).expanduser()
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"--config {path}: larger than {_MAX_BYTES} bytes, which is no list of flags")
    try:
        settings = _decoded(file.suffix.lower(), data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: {' '.join(str(error).split())}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path}: not a list of names and values, such as port: 8000")
    return settings


def _decoded(suffix: str, text: str) -> Any:
    """Raises `ValueError`."""
    if suffix == ".json":
        return json.loads(text)
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    if suffix == ".toml":
        return _toml(text)
    raise ValueError("its name ends neither in .toml nor in .yaml, .yml or .json, so its format is not known")


def _toml(text: str) -> Any:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def key_file_notice(path: str) -> str | None:
    """What to say of a file of keys that others can read."""
    if Path(path).expanduser().stat().st_mode & 0o077:
        return f"others on this machine can read {path}: `chmod 600 {path}` keeps its keys to you"
    return None
