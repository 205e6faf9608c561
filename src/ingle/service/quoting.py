"""Text as systemd reads it: systemd.syntax(7), systemd.service(5), systemd.unit(5) and systemd.exec(5) say how."""

from __future__ import annotations

import os
import re

from ingle.errors import ConfigError, printable

_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_ESCAPED = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "\r": "\\r", "%": "%%"}


def argument(word: str) -> str:
    """A word of a command line, which systemd neither splits nor expands.

    Raises `ConfigError` for a zero character, which no argument holds.
    """
    return _quoted(word, "$")


def program(path: str) -> str:
    """The first word of a command line. Raises `ConfigError` for what systemd does not run."""
    if not path.startswith("/") or not path.isprintable() or set("\"'\\$") & set(path):
        raise ConfigError(f"systemd runs no program that is called {path!r}: install ingle elsewhere")
    return argument(path)


def assignment(name: str, value: str) -> str:
    """A variable for `Environment=`, where `$` means nothing."""
    return _quoted(f"{name}={value}", "")


def _quoted(word: str, doubled: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    return '"' + "".join(_character(c, doubled) for c in word) + '"'


def _character(c: str, doubled: str) -> str:
    if c == "\0":
        raise ConfigError("a zero character cannot stand in an argument")
    if c in doubled:
        return c * 2
    if c in _ESCAPED:
        return _ESCAPED[c]
    if c < " " or c == "\x7f" or "\ud800" <= c <= "\udfff":  # the last are bytes of a file's name that are no UTF-8
        return "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))
    return c


def path(text: str) -> str:
    """A path for `BindPaths=`, where a colon parts two and a backslash keeps what follows. Raises `ConfigError`."""
    check_path(text)
    if _PLAIN.fullmatch(text) and ":" not in text:
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text).replace("%", "%%") + '"'


def bare_path(text: str) -> str:
    """A path that takes the rest of its line and is not unquoted. Raises `ConfigError`."""
    check_path(text)
    if text != text.strip() or text.endswith("\\"):
        raise ConfigError(f"{text!r}: systemd reads no path that ends in a space or a backslash: rename it")
    return text.replace("%", "%%")


def check_path(text: str) -> None:
    """Raises `ConfigError` for what systemd takes for no path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{printable(ascii(text))} is no UTF-8, so no unit can name it: rename it") from None
    if any(c < " " or c == "\x7f" for c in text):
        raise ConfigError(f"{text!r} holds a control character, so no unit can name it: rename it")


def text_line(text: str) -> str:
    """Words for people, of which nothing is escaped and nothing expanded."""
    return printable(text.encode(errors="replace").decode()).replace("\\", "/").replace("%", "%%").strip()


def variable(name: str, value: str) -> str:
    """A line of an `EnvironmentFile=`. Raises `ConfigError` for a value of several lines."""
    if any(c < " " or c == "\x7f" for c in value):
        raise ConfigError(f"{name} holds a control character, so no file of variables can hold it")
    return f'{name}="' + re.sub(r'(["\\`$])', r"\\\1", value) + '"'
