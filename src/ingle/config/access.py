"""Who may reach a server, and with which keys."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ingle.errors import ConfigError

_MAX_FILE_BYTES = 1 << 20
_MAX_NAME = 64
_NAME = re.compile(r"[A-Za-z0-9][\w.@-]*", re.ASCII)


@dataclass(frozen=True)
class ApiKey:
    """A key, and what its holder may do."""

    key: str = field(repr=False)
    name: str = ""
    """What logs, metrics and shares of the engine know its holder by."""
    is_admin: bool = False
    """Whether it opens what changes the server or tells about it, too."""
    requests_per_minute: float = math.inf
    tokens_per_minute: float = math.inf
    """Of prompts and answers together."""


@dataclass(frozen=True)
class AccessConfig:
    """Who may use a server, and from where."""

    api_key: tuple[str, ...] = ()
    """Keys that clients must send as `Authorization: Bearer KEY`. Default: none is asked for. Others on this machine
    see them in `ps`: --api-key-file and INGLE_API_KEY keep them out of it."""
    api_key_file: str | None = None
    """File with such keys, one a line; empty lines and those that begin with # do not count. Behind a key may stand
    name=ALICE, rpm=60 (requests a minute), tpm=100k (tokens a minute) and admin."""
    admin_api_key: tuple[str, ...] = ()
    """Keys that also open what changes the server or tells about it. Default: nobody may change a server that asks for
    keys, and each key shows its metrics."""
    allow_open: bool = False
    """Let a server that the network reaches ask for no key. Default: it does not start."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names that requests may be sent to, besides localhost and the server's own address; *.example.com for all
    names below it, * for any. Default: no others for a server on loopback, any for one that the network reaches."""

    def __post_init__(self) -> None:
        for flag, words in (
            ("--api-key", self.api_key),
            ("--admin-api-key", self.admin_api_key),
            ("--allowed-hosts", self.allowed_hosts),
        ):
            if not all(word.strip() for word in words):
                raise ConfigError(f"{flag} has an empty value: leave the flag out, or give it one")
        self.keys()

    def keys(self) -> tuple[ApiKey, ...]:
        """All of them. One without a name is called by its place, `key-1`. Raises `ConfigError` for what is no file of
        keys, and for a key that is given twice."""
        given = [ApiKey(key) for key in self.api_key]
        if self.api_key_file is not None:
            given += _keys_in(self.api_key_file)
        given += [ApiKey(key, is_admin=True) for key in self.admin_api_key]
        return tuple(_named(given))


def _named(given: list[ApiKey]) -> Iterator[ApiKey]:
    seen: dict[str, ApiKey] = {}
    numbers = {True: 0, False: 0}
    for each in given:
        if (before := seen.get(each.key)) is not None:
            if before.is_admin != each.is_admin:
                raise ConfigError("one key is given both as --api-key and as --admin-api-key: give two")
            if before == each:
                continue  # as when the environment and a file have it
            raise ConfigError(f"one key is given twice, with other words behind it (name={before.name or each.name})")
        seen[each.key] = each
        numbers[each.is_admin] += 1
        kind = "admin" if each.is_admin else "key"
        name = each.name or f"{kind}-{numbers[each.is_admin]}"
        yield ApiKey(each.key, name, each.is_admin, each.requests_per_minute, each.tokens_per_minute)


def _keys_in(path: str) -> list[ApiKey]:
    where = f"--api-key-file {path}"
    try:
        with Path(path).expanduser().open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
        lines = text.decode().splitlines()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(f"{where}: {reason}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ConfigError(f"{where}: larger than {_MAX_FILE_BYTES} bytes, which is no list of keys")
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            try:
                keys.append(_key(words))
            except ValueError as error:
                raise ConfigError(f"{where}, line {number}: {error}") from None
    if not keys:
        raise ConfigError(f"{where}: no key in it")
    return keys


def _key(words: list[str]) -> ApiKey:
    """Of a line. Raises `ValueError`, which does not quote what may be a key."""
    name, is_admin, rates = "", False, {"rpm": math.inf, "tpm": math.inf}
    for word in words[1:]:
        what, _, value = word.partition("=")
        if word == "admin":
            is_admin = True
        elif what == "name" and _NAME.fullmatch(value) and len(value) <= _MAX_NAME:
            name = value
        elif what == "name":
            raise ValueError(f"a name is up to {_MAX_NAME} letters, digits and any of . _ @ - behind name=")
        elif what in rates:
            rates[what] = _rate(what, value)
        elif what.startswith("#"):
            break
        else:
            raise ValueError("behind a key may stand name=NAME, rpm=NUMBER, tpm=NUMBER, admin, and a # with a remark")
    return ApiKey(words[0], name, is_admin, rates["rpm"], rates["tpm"])


def _rate(what: str, value: str) -> float:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)([km]?)", value.lower())
    if match is None or not float(match[1]):
        raise ValueError(f"{what}={value[:20]} is no number above 0, such as {what}=60 or {what}=100k")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]
